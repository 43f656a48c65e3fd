"""What the training steps of both frameworks share: their options, and what a batch is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from twinformers.configs import Config
from twinformers.errors import UsageError
from twinformers.parity.kinds import Causal

#: What the backward pass finds stored of each block: everything; the results of its weights' products, the
#: rest being computed again; nothing but its input.
REMAT = ("none", "dots", "full")
COMPUTE = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How a step is computed; apart from `compute_dtype` and `seed`, nothing here changes what it computes.

    `accumulate` micro-batches share one update: row r of the batch belongs to number r mod accumulate.
    `chunk` tokens of each row at a time have their logits in memory (None: all). `compute_dtype` is what the
    model computes in, while weights, gradients, loss and moments keep the dtype of the weights. `seed` turns
    dropout on: micro-batch m of update n = 1, 2, ... gets the key `fold_in(fold_in(key(seed), n), m)`.
    """

    accumulate: int = 1
    remat: str = "none"
    compute_dtype: str | None = None
    chunk: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        choices = {"remat": REMAT, "compute_dtype": (None, *COMPUTE)}
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                expected = ", ".join(map(str, allowed))
                raise UsageError("unknown value", where=name, expected=expected, found=repr(value))
        for name, count in {"accumulate": self.accumulate, "chunk": self.chunk}.items():
            if count is not None and count < 1:
                raise UsageError("bad value", where=name, expected="a positive number", found=str(count))


class Batch(NamedTuple):
    """Rows of tokens and what each should predict. int32, each [B, T]"""

    tokens: Any
    positions: Any  # each token's position in its own sequence, -1 for padding
    targets: Any  # the token that should follow, -1 where none is learned; padding never is


class Metrics(NamedTuple):
    """What a step tells, still on its device: `float()` waits for it. In the dtype of the weights."""

    loss: Any  # [], mean cross-entropy over the targets, before the update
    norm: Any  # [], length of the whole gradient before clipping


def following(tokens: np.ndarray, positions: np.ndarray) -> Batch:
    """A batch in which each token is to predict its successor in its row. 2 x [B, T]"""
    targets, learned = Causal().targets((tokens, positions))
    return Batch(tokens, positions, np.where(learned, targets, -1).astype(np.int32))


def random_batch(config: Any, batch: int, length: int) -> Batch:
    """Full rows of random tokens, to measure with."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length), np.int32)
    return following(tokens, np.tile(np.arange(length, dtype=np.int32), (batch, 1)))


def check_model(config: Config, dtypes: set[str]) -> None:
    """UsageError for a model that is no language model, or whose weights are too coarse to be trained."""
    if config.kind != "causal":
        raise UsageError(
            "the step trains language models",
            where=config.architecture,
            expected="a model that is called with tokens and positions",
            found=config.kind,
        )
    if not dtypes <= {"float32", "float64"}:
        raise UsageError(
            "small updates would vanish in the weights",
            where="model",
            expected="weights in float32 or float64",
            found=", ".join(sorted(dtypes)),
            hint='load the model with dtype="float32" and give compute_dtype="bfloat16"',
        )


def check_batch(batch: Batch, vocab_size: int, accumulate: int) -> None:
    """UsageError for arrays that do not fit together, and for token ids (in numpy) beyond the vocabulary."""
    for name, x in batch._asdict().items():
        if len(x.shape) != 2 or x.shape != batch.tokens.shape:
            raise UsageError(
                "the arrays of a batch do not fit together",
                where=name,
                expected="[B, T], as tokens, positions and targets all are",
                found=str(list(x.shape)),
            )
    if batch.tokens.shape[0] % accumulate:
        raise UsageError(
            "the rows cannot be shared out evenly over the micro-batches",
            where="batch",
            expected=f"a multiple of accumulate = {accumulate} rows",
            found=f"{batch.tokens.shape[0]} rows",
        )
    for name, x, least in (("tokens", batch.tokens, 0), ("targets", batch.targets, -1)):
        if isinstance(x, np.ndarray) and x.size and (x.min() < least or x.max() >= vocab_size):
            raise UsageError(
                "a token id is outside the vocabulary",
                where=name,
                expected=f"{least} to {vocab_size - 1}",
                found=f"{x.min()} to {x.max()}",
            )
