"""What every configuration has in common: frozen, complete, validated once, read strictly.

A configuration has no defaults for what defines the architecture. Hugging Face files omit fields; the
documented defaults stand in one table per architecture (`HF_DEFAULTS`), are applied here and nowhere
else, and are tested against transformers' own.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar, get_type_hints

from twinformers.errors import ConfigError

log = logging.getLogger(__name__)

#: Fields of config.json that say nothing about the mathematics of a forward pass.
NEUTRAL_FIELDS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "is_llama_config",
        "label2id",
        "license",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "tokenizer_class",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unk_token_id",
        "use_cache",
    }
)

#: A count of layers above this is a mistake or an attack: each one costs memory before any weight is read.
MAX_LAYERS = 10_000

C = TypeVar("C", bound="Config")

#: Numbers that may be 0, unlike a plain int or float: a probability below 1, and the id of a token.
Rate = Annotated[float, "from 0, below 1"]
TokenId = Annotated[int, "from 0"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of the configurations; see the subclasses for the fields.

    Class attributes that a subclass sets: `architecture` (the stem that names its files), `model_class`
    (the class in both framework's files), `hf_class` (in transformers), `HF_DEFAULTS` (what config.json
    may omit), `hf_base` (the name under which that class keeps the model below its head: files of that model
    alone lack it), `hf_options` (what that class takes besides its configuration), `HF_FIXED` (fields for
    which the code implements one value only), `GGUF_FIELDS` (the field by each of GGUF's keys, less the
    architecture's prefix), `kind` (which call contract holds: "causal", "encoder" or "encoder-decoder").
    """

    architecture: ClassVar[str]
    model_class: ClassVar[str]
    hf_class: ClassVar[str | None]
    hf_model_type: ClassVar[str]
    hf_base: ClassVar[str] = ""
    hf_options: ClassVar[Mapping[str, Any]] = {}
    kind: ClassVar[str] = "causal"
    HF_DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    HF_FIXED: ClassVar[Mapping[str, Any]] = {}
    GGUF_FIELDS: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self):
        hints = get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):
            value = check_type(field.name, getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)  # frozen for everybody else
            if field.name.endswith("layers") and value > MAX_LAYERS:
                raise ConfigError(
                    "more layers than any model has",
                    where=field.name,
                    expected=f"at most {MAX_LAYERS}",
                    found=str(value),
                )
        self.validate()

    def validate(self) -> None:
        """What the fields must satisfy together; raises ConfigError."""

    @classmethod
    def hf_classes(cls) -> Mapping[str, str | None]:
        """transformers' class by each `model_type` that config.json may give, None where it has none."""
        return {cls.hf_model_type: cls.hf_class}

    def fitted(self: C, names: Collection[str]) -> C:
        """The configuration of files with tensors of these names, where config.json leaves something open."""
        return self

    def hf_name(self, stored: str) -> str:
        """The name that transformers has today for a tensor that a file of Hugging Face's calls `stored`."""
        return stored

    def cache_slots(self, length: int) -> int:
        """How many slots a cache for `length` positions has: fewer where a window lets them be used again."""
        return length

    def longest_call(self, slots: int) -> int | None:
        """The most tokens of one call with a cache of so many slots; None for as many as it has slots."""
        return None

    def replace(self: C, **changes: Any) -> C:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_hf(cls: type[C], raw: Mapping[str, Any], where: str = "config.json") -> C:
        """Read Hugging Face's config.json, given as its dictionary.

        Raises ConfigError by field name for what is missing, of a wrong type or value, or not implemented.
        Fields that are neither known nor neutral are reported as a warning: they may matter.
        """
        try:
            for name, implemented in cls.HF_FIXED.items():
                found = raw.get(name, implemented)
                if found != implemented and found is not None:
                    raise ConfigError(
                        "the configuration asks for what is not implemented",
                        where=name,
                        expected=repr(implemented),
                        found=repr(found),
                        hint="porting without it would change the outputs, so it is refused",
                    )
            if (quantized := raw.get("quantization_config")) is not None:
                method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
                raise ConfigError(
                    "the weights are quantised",
                    where="quantization_config",
                    expected="float weights",
                    found=repr(method),
                    hint="port the original checkpoint, or a GGUF of it",
                )
            values = {
                f.name: raw[f.name]
                for f in dataclasses.fields(cls)
                if f.name in raw and (raw[f.name] is not None or f.name not in cls.HF_DEFAULTS)
            }
            for name, default in cls.HF_DEFAULTS.items():
                if name not in values:
                    values[name] = default(values) if callable(default) else default
            values.update(cls.hf_values(raw))
            for f in dataclasses.fields(cls):
                if f.name not in values:
                    raise ConfigError("a field is missing", where=f.name, expected=str(f.type))
            config = cls(**values)
        except ConfigError as error:
            raise located(error, where) from None
        known = NEUTRAL_FIELDS | cls.HF_FIXED.keys() | {f.name for f in dataclasses.fields(cls)}
        for name in sorted(raw.keys() - known - cls.hf_extra_fields()):
            log.warning("%s: field %r is not known here and has no effect", where, name)
        return config

    @classmethod
    def hf_values(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Fields whose spelling in config.json is not simply the field's name."""
        return {}

    @classmethod
    def hf_extra_fields(cls) -> frozenset[str]:
        """The names in config.json that `hf_values` reads."""
        return frozenset()

    def to_hf(self) -> dict[str, Any]:
        """The dictionary that transformers reads from config.json; `from_hf` inverts it."""
        raw = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            "architectures": [self.hf_class],
            "model_type": self.hf_model_type,
            **raw,
            **self.HF_FIXED,
        }

    @classmethod
    def from_gguf(
        cls: type[C],
        metadata: Mapping[str, Any],
        tensors: Mapping[str, Any],
        read: Callable[[str], Any],
        where: str,
    ) -> C:
        """Read the hyper-parameters from GGUF metadata. Raises ConfigError by key."""
        raise ConfigError("this architecture has no GGUF reader", where=where, found=cls.architecture)

    def to_gguf(self) -> dict[str, Any]:
        """The hyper-parameters as GGUF's metadata; `from_gguf` inverts it, but for float32's rounding.

        Raises ConfigError for an architecture or a value that GGUF does not know.
        """
        if not self.GGUF_FIELDS:
            raise ConfigError(
                "this architecture has no form in GGUF",
                where="general.architecture",
                found=self.architecture,
                hint="write another format",
            )
        return {f"{self.architecture}.{key}": getattr(self, name) for key, name in self.GGUF_FIELDS.items()}


