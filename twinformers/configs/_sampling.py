"""How the next token is chosen from the logits; one description for both frameworks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from twinformers.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Temperature 0 is greedy decoding. `top_k` keeps the k most likely tokens (0: all); `top_p` then keeps
    the smallest set whose probability reaches p (Holtzman et al. 2020, arXiv:1904.09751; 1.0: all).

    The seed determines every draw, and the draws are the same in JAX and in PyTorch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, ok, expected in (
            ("temperature", 0.0 <= self.temperature < math.inf, "a number >= 0"),
            ("top_k", self.top_k >= 0, "an integer >= 0 (0 keeps all)"),
            ("top_p", 0.0 < self.top_p <= 1.0, "a number in (0, 1]"),
            ("seed", 0 <= self.seed < 2**32, "an integer in [0, 2^32)"),
        ):
            if not ok:
                raise UsageError("bad value", where=name, expected=expected, found=str(getattr(self, name)))
