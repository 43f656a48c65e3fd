"""How the next token is chosen from the logits; one description for both frameworks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from twinformers.errors import UsageError

#: So many last tokens of a text are looked for in what stands before them, the longest first.
NGRAMS = (3, 2)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Temperature 0 is greedy decoding. `top_k` keeps the k most likely tokens (0: all); `top_p` then keeps
    the smallest set whose probability reaches p (Holtzman et al. 2020, arXiv:1904.09751; 1.0: all).
    `repetition_penalty` above 1 makes the tokens of prompt and output less likely before anything else is
    done (Keskar et al. 2019, arXiv:1909.05858; 1.0: none).

    The seed determines every draw, and the draws are the same in JAX and in PyTorch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, ok, expected in (
            ("temperature", 0.0 <= self.temperature < math.inf, "a number >= 0"),
            ("top_k", self.top_k >= 0, "an integer >= 0 (0 keeps all)"),
            ("top_p", 0.0 < self.top_p <= 1.0, "a number in (0, 1]"),
            ("repetition_penalty", 0.0 < self.repetition_penalty < math.inf, "a number > 0 (1 does nothing)"),
            ("seed", 0 <= self.seed < 2**32, "an integer in [0, 2^32)"),
        ):
            if not ok:
                raise UsageError("bad value", where=name, expected=expected, found=str(getattr(self, name)))


def bucket(length: int) -> int:
    """The next of 16, 32, 48, 64, 80, ... with four sizes between a power of two and the next from 64 on.

    Few shapes to compile for, whatever the lengths that come, and at most a quarter computed in vain.
    """
    step = max(16, 1 << max(0, (int(length) - 1).bit_length() - 3))
    return -(-max(int(length), 1) // step) * step


def check_prompts(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, vocab_size: int, max_positions: int
) -> None:
    """Raise UsageError for what a model cannot continue; the frameworks differ in what they do unchecked."""
    if max_new_tokens < 1:
        raise UsageError("bad value", where="max_new_tokens", expected=">= 1", found=str(max_new_tokens))
    if not prompts or not all(len(p) for p in prompts):
        raise UsageError("a prompt is empty", where="prompts", expected="at least one token in each")
    for row, prompt in enumerate(prompts):
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            bad = next(t for t in prompt if not 0 <= t < vocab_size)
            raise UsageError(
                "token outside the vocabulary",
                where=f"prompt {row}",
                expected=f"0 to {vocab_size - 1}",
                found=str(bad),
            )
    longest = max(map(len, prompts))
    if longest + max_new_tokens > max_positions:
        raise UsageError(
            "more positions than the model was made for",
            where="max_new_tokens",
            expected=f"prompt and new tokens together at most {max_positions}",
            found=f"{longest} + {max_new_tokens}",
        )


def check_guesses(guesses: int) -> None:
    """Raise UsageError for no guess at all."""
    if guesses < 1:
        raise UsageError("bad value", where="lookup", expected="one guess or more", found=str(guesses))


def check_lookup(prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    """Raise UsageError for what prompt look-up is not made for."""
    if len(prompts) != 1:  # rows would come to their ends at times of their own
        raise UsageError(
            "prompt look-up is for one sequence",
            where="lookup",
            expected="one prompt",
            found=str(len(prompts)),
        )
    if sampling.repetition_penalty != 1:  # what it does at one place depends on the token before
        raise UsageError(
            "prompt look-up knows no penalty",
            where="repetition_penalty",
            expected="1 with lookup",
            found=str(sampling.repetition_penalty),
        )
