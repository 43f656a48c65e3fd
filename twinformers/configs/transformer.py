"""The original Transformer (Vaswani et al. 2017, arXiv:1706.03762), as published and as released.

Three kinds of files spell it: the twins' own ("transformer", the paper's layout), Marian's and FSMT's. What
they fix without writing it down, and what they call things, stands in the table `SPELLINGS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from twinformers.configs.base import Config, Rate, TokenId
from twinformers.errors import ConfigError

ACTIVATIONS = ("relu", "swish", "silu", "gelu")
#: Which tables are one: (source and target embedding, target embedding and output projection).
ALL_SHARED, INPUT_SHARED, OUTPUT_SHARED, NONE_SHARED = (
    (True, True),
    (True, False),
    (False, True),
    (False, False),
)


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """How one family of files writes this configuration, by the `model_type` in its config.json.

    `positions` is the layout of the sinusoids: "interleaved" as in the paper, "halves" with all sines first,
    "fairseq" with halves, frequencies that end at 1/10000 exactly, and positions counted from the padding
    token's id + 1. `names` are config.json's names where ours differ, `defaults` what it may omit. `absent`
    says why transformers has no class.
    """

    hf_class: str | None
    positions: str
    final_logits_bias: bool
    sharing: tuple[tuple[bool, bool], ...]
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    absent: str = ""


# transformers' documented defaults, as far as its two families agree.
COMMON_DEFAULTS = {
    "d_model": 1024,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "decoder_ffn_dim": 4096,
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "max_position_embeddings": 1024,
}
SPELLINGS: dict[str, Spelling] = {
    "transformer": Spelling(
        hf_class=None,
        positions="interleaved",
        final_logits_bias=False,
        sharing=(ALL_SHARED, INPUT_SHARED, OUTPUT_SHARED, NONE_SHARED),
        absent="transformers has no class for the paper's own layout: its sinusoids alternate, those of "
        "MarianMTModel and FSMT do not; write torch or jax instead",
    ),
    "marian": Spelling(
        hf_class="MarianMTModel",
        positions="halves",
        final_logits_bias=True,
        sharing=(ALL_SHARED, OUTPUT_SHARED, NONE_SHARED),
        names={
            "source_vocab_size": "vocab_size",
            "target_vocab_size": "decoder_vocab_size",
            "share_embeddings": "share_encoder_decoder_embeddings",
        },
        defaults={
            **COMMON_DEFAULTS,
            "vocab_size": 58101,
            "decoder_vocab_size": None,  # as many as the source has
            "activation_function": "gelu",
            "scale_embedding": False,
            "share_encoder_decoder_embeddings": True,
            "tie_word_embeddings": True,
            "pad_token_id": 58100,
            "eos_token_id": 0,
            "decoder_start_token_id": 58100,
        },
    ),
    "fsmt": Spelling(
        hf_class="FSMTForConditionalGeneration",
        positions="fairseq",
        final_logits_bias=False,
        sharing=(ALL_SHARED, NONE_SHARED),
        names={
            "source_vocab_size": "src_vocab_size",
            "target_vocab_size": "tgt_vocab_size",
            "share_embeddings": "tie_word_embeddings",  # one field ties all three tables
        },
        defaults={
            **COMMON_DEFAULTS,
            "src_vocab_size": 42024,
            "tgt_vocab_size": 42024,
            "activation_function": "relu",
            "scale_embedding": True,
            "tie_word_embeddings": False,
            "pad_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
        },
    ),
}

#: Training, generation and what old versions of transformers wrote: no forward pass depends on it.
NEUTRAL = frozenset(
    {
        "_num_labels",
        "add_bias_logits",
        "bad_words_ids",
        "classif_dropout",
        "classifier_dropout",
        "decoder",
        "decoder_layerdrop",
        "early_stopping",
        "encoder_layerdrop",
        "extra_pos_embeddings",
        "finetuning_task",
        "force_bos_token_to_be_generated",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "init_std",
        "langs",
        "length_penalty",
        "max_length",
        "num_beams",
        "num_hidden_layers",
        "output_past",
        "prefix",
        "task_specific_params",
    }
)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Config):
    """Hyper-parameters of one Transformer; the names are Hugging Face's where it has one name for it.

    `model_type` is a key of `SPELLINGS` and determines layout of the positions and bias of the logits.
    `share_embeddings` makes one table of source and target embedding, `tie_word_embeddings` one of target
    embedding and output projection. `max_position_embeddings` enters no computation.
    """

    model_type: str
    source_vocab_size: int
    target_vocab_size: int  # V
    d_model: int  # D
    encoder_layers: int
    decoder_layers: int  # L
    encoder_attention_heads: int  # N
    decoder_attention_heads: int  # N
    encoder_ffn_dim: int  # F
    decoder_ffn_dim: int  # F
    activation_function: str
    dropout: Rate
    attention_dropout: Rate
    activation_dropout: Rate
    scale_embedding: bool
    share_embeddings: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    pad_token_id: TokenId
    eos_token_id: TokenId
    decoder_start_token_id: TokenId

    architecture: ClassVar[str] = "transformer"
    model_class: ClassVar[str] = "Transformer"
    kind: ClassVar[str] = "encoder-decoder"
    # The paper does not state it; every released checkpoint has this one, and no file writes it down.
    layer_norm_eps: ClassVar[float] = 1e-5
    HF_FIXED: ClassVar[Mapping[str, Any]] = {
        "add_final_layer_norm": False,
        "do_blenderbot_90_layernorm": False,
        "normalize_before": False,
        "normalize_embedding": False,
        "static_position_embeddings": True,
    }

    def validate(self) -> None:
        spelling = SPELLINGS.get(self.model_type)
        vocabulary = min(self.source_vocab_size, self.target_vocab_size)
        sharing = (self.share_embeddings, self.tie_word_embeddings)
        for name, ok, expected in (
            ("model_type", spelling is not None, f"one of {', '.join(SPELLINGS)}"),
            (
                "d_model",
                self.d_model % 2 == 0 and self.d_model > 2,
                "an even number above 2, for the sinusoids",
            ),
            (
                "encoder_attention_heads",
                self.d_model % self.encoder_attention_heads == 0,
                "a divisor of d_model",
            ),
            (
                "decoder_attention_heads",
                self.d_model % self.decoder_attention_heads == 0,
                "a divisor of d_model",
            ),
            (
                "activation_function",
                self.activation_function in ACTIVATIONS,
                f"one of {', '.join(ACTIVATIONS)}; no other is implemented",
            ),
            (
                "share_embeddings",
                spelling is None or sharing in spelling.sharing,
                f"with tie_word_embeddings {self.tie_word_embeddings}, a sharing of tables that "
                f"{self.model_type} has: {spelling.sharing if spelling else ''}",
            ),
            (
                "target_vocab_size",
                not self.share_embeddings or self.source_vocab_size == self.target_vocab_size,
                f"source_vocab_size = {self.source_vocab_size}, since both share one table",
            ),
            (
                "pad_token_id",
                self.pad_token_id < vocabulary,
                f"a token of both vocabularies, below {vocabulary}",
            ),
            (
                "eos_token_id",
                self.eos_token_id < vocabulary,
                f"a token of both vocabularies, below {vocabulary}",
            ),
            (
                "decoder_start_token_id",
                self.decoder_start_token_id < self.target_vocab_size,
                f"a target token, below {self.target_vocab_size}",
            ),
        ):
            if not ok:
                raise ConfigError("bad value", where=name, expected=expected, found=repr(getattr(self, name)))

    @property
    def final_logits_bias(self) -> bool:
        """Whether a fixed vector is added to the logits."""
        return SPELLINGS[self.model_type].final_logits_bias

    @property
    def positions_interleaved(self) -> bool:
        """Whether sines and cosines alternate; otherwise all sines come first."""
        return SPELLINGS[self.model_type].positions == "interleaved"

    @property
    def position_offset(self) -> int:
        """The number that stands for position 0."""
        return self.pad_token_id + 1 if SPELLINGS[self.model_type].positions == "fairseq" else 0

    @property
    def position_frequencies(self) -> tuple[float, ...]:
        """Radians per position of each of the d_model/2 pairs, from 1 to (nearly) 1/10000 (section 3.5)."""
        half = self.d_model // 2
        steps = half - 1 if SPELLINGS[self.model_type].positions == "fairseq" else half
        return tuple(10000.0 ** (-j / steps) for j in range(half))

    @classmethod
    def hf_classes(cls) -> Mapping[str, str | None]:
        return {model_type: spelling.hf_class for model_type, spelling in SPELLINGS.items()}

    @property
    def hf_class(self) -> str | None:  # type: ignore[override]
        """transformers' class; None for the paper's own layout, which has none there."""
        return SPELLINGS[self.model_type].hf_class

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], where: str = "config.json") -> TransformerConfig:
        """Read config.json in any of the spellings; see `Config.from_hf`."""
        spelling = SPELLINGS.get(str(raw.get("model_type")), SPELLINGS["transformer"])  # validated below
        written = {**spelling.defaults, **{name: value for name, value in raw.items() if value is not None}}
        names = {f.name: spelling.names.get(f.name, f.name) for f in dataclasses.fields(cls)}
        ours = {name: value for name, value in written.items() if name not in spelling.names.values()}
        ours |= {name: written[theirs] for name, theirs in names.items() if theirs in written}
        if ours.get("target_vocab_size", 0) is None:
            ours["target_vocab_size"] = ours["source_vocab_size"]
        try:
            return super().from_hf(ours, where)
        except ConfigError as error:  # it names our field: name the file's
            name = error.where.removeprefix(f"{where}: ")
            raise ConfigError(
                error.problem,
                where=f"{where}: {names.get(name, name)}",
                expected=error.expected,
                found=error.found,
                hint=error.hint,
            ) from None

    @classmethod
    def hf_extra_fields(cls) -> frozenset[str]:
        return NEUTRAL

    def to_hf(self) -> dict[str, Any]:
        spelling = SPELLINGS[self.model_type]
        written = {spelling.names.get(name, name): value for name, value in self.to_dict().items()}
        architectures = [spelling.hf_class] if spelling.hf_class else []
        return {"architectures": architectures, "is_encoder_decoder": True, **written}


def _paper(tokens: int, d: int, f: int, heads: int, dropout: float) -> TransformerConfig:
    """Table 3 of the paper, with its one vocabulary for both languages."""
    return TransformerConfig(
        model_type="transformer",
        source_vocab_size=tokens,
        target_vocab_size=tokens,
        d_model=d,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=f,
        decoder_ffn_dim=f,
        activation_function="relu",
        dropout=dropout,
        attention_dropout=0.0,
        activation_dropout=0.0,
        scale_embedding=True,
        share_embeddings=True,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )


#: The paper's two models, a released one from its published config.json, and `transformer-tiny`, in which no
#: two dimensions agree.
PRESETS: dict[str, TransformerConfig] = {
    "transformer-base": _paper(37000, 512, 2048, 8, 0.1),
    "transformer-big": _paper(37000, 1024, 4096, 16, 0.3),
    "opus-mt-en-de": _paper(58101, 512, 2048, 8, 0.1).replace(
        model_type="marian",
        activation_function="swish",
        max_position_embeddings=512,
        pad_token_id=58100,
        eos_token_id=0,
        decoder_start_token_id=58100,
    ),
    # For `twinformers train`; its numbers never repeat, so there is nothing for dropout to prevent.
    "transformer-numbers": _paper(256, 128, 512, 4, 0.0).replace(
        encoder_layers=2, decoder_layers=2, decoder_start_token_id=2
    ),
    "transformer-tiny": _paper(89, 24, 40, 4, 0.1).replace(
        encoder_layers=2,
        decoder_layers=3,
        decoder_attention_heads=6,
        decoder_ffn_dim=56,
        decoder_start_token_id=2,
    ),
}
