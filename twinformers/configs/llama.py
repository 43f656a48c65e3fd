"""LLaMA (Touvron et al. 2023, arXiv:2302.13971 and 2307.09288) and all that Hugging Face calls `llama`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from twinformers.configs._rope import RopeScaling, read_rope, rotary_frequencies, write_rope
from twinformers.configs.base import Config, check_type, is_number
from twinformers.errors import ConfigError

#: The fields of Meta's params.json; the last two bound its engine's memory and say nothing about the model.
META_FIELDS = frozenset(
    {
        "dim",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "vocab_size",
        "multiple_of",
        "ffn_dim_multiplier",
        "norm_eps",
        "rope_theta",
        "use_scaled_rope",
        "max_batch_size",
        "max_seq_len",
    }
)


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
    GGUF_FIELDS: ClassVar[Mapping[str, str]] = {
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.value_length": "head_dim",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "rope.freq_base": "rope_theta",
        "rope.dimension_count": "head_dim",
    }

    def validate(self) -> None:
        if self.hidden_size % self.num_attention_heads:  # no need of ours, but transformers would not load it
            raise ConfigError(
                "the hidden size cannot be shared out evenly over the heads",
                where="hidden_size",
                expected=f"a multiple of num_attention_heads = {self.num_attention_heads}",
                found=str(self.hidden_size),
            )
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
        return read_rope(raw, cls.ROPE_THETA_DEFAULT, cls.HF_DEFAULTS["max_position_embeddings"])

    @classmethod
    def hf_extra_fields(cls) -> frozenset[str]:
        return frozenset({"rope_parameters", "partial_rotary_factor"})

    def to_hf(self) -> dict[str, Any]:
        raw = super().to_hf()
        del raw["rope_interleaved"]  # a field of one family of files, not of transformers' configuration
        return raw | write_rope(self.rope_theta, self.rope_scaling)

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
        defaults = {
            "num_key_value_heads": heads,
            "head_dim": _divide(hidden, heads),
            "rope_theta": cls.ROPE_THETA_DEFAULT,
        }
        values: dict[str, Any] = {}
        for key, name in cls.GGUF_FIELDS.items():
            value = get(key, values.get(name, defaults.get(name)))
            if values.setdefault(name, value) != value:
                raise ConfigError(
                    "the keys and values of a head, and what is rotated of it, must have one length",
                    where=f"{where}: llama.{key}",
                    expected=repr(values[name])[:200],
                    found=repr(value)[:200],
                )
        config = cls(
            **values,
            vocab_size=tensors["token_embd.weight"].shape[0],
            rope_scaling=scaling,
            tie_word_embeddings="output.weight" not in tensors,
        )  # validated before anything is computed from it
        if (divisors := tensors.get("rope_freqs.weight")) is None:
            return config
        if divisors.size != config.head_dim // 2:  # the size is known before they are read
            raise _no_llama3(config, where, f"{divisors.size} divisors")
        original = get("rope.scaling.original_context_length", _ORIGINAL)
        given = [float(d) for d in read("rope_freqs.weight").reshape(-1)]
        return config.replace(rope_scaling=_llama3_scaling(config, given, original, where))

    def to_gguf(self) -> dict[str, Any]:
        """GGUF's `llama.*` keys. Of llama3 scaling, the weight map writes the divisors that it amounts to."""
        raw = {**super().to_gguf(), "llama.vocab_size": self.vocab_size}
        if (scaling := self.rope_scaling) is None:
            return raw
        if scaling.rope_type == "linear":
            return raw | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": scaling.factor}
        original = scaling.original_max_position_embeddings
        # Refuses what it could not read back.
        _llama3_scaling(self, self.rotary_divisors, original, "rope_scaling")
        return raw | {"llama.rope.scaling.original_context_length": original}

    @property
    def rotary_divisors(self) -> tuple[float, ...]:
        """By how much scaling divides each of the head_dim/2 frequencies."""
        plain = rotary_frequencies(self.head_dim, self.rope_theta, None)
        return tuple(p / s for p, s in zip(plain, self.rotary_frequencies, strict=True))

    @classmethod
    def from_meta(cls, params: Mapping[str, Any], tensors: Mapping[str, Any], tied: bool) -> LlamaConfig:
        """Meta's params.json; the sizes of vocabulary and MLP, which it leaves open, come from the tensors.

        Raises ConfigError by field for what is missing, not implemented, or not what the tensors say.
        """

        def get(name: str, kind: type, default: Any = None) -> Any:
            value = default if params.get(name) is None else params[name]
            if value is None:
                raise ConfigError("a field is missing", where=name, expected=kind.__name__)
            check_type(name, value, kind)
            return value

        def rows(name: str) -> int:
            shape = tensors[name].shape if name in tensors else None
            if shape is None or len(shape) != 2:
                found = "no such tensor" if shape is None else str(list(shape))
                raise ConfigError("a tensor is missing", where=name, expected="a matrix", found=found)
            return shape[0]

        def agree(name: str, expected: int, found: int) -> None:
            if expected != found:
                raise ConfigError(
                    "the parameters and the tensors disagree",
                    where=name,
                    expected=str(expected),
                    found=f"{found} in the tensors",
                    hint="a rank's file is missing, or params.json belongs to another model",
                )

        if unknown := sorted(name for name in params.keys() - META_FIELDS if params[name] is not None):
            # Nothing can be passed over: quantisation, adapters, windows and images come as further fields.
            raise ConfigError(
                "the parameters ask for what is not implemented",
                where=unknown[0],
                expected=f"no other fields than {', '.join(sorted(META_FIELDS))}",
                found=repr(params[unknown[0]])[:200],
            )
        dim, heads = get("dim", int), get("n_heads", int)
        if dim % heads:
            raise ConfigError("bad value", where="n_heads", expected=f"a divisor of {dim}", found=str(heads))
        vocab = rows("tok_embeddings.weight")
        if params.get("vocab_size") != -1:  # left to the tokenizer
            agree("vocab_size", get("vocab_size", int, vocab), vocab)
        # Two thirds of 4 D, so that three matrices have as many parameters as two would have with 4 D.
        inner = int(get("ffn_dim_multiplier", float, 1.0) * (8 * dim // 3))
        unit = get("multiple_of", int)
        inner = -(-inner // unit) * unit
        agree("multiple_of, ffn_dim_multiplier", inner, rows("layers.0.feed_forward.w1.weight"))
        theta = get("rope_theta", float, cls.ROPE_THETA_DEFAULT)
        # The file says whether frequencies are scaled, not how. Llama 3.2's two small models, alone in having
        # a tied head, have 32 (for which Meta's own code takes 8, to their harm); every other has 8.
        scaling = _llama3(32.0 if tied else 8.0) if get("use_scaled_rope", bool, False) else None
        # Nor does it say for which length the model was made; Code Llama and Llama 3 show by their theta.
        length = {cls.ROPE_THETA_DEFAULT: 4096, 5e5: 8192}.get(theta, 16384)
        return cls(
            vocab_size=vocab,
            hidden_size=dim,
            intermediate_size=inner,
            num_hidden_layers=get("n_layers", int),
            num_attention_heads=heads,
            num_key_value_heads=get("n_kv_heads", int, heads),
            head_dim=dim // heads,
            rms_norm_eps=get("norm_eps", float),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=131072 if scaling else length,
            tie_word_embeddings=tied,
        )


def _divide(hidden: Any, heads: Any) -> int:
    """The head dimension that an omitted `head_dim` means; leaves nonsense for the validation to name."""
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads > 0):
        return hidden
    return hidden // heads


#: The length for which every released Llama 3 was made before its frequencies were scaled.
_ORIGINAL = 8192


def _llama3_scaling(config: LlamaConfig, given: Sequence[float], original: Any, where: str) -> RopeScaling:
    """GGUF stores Llama 3.1's scaling as the divisors it amounts to: find the parameters that give them.

    Every released model has bands of 1 and 4; only the factor differs. Anything else is refused, since a
    wrong guess would shift the angles silently.
    """
    if not all(is_number(d) for d in given):
        raise _no_llama3(config, where, "numbers beyond the range of a divisor")
    scaling = _llama3(max(given), original)
    expected = config.replace(rope_scaling=scaling).rotary_divisors
    worst = max(abs(d / e - 1.0) for d, e in zip(given, expected, strict=True))
    if worst > 1e-5:  # the divisors are float32, computed in float32
        raise _no_llama3(config, where, f"divisors that are off by up to {worst:.1e}")
    return scaling


def _no_llama3(config: LlamaConfig, where: str, found: str) -> ConfigError:
    return ConfigError(
        "the rotary divisors are not those of a Llama 3 model",
        where=f"{where}: rope_freqs.weight",
        expected=f"{config.head_dim // 2} divisors of llama3 scaling with bands 1 and 4",
        found=found,
    )


def _llama3(factor: float, original: int = _ORIGINAL) -> RopeScaling:
    return RopeScaling(
        rope_type="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=original,
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


#: Released models, from their published config.json, `llama-10m`, which anybody can train, and `llama-tiny`,
#: in which no two dimensions agree.
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
    # 10 million parameters with the vocabulary that `train text` makes by default.
    "llama-10m": _preset(4096, 320, 864, 7, 5, 5, theta=1e4, length=1024, tied=True),
    # 100 original positions put one of its five frequencies between the bands, one above and three below.
    "llama-tiny": _preset(
        251, 48, 88, 3, 6, 2, head_dim=10, theta=7e4, length=1024, scaling=_llama3(8.0, original=100)
    ),
}
