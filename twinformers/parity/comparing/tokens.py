"""Token by token: what each model would say next, how sure it is, how far apart two distributions are.

Flax continues a prompt greedily, with a cache; then every model reads the same whole text at once. Whether a
token is the likeliest is decided by tiny differences where two are nearly as likely, so another choice fails
only where rounding does not explain it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from twinformers.checkpoints import Checkpoint
from twinformers.loading import load
from twinformers.parity.kinds import Inputs, kind
from twinformers.parity.limits import limit
from twinformers.parity.recording import to_numpy, widened
from twinformers.parity.rounding import Rounding
from twinformers.parity.twins import jax_caller, jax_precision, torch_caller


@dataclass(frozen=True)
class Choice:
    """A model's likeliest next token, and the probability that the model gives it."""

    token: int
    text: str
    probability: float | None


@dataclass(frozen=True)
class Step:
    """One position of the text: what each model chooses after it, and the divergence of each pair in nats.

    `generated` says that the token standing here was chosen by Flax and is not the prompt's. Pairs are named
    "jax-torch": the divergence is that of PyTorch's distribution from Flax's. None is not finite.
    """

    position: int
    token: int
    text: str
    generated: bool
    choices: dict[str, Choice]
    divergence: dict[str, float | None]

    @property
    def agree(self) -> bool:
        return len({choice.token for choice in self.choices.values()}) == 1


@dataclass(frozen=True)
class Agreement:
    """One text in one dtype: every position, and what they come to.

    `agreement` is the share of positions at which a pair chooses the same token. `ok` judges the twins: each
    position the same, or a difference that rounding explains; `note` says which was not.
    """

    dtype: str
    prompt: str | None
    prompt_tokens: int
    steps: list[Step]
    agreement: dict[str, float]
    max_divergence: dict[str, float | None]
    ok: bool
    note: str


def divergence(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of the distributions of logits: sum p log(p / q). 2 x [T, V] -> [T]

    Written as sum p (e^d - 1 - d) with d = log q - log p: every summand is positive, and where d is small a
    series gives it, so that two that differ in their last bits do not drown in the sum's own rounding.
    """
    p, q = log_probabilities(left), log_probabilities(right)
    d = q - p
    with np.errstate(over="ignore", invalid="ignore"):
        exact = np.where(np.abs(d) < 1e-3, d * d * (1 / 2 + d * (1 / 6 + d / 24)), np.expm1(d) - d)
        return (np.exp(p) * exact).sum(-1)


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """In float64. [T, V] -> same"""
    with np.errstate(invalid="ignore"):
        x = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))


def agreement(
    checkpoint: Checkpoint,
    dtype: str,
    prompt: Sequence[int],
    count: int,
    devices: Mapping[str, Any],
    *,
    reference: bool,
    text: Callable[[int], str] = str,
    stop: Sequence[int] = (),
    shown: str | None = None,
) -> Agreement:
    """Continue the tokens of a prompt by up to `count`; `text` gives a token's text, `shown` the prompt's."""
    import jax
    import torch

    calls, logits = kind(checkpoint.config), {}
    inputs: Inputs = calls.prompted(checkpoint.config, prompt)
    generated: list[int] = []
    with jax_precision(dtype), jax.default_device(devices["jax"]):
        model = load(checkpoint, "jax", dtype, devices["jax"])
        call = jax_caller(model)
        both = jax_caller(model, ("__call__", "decode"))
        for token in calls.steps(checkpoint.config, both, model.empty_cache, inputs, count - 1):
            generated.append(token)
            if token in stop:
                break
        # All but the last are read again: it is what the last position says.
        tokens = np.concatenate([inputs[-2], np.array([generated[:-1]], np.int32)], 1)
        inputs = (*inputs[:-2], tokens, np.arange(tokens.shape[1], dtype=np.int32)[None])
        logits["jax"] = widened(np.asarray(call("__call__", *inputs)[0]))[0]
        del model, call
    model = load(checkpoint, "torch", dtype, devices["torch"])
    with torch.inference_mode():
        logits["torch"] = to_numpy(torch_caller(model, devices["torch"])("__call__", *inputs)[0])[1][0]
    del model
    if reference:
        from twinformers.parity.reference import precise, reference_model

        with precise(dtype), torch.inference_mode():
            theirs = calls.reference(reference_model(checkpoint, dtype), inputs, getattr(torch, dtype))
        logits["transformers"] = to_numpy(theirs)[1][0]
    steps = _steps(logits, tokens[0].tolist(), tokens.shape[1] - len(generated) + 1, text)
    pairs = {pair: [s.divergence[pair] for s in steps] for pair in steps[0].divergence}
    same = {p: [_same(s, p) for s in steps] for p in pairs}
    note = _unexplained(steps, Rounding(checkpoint, dtype, inputs), dtype)
    return Agreement(
        dtype,
        shown,
        len(prompt),
        steps,
        {p: sum(agree) / len(agree) for p, agree in same.items()},
        {p: None if None in found else max(d for d in found if d is not None) for p, found in pairs.items()},
        not note,
        note,
    )


def _steps(
    logits: Mapping[str, np.ndarray], tokens: Sequence[int], prompt: int, text: Callable[[int], str]
) -> list[Step]:
    chosen = {name: x.argmax(-1) for name, x in logits.items()}
    sure = {name: np.exp(log_probabilities(x).max(-1)) for name, x in logits.items()}
    apart = {f"{a}-{b}": divergence(logits[a], logits[b]) for a, b in itertools.combinations(logits, 2)}
    return [
        Step(
            n,
            token,
            text(token),
            n >= prompt,
            {name: Choice(int(c[n]), text(int(c[n])), _finite(sure[name][n])) for name, c in chosen.items()},
            {pair: _finite(d[n]) for pair, d in apart.items()},
        )
        for n, token in enumerate(tokens)
    ]


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _same(step: Step, pair: str) -> bool:
    left, right = pair.split("-")
    return step.choices[left].token == step.choices[right].token


def _unexplained(steps: Sequence[Step], lazy: Rounding, dtype: str) -> str:
    """What is wrong at the first position where the twins differ by more than rounding; "" if nothing is."""
    for s in steps:
        if s.divergence["jax-torch"] is None:
            return f"position {s.position}: not finite"
        if not _same(s, "jax-torch"):
            exact = limit("logits", dtype)
            explained = 2 * (lazy.limit.max if exact is None else exact * float(np.abs(lazy.truth).max()))
            row = lazy.truth[s.position]
            gap = abs(float(row[s.choices["jax"].token] - row[s.choices["torch"].token]))
            if not gap <= explained:
                return (
                    f"position {s.position}: float64 puts the two choices {gap:.1e} apart; "
                    f"rounding explains {explained:.1e}"
                )
    return ""
