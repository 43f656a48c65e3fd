#!/bin/bash
# JAX on a TPU slice of any number of hosts: the same command on every worker, which find each other.
#
#   TPU=twin ZONE=us-central1-a OUT=/mnt/shared/run DATA=/mnt/shared/texts scripts/launch/tpu-pod.sh
#   TPU=twin ZONE=us-central1-a OUT=/mnt/shared/run RESUME=--resume scripts/launch/tpu-pod.sh
#
# OUT and DATA lie on a filesystem that all workers have mounted (Filestore, for one). Install once before:
#   gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all \
#     --command "pip install 'twinformers[jax,tpu,train]'"
set -euo pipefail

TPU="${TPU:?the name of the TPU}"
ZONE="${ZONE:?its zone, such as us-central1-a}"
OUT="${OUT:?a folder that all workers see}"
RESUME="${RESUME:-}"
PRESET="${PRESET:-llama-10m}"
# Anything else, such as "--batch-size 256 --compute-dtype bfloat16".
MORE="${MORE:-}"

if [ -n "$RESUME" ]; then
  what=(--resume)
else
  # The sizes multiply to the number of devices of the slice.
  what=(--data "${DATA:?texts that all workers see}" --preset "$PRESET" --framework jax
    --mesh "${MESH:?such as fsdp=16}")
fi
# The command is read by a shell once more, on the worker.
quoted="$(printf ' %q' twinformers train text --out "$OUT" --distributed "${what[@]}")"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "${quoted# } $MORE"
