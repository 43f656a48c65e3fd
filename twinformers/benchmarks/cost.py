"""What a task must read or compute at the least: its distance from the machine's own limits.

Decoding reads every weight once a step, and the keys and values so far. A prefill and an update multiply:
two operations for each weight and token, three times that where gradients are wanted, and the attention.
Padding, recomputing and whatever else an implementation does besides is not counted, for it need not be done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from twinformers.benchmarks.cases import Case
from twinformers.weight_maps import weight_map

#: What limits a task.
BOUNDS = {"decode": "bandwidth", "prefill": "matrix", "train": "matrix"}
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
QUANTIZED = ("int8",)


@dataclass(frozen=True)
class Parameters:
    """How many numbers a model reads: matrices of its blocks, its head, what is none; columns of all."""

    blocks: int
    head: int
    vectors: int
    outputs: int


def parameters(config: Any) -> Parameters:
    """Counted from the weight map; an embedding counts as the head alone: a look-up reads next to nothing."""
    kernels = vectors = outputs = 0
    for leaf in weight_map(config).leaves("torch").values():
        name, count = leaf.name("jax"), math.prod(leaf.shape("torch"))
        if name.endswith(".kernel"):
            kernels += count
            outputs += leaf.shape("jax")[-1]
        elif not name.endswith(".embedding"):
            vectors += count
    head = config.vocab_size * config.hidden_size
    if config.tie_word_embeddings:
        return Parameters(kernels, head, vectors, outputs + config.vocab_size)
    return Parameters(kernels - head, head, vectors, outputs)


def cost(config: Any, case: Case, dtype: str, quantize: str | None = None) -> tuple[str, float] | None:
    """("bandwidth", bytes) or ("matrix", FLOPs) of a case; None where neither limits it.

    "int8" reads a byte for each number of a matrix, and a scale for each of its columns.
    """
    config = config.replace(num_hidden_layers=case.layers) if case.layers else config
    n, B, T = parameters(config), case.batch, case.tokens
    if case.task == "decode":
        steps = case.new_tokens - 1
        matrices = BYTES[dtype] * (n.blocks + n.head)
        if quantize:
            matrices = n.blocks + n.head + BYTES[dtype] * n.outputs
        others = n.vectors + B * config.hidden_size
        keys = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        # Step i sees the prompt, the tokens before it and itself.
        seen = steps * T + steps * (steps + 1) // 2
        return BOUNDS[case.task], float(steps * matrices + BYTES[dtype] * (steps * others + B * keys * seen))
    # A query attends to itself and what precedes it, in two products of two operations each.
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * T * (T + 1) // 2
    if case.task == "prefill":
        return BOUNDS[case.task], float(B * (2 * n.blocks * T + 2 * n.head + attention))
    if case.task == "train":
        return BOUNDS[case.task], float(3 * B * (2 * (n.blocks + n.head) * T + attention))
    return None
