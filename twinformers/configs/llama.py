"""LLaMA (Touvron et al. 2023, arXiv:2302.13971 and 2307.09288) and all that Hugging Face calls `llama`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from twinformers.configs._rope import RopeScaling, rotary_frequencies
from twinformers.configs.base import Config
from twinformers.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(Config):
    """Hyper-parameters of one LLaMA model; the names are Hugging Face's.

    `num_key_value_heads` equal to `num_attention_heads` is multi-head attention, 1 is multi-query, and
    what lies between is grouped-query. `head_dim` need not be hidden_size / num_attention_heads.
    `max_position_embeddings` is the longest sequence the model was made for; it enters no computation.
    """

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # N
    num_key_value_heads: int  # K
    head_dim: int  # H
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool

    architecture: ClassVar[str] = "llama"
    model_class: ClassVar[str] = "Llama"
    hf_class: ClassVar[str] = "LlamaForCausalLM"
    hf_model_type: ClassVar[str] = "llama"

    # transformers' documented defaults, in the order in which later ones may use earlier ones.
    HF_DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": lambda c: c["num_attention_heads"],
        "head_dim": lambda c: _divide(c["hidden_size"], c["num_attention_heads"]),
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    ROPE_THETA_DEFAULT: ClassVar[float] = 10000.0
    HF_FIXED: ClassVar[Mapping[str, Any]] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rope_interleaved": False,
    }

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

    @property
    def rotary_frequencies(self) -> tuple[float, ...]:
        """Radians per position of each of the head_dim/2 pairs."""
        return rotary_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)

    @classmethod
    def hf_values(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Theta and scaling: `rope_parameters` since transformers 5, two separate fields before."""
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise ConfigError(
                "bad value", where="rope_parameters", expected="an object", found=repr(rope)[:200]
            )
        theta = rope.get("rope_theta", raw.get("rope_theta"))
        kind = rope.get("rope_type", rope.get("type", "default"))
        scaling = None
        if kind != "default":
            fields = RopeScaling.__dataclass_fields__
            given = {k: v for k, v in rope.items() if k in fields and v is not None}
            unknown = sorted(rope.keys() - fields.keys() - {"type", "rope_theta"})
            if kind in ("linear", "llama3") and unknown:
                raise ConfigError(
                    "the configuration asks for what is not implemented",
                    where=f"rope_scaling.{unknown[0]}",
                    found=repr(rope[unknown[0]]),
                )
            scaling = RopeScaling(**{"factor": None, **given, "rope_type": kind})
        if (partial := rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))) not in (
            None,
            1,
            1.0,
        ):
            raise ConfigError(
                "the configuration asks for what is not implemented",
                where="partial_rotary_factor",
                expected="1.0",
                found=repr(partial),
            )
        return {"rope_theta": cls.ROPE_THETA_DEFAULT if theta is None else theta, "rope_scaling": scaling}

    @classmethod
    def hf_extra_fields(cls) -> frozenset[str]:
        return frozenset({"rope_parameters", "partial_rotary_factor"})

    def to_hf(self) -> dict[str, Any]:
        raw = super().to_hf()
        del raw["rope_interleaved"]  # a field of one family of files, not of transformers' configuration
        scaling = self.rope_scaling.to_dict() if self.rope_scaling else None
        # Both spellings: transformers 5 reads `rope_parameters`, everything older the two separate fields.
        raw["rope_scaling"] = scaling
        raw["rope_parameters"] = {**(scaling or {"rope_type": "default"}), "rope_theta": self.rope_theta}
        return raw

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, Any],
        read: Callable[[str], Any],
        where: str,
    ) -> LlamaConfig:
        """GGUF's `llama.*` keys. Epsilon and theta are float32 there and are kept verbatim."""

        def get(key: str, default: Any = None) -> Any:
            value = metadata.get(f"llama.{key}", default)
            if value is None:
                raise ConfigError("a metadata key is missing", where=f"{where}: llama.{key}")
            return value

        if "token_embd.weight" not in tensors:
            raise ConfigError("a tensor is missing", where=f"{where}: token_embd.weight")
        if metadata.get("llama.expert_count"):
            raise ConfigError(
                "the file asks for what is not implemented",
                where=f"{where}: llama.expert_count",
                expected="no experts",
                found=str(metadata["llama.expert_count"]),
            )
        heads, hidden = get("attention.head_count"), get("embedding_length")
        scaling = None
        match get("rope.scaling.type", "none"):
            case "none":
                if "llama.rope.scale_linear" in metadata and metadata["llama.rope.scale_linear"] != 1.0:
                    scaling = RopeScaling(rope_type="linear", factor=metadata["llama.rope.scale_linear"])
            case kind:
                scaling = RopeScaling(rope_type=kind, factor=get("rope.scaling.factor"))
        values = dict(
            vocab_size=tensors["token_embd.weight"].shape[0],
            hidden_size=hidden,
            intermediate_size=get("feed_forward_length"),
            num_hidden_layers=get("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=get("attention.head_count_kv", heads),
            head_dim=get("attention.key_length", _divide(hidden, heads)),
            rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
            rope_theta=get("rope.freq_base", cls.ROPE_THETA_DEFAULT),
            rope_scaling=scaling,
            max_position_embeddings=get("context_length"),
            tie_word_embeddings="output.weight" not in tensors,
        )
        turned = get("rope.dimension_count", values["head_dim"])
        if turned != values["head_dim"]:
            raise ConfigError(
                "only a part of each head would be rotated",
                where=f"{where}: llama.rope.dimension_count",
                expected=str(values["head_dim"]),
                found=str(turned),
            )
        if "rope_freqs.weight" in tensors:
            values["rope_scaling"] = _llama3_scaling(values, read("rope_freqs.weight"), where)
        return cls(**values)


def _divide(hidden: Any, heads: Any) -> int:
    """The head dimension that an omitted `head_dim` means; leaves nonsense for the validation to name."""
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads > 0):
        return hidden
    return hidden // heads


