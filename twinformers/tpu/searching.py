"""Which mesh, and what to compute again: many choices weighed by arithmetic, the best of them compiled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from twinformers.errors import UsageError
from twinformers.tpu.generations import find_slice
from twinformers.tpu.planning import Plan, plan

#: Bytes for each parameter: weights and both moments in float32, gradients, and the bfloat16 copy.
TRAINED, GENERATED = 4 * 4 + 2, 2
#: Bytes kept of a token in a block, by policy, in units of the hidden size and of the feed-forward size.
KEPT = {"full": (2, 0), "dots": (10, 6), "none": (24, 12)}
#: Bytes per second that a chip tells its neighbours, roughly: enough to rank meshes by, and for nothing else.
LINKS = 1e11


@dataclass(frozen=True)
class Found:
    """What was compiled, the fastest that fits first, and of how many choices."""

    best: Plan
    tried: list[Plan]
    candidates: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "recommended": self.best.to_dict(),
            "tried": [asdict(p) for p in self.tried],
            "candidates": self.candidates,
        }


def search(
    config: Any,
    topology: str,
    *,
    mode: str,
    batch: int,
    sequence: int,
    tries: int = 3,
    on_progress: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Found:
    """Compile the `tries` most promising meshes (and policies, for training), and recommend the fastest.

    Promise is arithmetic: what a device would hold, multiply and tell others. Where none of them fits, the
    one that needs the least is returned. `options` as in `plan`, without its mesh and remat.
    Raises UsageError where no mesh suits the batch.
    """
    found = find_slice(topology)
    ranked = sorted(
        (estimate(config, mode, batch, sequence, sizes, remat, found), n, sizes, remat)
        for n, (sizes, remat) in enumerate(choices(config, mode, batch, found.devices))
    )
    if not ranked:
        raise UsageError(
            "no mesh suits the batch",
            where="batch",
            expected=f"rows that {found.devices} devices can share out",
            found=str(batch),
        )
    tried = []
    for number, (_, _, sizes, remat) in enumerate(ranked[:tries], 1):
        given = {**options, "mesh": sizes, "remat": remat, "quick": number > 1}
        tried.append(
            plan(
                config,
                topology,
                mode=mode,
                batch=batch,
                sequence=sequence,
                on_progress=partial(_say, on_progress, f"{number}/{min(tries, len(ranked))}"),
                **given,
            )
        )
    tried.sort(key=lambda p: (not p.fits, p.step_seconds if p.fits else p.memory["total"]))
    return Found(tried[0], tried, len(ranked))


def _say(on_progress: Callable[[str], None], number: str, text: str) -> None:
    on_progress(f"{number} {text}")


def choices(config: Any, mode: str, batch: int, devices: int) -> Iterator[tuple[dict[str, int], str]]:
    """Meshes whose axes divide rows and heads, with each policy for training."""
    heads = math.gcd(config.num_attention_heads, config.num_key_value_heads)
    sizes = [n for n in range(1, devices + 1) if devices % n == 0]
    for tensor in sizes:
        for data in sizes:
            if (devices // tensor) % data or heads % tensor:
                continue
            fsdp = devices // tensor // data
            if batch % (data * fsdp):
                continue
            if mode != "train" and fsdp > 1:
                continue  # weights that are gathered at every step are read over the slowest wire
            for remat in KEPT if mode == "train" else ("none",):
                yield {"data": data, "fsdp": fsdp, "tensor": tensor}, remat


def estimate(
    config: Any, mode: str, batch: int, sequence: int, mesh: dict[str, int], remat: str, found: Any
) -> tuple[int, float]:
    """(Whether memory speaks against it, seconds) of a choice, to rank it by."""
    from twinformers.benchmarks.cost import parameters

    c, n = config, parameters(config)
    total = n.blocks + n.vectors + n.head * (1 if c.tie_word_embeddings else 2)
    shards = mesh["fsdp"] * mesh["tensor"]
    rows = batch / (mesh["data"] * mesh["fsdp"])
    tokens = rows * (sequence if mode != "decode" else 1)
    training = mode == "train"
    held = total * (TRAINED if training else GENERATED) / shards
    if training:
        hidden, wide = KEPT[remat]
        held += (
            c.num_hidden_layers
            * tokens
            * (hidden * c.hidden_size + wide * c.intermediate_size / mesh["tensor"])
        )
        held += tokens * c.vocab_size * 6 / mesh["tensor"]
    else:
        keys = 4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * sequence * rows
        held += keys / math.gcd(mesh["tensor"], c.num_key_value_heads)
    again = {"full": 4, "dots": 3.2, "none": 3}[remat] if training else 1
    multiplied = again * 2 * (n.blocks + n.head) * tokens / mesh["tensor"] / found.flops
    read = held / found.bandwidth
    # Weights are gathered twice and their gradients spread once; a row's activations meet four times a block.
    passes = 3 if training else 1
    told = 2 * passes * total / mesh["tensor"] * (mesh["fsdp"] > 1)
    told += 4 * total / shards * (mesh["data"] > 1) * training
    met = 4 * passes * c.num_hidden_layers * tokens * c.hidden_size * 2 * (mesh["tensor"] > 1)
    seconds = max(multiplied, read) + max(0.0, told / LINKS - multiplied) + met / LINKS
    return int(held > 0.95 * found.memory), seconds
