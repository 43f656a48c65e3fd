"""Rotary frequencies: arithmetic on the configuration alone, done once in Python's float64.

Both frameworks multiply positions by these very numbers, so a difference between the twins never comes
from two ways to compute a power.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from twinformers.configs.base import check_type
from twinformers.errors import ConfigError

ROPE_TYPES = ("linear", "llama3")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for longer contexts.

    `linear` (Chen et al. 2023, arXiv:2306.15595) divides every frequency by `factor`. `llama3` (Llama 3.1,
    arXiv:2407.21783) divides only wavelengths longer than `original_max_position_embeddings /
    low_freq_factor`, keeps those shorter than `original_max_position_embeddings / high_freq_factor`, and
    interpolates between. The three last fields belong to `llama3` and are None for `linear`.
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self):
        where = "rope_scaling"
        if self.rope_type not in ROPE_TYPES:
            raise ConfigError(
                "unknown rotary scaling type",
                where=f"{where}.rope_type",
                expected=f"'default' or one of {', '.join(map(repr, ROPE_TYPES))}",
                found=repr(self.rope_type),
                hint="this scaling is not implemented; the model would compute wrong angles without it",
            )
        needed = ("factor",) + (
            ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            if self.rope_type == "llama3"
            else ()
        )
        for name in needed:
            kind = int if name == "original_max_position_embeddings" else float
            value = check_type(f"{where}.{name}", getattr(self, name), kind)
            object.__setattr__(self, name, value)  # frozen for everybody else
        if self.rope_type == "llama3" and not self.low_freq_factor < self.high_freq_factor:  # type: ignore[operator]
            raise ConfigError(
                "the bands of llama3 scaling are empty",
                where=where,
                expected="low_freq_factor < high_freq_factor",
                found=f"{self.low_freq_factor} and {self.high_freq_factor}",
            )

    def to_dict(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if value is not None}


def rotary_frequencies(head_dim: int, rope_theta: float, scaling: RopeScaling | None) -> tuple[float, ...]:
    """The head_dim/2 frequencies in radians per position (Su et al. 2021, arXiv:2104.09864, eq. 15)."""
    frequencies = [rope_theta ** (-2 * j / head_dim) for j in range(head_dim // 2)]
    if scaling is None:
        return tuple(frequencies)
    if scaling.rope_type == "linear":
        return tuple(f / scaling.factor for f in frequencies)
    low, high, original = (
        scaling.low_freq_factor,
        scaling.high_freq_factor,
        scaling.original_max_position_embeddings,
    )
    assert low is not None and high is not None and original is not None  # validated above
    scaled = []
    for f in frequencies:
        turns = original * f / (2 * math.pi)  # how often this pair turns within the original context
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        scaled.append(keep * f + (1 - keep) * f / scaling.factor)
    return tuple(scaled)


def read_rope(raw: Mapping[str, Any], default_theta: float, default_length: int) -> dict[str, Any]:
    """Theta and scaling in config.json: `rope_parameters` since transformers 5, two separate fields before.

    Where a file has both, transformers reads the old field, and so does this. The defaults are those of the
    architecture, the length that of `max_position_embeddings`. ConfigError for what is not implemented.
    """
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(field) or {}
    if not isinstance(rope, Mapping):
        raise ConfigError("bad value", where=field, expected="an object", found=repr(rope)[:200])
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    fields = RopeScaling.__dataclass_fields__
    unknown = sorted(rope.keys() - fields.keys() - {"type", "rope_theta", "partial_rotary_factor"})
    if kind in ("default", *ROPE_TYPES) and unknown:
        raise ConfigError(
            "the configuration asks for what is not implemented",
            where=f"{field}.{unknown[0]}",
            found=repr(rope[unknown[0]])[:200],
        )
    scaling = None
    if kind != "default":
        given = {k: v for k, v in rope.items() if k in fields and v is not None}
        if kind == "llama3":
            length = raw.get("max_position_embeddings") or default_length
            given.setdefault("original_max_position_embeddings", length)
        scaling = RopeScaling(**{"factor": None, **given, "rope_type": kind})
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ConfigError(
            "the configuration asks for what is not implemented",
            where="partial_rotary_factor",
            expected="1.0",
            found=repr(partial)[:200],
        )
    return {"rope_theta": default_theta if theta is None else theta, "rope_scaling": scaling}


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Both spellings: transformers 5 reads `rope_parameters`, everything older the two separate fields."""
    fields = scaling.to_dict() if scaling else None
    return {
        "rope_scaling": fields,
        "rope_parameters": {**(fields or {"rope_type": "default"}), "rope_theta": theta},
    }