def located(error: ConfigError, where: str) -> ConfigError:
    return ConfigError(
        error.problem,
        where=f"{where}: {error.where}" if error.where else where,
        expected=error.expected,
        found=error.found,
        hint=error.hint,
    )


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a positive number whose computations stay within float32's range."""
    # bool is an int in Python, and JSON's true is no number.
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-30 <= value <= 1e30


def check_type(name: str, value: Any, hint: Any) -> Any:
    """The value, a whole number as a float where the annotation says float.

    Raises ConfigError unless it fits the annotation: JSON's types are not Python's by accident.
    """
    if hint is int:
        # The bound keeps a hostile config.json from asking for more than any address space holds.
        ok = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**40
        expected = "a positive integer"
    elif hint is float:
        ok, expected = is_number(value), "a positive number from 1e-30 to 1e30"
    elif hint is Rate:
        ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
        expected = "a number from 0, below 1"
    elif hint is TokenId:
        ok = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40
        expected = "an integer from 0"
    elif hint is bool:
        ok, expected = isinstance(value, bool), "true or false"
    elif isinstance(hint, type):
        ok, expected = isinstance(value, hint), hint.__name__
    else:  # a union such as RopeScaling | None
        ok, expected = isinstance(value, hint), str(hint)
    if not ok:
        raise ConfigError("bad value", where=name, expected=expected, found=repr(value)[:200])
    return float(value) if hint in (float, Rate) else value
