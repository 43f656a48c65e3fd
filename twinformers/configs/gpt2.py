"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners")."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from twinformers.configs.base import Config, Rate
from twinformers.errors import ConfigError

#: Our names, by those that config.json has: transformers reads both.
SPELLINGS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
}
ACTIVATIONS = ("gelu_new", "gelu", "gelu_pytorch_tanh", "relu", "silu", "swish")
#: What is said of the classification heads, of pre-training and of generation.
IGNORED = frozenset(
    {
        "n_ctx",
        "resid_pdrop",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
    }
)


@dataclass(frozen=True, kw_only=True)
class GPT2Config(Config):
    """Hyper-parameters of one GPT-2 model; the names are Hugging Face's.

    `max_position_embeddings` is the number of learned positions: there is no later one. `gelu_new` is GELU by
    the hyperbolic tangent (Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2), plain `gelu` the exact one.
    """

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # N
    max_position_embeddings: int  # P
    layer_norm_epsilon: float
    activation_function: str
    embd_pdrop: Rate
    attn_pdrop: Rate
    resid_pdrop: Rate
    tie_word_embeddings: bool

    architecture: ClassVar[str] = "gpt2"
    model_class: ClassVar[str] = "GPT2"
    hf_class: ClassVar[str] = "GPT2LMHeadModel"
    hf_model_type: ClassVar[str] = "gpt2"
    hf_base: ClassVar[str] = "transformer"

    # transformers' documented defaults.
    HF_DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 50257,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "tie_word_embeddings": True,
    }
    SIZES: ClassVar[Mapping[str, int]] = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
    HF_FIXED: ClassVar[Mapping[str, Any]] = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,  # how float16 is trained; the twins' softmax is wide anyway
        "add_cross_attention": False,
    }
    GGUF_FIELDS: ClassVar[Mapping[str, str]] = {
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "block_count": "num_hidden_layers",
        "attention.head_count": "num_attention_heads",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    }

    def validate(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                "the hidden size cannot be shared out evenly over the heads",
                where="n_embd",
                expected=f"a multiple of n_head = {self.num_attention_heads}",
                found=str(self.hidden_size),
            )
        if self.activation_function not in ACTIVATIONS:
            raise ConfigError(
                "the configuration asks for what is not implemented",
                where="activation_function",
                expected=f"one of {', '.join(ACTIVATIONS)}",
                found=repr(self.activation_function)[:200],
            )

    @property
    def num_key_value_heads(self) -> int:
        """K, as many as there are query heads."""
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """H = D / N."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def hf_values(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The sizes, under either name; where a file has both they must agree."""
        found: dict[str, Any] = {}
        for theirs, ours in SPELLINGS.items():
            given = [raw[name] for name in (theirs, ours) if raw.get(name) is not None]
            if len(given) == 2 and given[0] != given[1]:
                raise ConfigError(
                    "two names of one field disagree",
                    where=f"{theirs}, {ours}",
                    found=f"{given[0]}, {given[1]}",
                )
            found[ours] = given[0] if given else cls.SIZES.get(theirs)
        if found["intermediate_size"] is None:
            width = found["hidden_size"]
            found["intermediate_size"] = 4 * width if isinstance(width, int) else width
        return found

    @classmethod
    def hf_extra_fields(cls) -> frozenset[str]:
        return IGNORED | SPELLINGS.keys()

    def to_hf(self) -> dict[str, Any]:
        raw = super().to_hf()
        return {**{k: v for k, v in raw.items() if k not in SPELLINGS.values()}} | {
            theirs: raw[ours] for theirs, ours in SPELLINGS.items()
        }

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, Any],
        read: Callable[[str], Any],
        where: str,
    ) -> GPT2Config:
        """GGUF's `gpt2.*` keys. The activation is llama.cpp's one, and dropout transformers' default."""
        values = {}
        for key, name in cls.GGUF_FIELDS.items():
            if (value := metadata.get(f"gpt2.{key}")) is None:
                raise ConfigError("a metadata key is missing", where=f"{where}: gpt2.{key}")
            values[name] = value
        if "token_embd.weight" not in tensors:
            raise ConfigError("a tensor is missing", where=f"{where}: token_embd.weight")
        rest = {name: value for name, value in cls.HF_DEFAULTS.items() if name not in values}
        vocabulary = tensors["token_embd.weight"].shape[0]
        return cls(**{**rest, **values, "vocab_size": vocabulary})

    def to_gguf(self) -> dict[str, Any]:
        """GGUF's `gpt2.*` keys. Raises ConfigError for what llama.cpp's GPT-2 does not compute."""
        for name, only in (("activation_function", "gelu_new"), ("tie_word_embeddings", True)):
            if (found := getattr(self, name)) != only:
                raise ConfigError(
                    "GGUF cannot express this GPT-2",
                    where=name,
                    expected=repr(only),
                    found=repr(found),
                    hint="write another format",
                )
        return {**super().to_gguf(), "gpt2.vocab_size": self.vocab_size}


def _preset(d: int, layers: int, heads: int, **changes: Any) -> GPT2Config:
    values: dict[str, Any] = {
        "vocab_size": 50257,
        "hidden_size": d,
        "intermediate_size": 4 * d,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 1024,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "tie_word_embeddings": True,
    }
    return GPT2Config(**{**values, **changes})


#: Released models, from their published config.json, and `gpt2-tiny`, in which no two dimensions agree.
PRESETS: dict[str, GPT2Config] = {
    "gpt2": _preset(768, 12, 12),
    "gpt2-medium": _preset(1024, 24, 16),
    "gpt2-large": _preset(1280, 36, 20),
    "gpt2-xl": _preset(1600, 48, 25),
    "distilgpt2": _preset(768, 6, 12),
    "gpt2-tiny": _preset(
        50, 3, 5, vocab_size=251, intermediate_size=88, max_position_embeddings=512, layer_norm_epsilon=2e-5
    ),
}
