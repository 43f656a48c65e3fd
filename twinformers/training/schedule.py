"""The paper's learning rate (Vaswani et al. 2017, arXiv:1706.03762, section 5.3), in plain floats."""

from __future__ import annotations


def learning_rate(update: int, d_model: int, warmup: int) -> float:
    """Of update 1, 2, ...: linear growth for `warmup` updates, then down with the inverse square root."""
    return d_model**-0.5 * min(update**-0.5, update * warmup**-1.5)
