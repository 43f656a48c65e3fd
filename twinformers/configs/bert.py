"""BERT (Devlin et al. 2018, arXiv:1810.04805), with the parts that a file has of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from twinformers.configs.base import Config, Rate
from twinformers.errors import ConfigError

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish")
#: Which parts transformers' classes have beside the encoder: the masked-language-model head and the pooler.
PARTS = {
    "BertModel": (False, True),
    "BertForMaskedLM": (True, False),
    "BertForPreTraining": (True, True),
}
#: BertModel without its pooler: not a field of transformers' configuration, but an argument of that class.
NO_POOLER = "add_pooling_layer"


@dataclass(frozen=True, kw_only=True)
class BertConfig(Config):
    """Hyper-parameters of one BERT; the names are Hugging Face's, but for the last two.

    `masked_lm_head` says whether the model ends in logits or in hidden states, `pooler` whether the first
    token's is made a vector for the whole. A model with both has been pre-trained and says, too, whether its
    second segment follows the first (section 3.1).
    """

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # N
    max_position_embeddings: int  # P
    type_vocab_size: int  # U, the segments that a text may have
    hidden_act: str
    layer_norm_eps: float
    hidden_dropout_prob: Rate
    attention_probs_dropout_prob: Rate
    masked_lm_head: bool
    pooler: bool

    architecture: ClassVar[str] = "bert"
    model_class: ClassVar[str] = "Bert"
    hf_model_type: ClassVar[str] = "bert"
    kind: ClassVar[str] = "encoder"

    # transformers' documented defaults.
    HF_DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 30522,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    }
    HF_FIXED: ClassVar[Mapping[str, Any]] = {
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }

    def validate(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                "the hidden size cannot be shared out evenly over the heads",
                where="hidden_size",
                expected=f"a multiple of num_attention_heads = {self.num_attention_heads}",
                found=str(self.hidden_size),
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ConfigError(
                "the configuration asks for what is not implemented",
                where="hidden_act",
                expected=f"one of {', '.join(ACTIVATIONS)}",
                found=repr(self.hidden_act)[:200],
            )

    @property
    def head_dim(self) -> int:
        """H = D / N."""
        return self.hidden_size // self.num_attention_heads

    @property
    def next_sentence_head(self) -> bool:
        """Whether the model was pre-trained with both tasks and has kept the second one's head, too."""
        return self.masked_lm_head and self.pooler

    @property
    def tie_word_embeddings(self) -> bool:
        """The head's matrix is the table of tokens; its bias is its own."""
        return self.masked_lm_head

    @property
    def hf_class(self) -> str:  # type: ignore[override]
        """The class of transformers that has these parts."""
        parts = (self.masked_lm_head, self.pooler)
        return next((name for name, has in PARTS.items() if has == parts), "BertModel")

    @property
    def hf_base(self) -> str:  # type: ignore[override]
        """Below a head, the encoder has a name; BertModel is the encoder."""
        return "bert" if self.masked_lm_head else ""

    @property
    def hf_options(self) -> Mapping[str, Any]:  # type: ignore[override]
        return {} if self.masked_lm_head or self.pooler else {NO_POOLER: False}

    @classmethod
    def hf_classes(cls) -> Mapping[str, str | None]:
        return {cls.hf_model_type: "BertForPreTraining"}

    @classmethod
    def hf_values(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The parts, by the class that wrote the file; `fitted` has the last word where a file is at hand."""
        given = raw.get("architectures") or ["BertModel"]
        name = given[0] if isinstance(given, list) else given
        if name not in PARTS:
            raise ConfigError(
                "this head is not implemented",
                where="architectures",
                expected=f"one of {', '.join(PARTS)}",
                found=repr(name)[:200],
            )
        head, pooler = PARTS[name]
        return {"masked_lm_head": head, "pooler": pooler and raw.get(NO_POOLER) is not False}

    @classmethod
    def hf_extra_fields(cls) -> frozenset[str]:
        return frozenset({NO_POOLER, "classifier_dropout", "gradient_checkpointing"})

    def to_hf(self) -> dict[str, Any]:
        raw = super().to_hf()
        return {k: v for k, v in raw.items() if k not in ("masked_lm_head", "pooler")} | dict(self.hf_options)

    def fitted(self, names: Collection[str]) -> BertConfig:
        """With the parts that there are tensors of: files hold more than the class in config.json needs."""
        dotted = [name.replace("/", ".").removeprefix("bert.") for name in names]  # "/" as in Flax's files
        return self.replace(
            masked_lm_head=any(name.startswith(("cls.predictions.", "head.")) for name in dotted),
            pooler=any(name.startswith("pooler.") for name in dotted),
        )

    def hf_name(self, stored: str) -> str:
        """What transformers calls a tensor: early files have TensorFlow's names of a norm's two vectors."""
        for old, new in ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")):
            stored = stored.removesuffix(old) + new if stored.endswith(old) else stored
        return stored if self.masked_lm_head else stored.removeprefix("bert.")


def _preset(d: int, layers: int, heads: int, **changes: Any) -> BertConfig:
    values = {
        **BertConfig.HF_DEFAULTS,
        "hidden_size": d,
        "intermediate_size": 4 * d,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "masked_lm_head": True,
        "pooler": True,
    }
    return BertConfig(**{**values, **changes})


#: Released models, from their published config.json, and `bert-tiny`, in which no two dimensions agree.
PRESETS: dict[str, BertConfig] = {
    "bert-base-uncased": _preset(768, 12, 12),
    "bert-large-uncased": _preset(1024, 24, 16),
    "minilm-l6": _preset(384, 6, 12, masked_lm_head=False),
    "minilm-l12": _preset(384, 12, 12, masked_lm_head=False),
    "bert-tiny": _preset(
        40,
        3,
        5,
        vocab_size=251,
        intermediate_size=88,
        max_position_embeddings=340,
        type_vocab_size=4,
        layer_norm_eps=2e-5,
    ),
}