def _llama3_scaling(values: dict[str, Any], divisors: Any, where: str) -> RopeScaling:
    """GGUF stores Llama 3.1's scaling as the divisors it amounts to: find the parameters that give them.

    Every released model has bands of 1 and 4 on 8192 positions; only the factor differs. Anything else is
    refused, since a wrong guess would shift the angles silently.
    """
    scaling = RopeScaling(
        rope_type="llama3",
        factor=float(max(divisors)),
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    head_dim, theta = values["head_dim"], values["rope_theta"]
    plain = rotary_frequencies(head_dim, theta, None)
    scaled = rotary_frequencies(head_dim, theta, scaling)
    worst = max(
        (abs(d * s / p - 1.0) for d, s, p in zip(map(float, divisors), scaled, plain, strict=False)),
        default=1.0,
    )
    if len(divisors) != len(plain) or worst > 1e-5:  # the divisors are float32, computed in float32
        raise ConfigError(
            "the rotary divisors are not those of a released Llama 3 model",
            where=f"{where}: rope_freqs.weight",
            expected=f"{len(plain)} divisors of llama3 scaling with bands 1 and 4 on 8192 positions",
            found=f"{len(divisors)} divisors, off by up to {worst:.1e}",
        )
    return scaling


def _llama3(factor: float) -> RopeScaling:
    return RopeScaling(
        rope_type="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


def _preset(
    v: int,
    d: int,
    f: int,
    layers: int,
    heads: int,
    kv: int,
    *,
    head_dim: int | None = None,
    theta: float,
    length: int,
    scaling: RopeScaling | None = None,
    tied: bool = False,
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=v,
        hidden_size=d,
        intermediate_size=f,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=head_dim or d // heads,
        rms_norm_eps=1e-5,
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=length,
        tie_word_embeddings=tied,
    )


#: Released models, from their published config.json, and `llama-tiny`, in which no two dimensions agree.
PRESETS: dict[str, LlamaConfig] = {
    "llama2-7b": _preset(32000, 4096, 11008, 32, 32, 32, theta=1e4, length=4096),
    "llama2-13b": _preset(32000, 5120, 13824, 40, 40, 40, theta=1e4, length=4096),
    "llama2-70b": _preset(32000, 8192, 28672, 80, 64, 8, theta=1e4, length=4096),
    "llama3-8b": _preset(128256, 4096, 14336, 32, 32, 8, theta=5e5, length=8192),
    "llama3-70b": _preset(128256, 8192, 28672, 80, 64, 8, theta=5e5, length=8192),
    "llama3.1-8b": _preset(128256, 4096, 14336, 32, 32, 8, theta=5e5, length=131072, scaling=_llama3(8.0)),
    "llama3.1-70b": _preset(128256, 8192, 28672, 80, 64, 8, theta=5e5, length=131072, scaling=_llama3(8.0)),
    "llama3.1-405b": _preset(
        128256, 16384, 53248, 126, 128, 8, theta=5e5, length=131072, scaling=_llama3(8.0)
    ),
    "llama3.2-1b": _preset(
        128256, 2048, 8192, 16, 32, 8, theta=5e5, length=131072, scaling=_llama3(32.0), tied=True
    ),
    "llama3.2-3b": _preset(
        128256, 3072, 8192, 28, 24, 8, theta=5e5, length=131072, scaling=_llama3(32.0), tied=True
    ),
    "tinyllama-1.1b": _preset(32000, 2048, 5632, 22, 32, 4, theta=1e4, length=2048),
    "smollm2-135m": _preset(49152, 576, 1536, 30, 9, 3, theta=1e5, length=8192, tied=True),
    "smollm2-360m": _preset(49152, 960, 2560, 32, 15, 5, theta=1e5, length=8192, tied=True),
    "smollm2-1.7b": _preset(49152, 2048, 8192, 24, 32, 32, theta=1.3e5, length=8192, tied=True),
    "llama-tiny": _preset(251, 48, 88, 3, 6, 2, head_dim=10, theta=7e4, length=1024, scaling=_llama3(8.0)),
}
