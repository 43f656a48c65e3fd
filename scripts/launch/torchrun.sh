#!/bin/bash
# PyTorch on the GPUs of one host, a process for each; on a machine without GPUs, processes that share its cores.
#
#   scripts/launch/torchrun.sh --data texts --preset llama-10m --steps 500
#   MESH=data=2,fsdp=2,tensor=2 OUT=other scripts/launch/torchrun.sh --data texts --preset llama-10m
#   scripts/launch/torchrun.sh --resume
#
# What is written behind goes to `twinformers train text`.
set -euo pipefail

OUT="${OUT:-run}"
# As many processes as there are GPUs, or 2.
PROCESSES="${PROCESSES:-$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)}"
[ "$PROCESSES" -gt 0 ] || PROCESSES=2
MESH="${MESH:-fsdp=$PROCESSES}"

what=(--framework torch --mesh "$MESH")
for word in "$@"; do
  # A run keeps its own framework and mesh.
  [ "$word" != --resume ] || what=()
done
exec torchrun --standalone --nproc-per-node "$PROCESSES" \
  --no-python twinformers train text --out "$OUT" ${what[@]+"${what[@]}"} "$@"
