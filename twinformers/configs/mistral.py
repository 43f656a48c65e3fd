"""Mistral 7B (Jiang et al. 2023, arXiv:2310.06825) and all that Hugging Face calls `mistral`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from twinformers.configs._rope import RopeScaling, read_rope, rotary_frequencies, write_rope
from twinformers.configs.base import Config, check_type
from twinformers.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MistralConfig(Config):
    """Hyper-parameters of one Mistral model; the names are Hugging Face's.

    A token sees a key that is less than `sliding_window` positions before it; None is no window, as in all
    releases after the first. `max_position_embeddings` is the longest sequence the model was made for; it
    enters no computation.
    """

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # N
    num_key_value_heads: int  # K
    head_dim: int  # H
    sliding_window: int | None  # W
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool

    architecture: ClassVar[str] = "mistral"
    model_class: ClassVar[str] = "Mistral"
    hf_class: ClassVar[str] = "MistralForCausalLM"
    hf_model_type: ClassVar[str] = "mistral"

    # transformers' documented defaults, in the order in which later ones may use earlier ones.
    HF_DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": lambda c: _divide(c["hidden_size"], c["num_attention_heads"]),
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    }
    ROPE_THETA_DEFAULT: ClassVar[float] = 10000.0
    #: No entry of the table above: there null would mean the default, and here it means no window.
    WINDOW_DEFAULT: ClassVar[int] = 4096
    HF_FIXED: ClassVar[Mapping[str, Any]] = {"hidden_act": "silu", "attention_dropout": 0.0}

    def validate(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                "query heads cannot be shared out evenly over the key-value heads",
                where="num_key_value_heads",
                expected=f"a divisor of num_attention_heads = {self.num_attention_heads}",
                found=str(self.num_key_value_heads),
            )
        if self.head_dim % 2:
            raise ConfigError(
                "rotary embedding turns pairs of dimensions",
                where="head_dim",
                expected="an even number",
                found=str(self.head_dim),
            )
        if self.sliding_window is not None:
            check_type("sliding_window", self.sliding_window, int)

    @property
    def rotary_frequencies(self) -> tuple[float, ...]:
        """Radians per position of each of the head_dim/2 pairs."""
        return rotary_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)

    def _ring(self) -> tuple[int, int] | None:
        """Slots of a cache that comes round, and the tokens of one call for which it is made; None without.

        Such a call overwrites only what its first token sees no more: W + tokens - 1 slots. An eighth of the
        window keeps the cache small and calls long; 64 keep them so where the window is short.
        """
        if self.sliding_window is None:
            return None
        tokens = max(64, self.sliding_window // 8)
        return self.sliding_window + tokens - 1, tokens

    def cache_slots(self, length: int) -> int:
        ring = self._ring()
        return length if ring is None else min(length, ring[0])

    def longest_call(self, slots: int) -> int | None:
        ring = self._ring()
        if ring is None or slots < ring[0]:  # made for sequences no longer than it is
            return None
        return slots - ring[0] + ring[1]

    @classmethod
    def hf_values(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Where null is no omission: no window, and as many key-value heads as query heads."""
        values = read_rope(raw, cls.ROPE_THETA_DEFAULT, cls.HF_DEFAULTS["max_position_embeddings"])
        values["sliding_window"] = raw.get("sliding_window", cls.WINDOW_DEFAULT)
        if raw.get("num_key_value_heads", 0) is None:
            heads = raw.get("num_attention_heads")
            values["num_key_value_heads"] = cls.HF_DEFAULTS["num_attention_heads"] if heads is None else heads
        return values

    @classmethod
    def hf_extra_fields(cls) -> frozenset[str]:
        return frozenset({"rope_parameters", "partial_rotary_factor"})

    def to_hf(self) -> dict[str, Any]:
        return super().to_hf() | write_rope(self.rope_theta, self.rope_scaling)


def _divide(hidden: Any, heads: Any) -> int:
    """The head dimension that an omitted `head_dim` means; leaves nonsense for the validation to name."""
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads > 0):
        return hidden
    return hidden // heads


def _released(vocab_size: int, theta: float, window: int | None) -> MistralConfig:
    return MistralConfig(
        vocab_size=vocab_size,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        sliding_window=window,
        rms_norm_eps=1e-5,
        rope_theta=theta,
        rope_scaling=None,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    )


#: Released models, from their published config.json, and `mistral-tiny`, in which no two dimensions agree and
#: whose window is shorter than any test's sequence.
PRESETS: dict[str, MistralConfig] = {
    "mistral-7b-v0.1": _released(32000, 1e4, 4096),
    "mistral-7b-v0.2": _released(32000, 1e6, None),
    "mistral-7b-v0.3": _released(32768, 1e6, None),
    "mistral-tiny": MistralConfig(
        vocab_size=241,
        hidden_size=60,
        intermediate_size=92,
        num_hidden_layers=3,
        num_attention_heads=10,
        num_key_value_heads=5,
        head_dim=14,
        sliding_window=11,
        rms_norm_eps=1e-5,
        rope_theta=7e4,
        rope_scaling=None,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    ),
}
