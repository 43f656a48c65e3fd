"""One frozen dataclass per architecture. Neither framework is imported here, nor numpy.

A module of this package that does not start with an underscore (and is not `base`) is an architecture;
dropping in a new file is all it takes to register one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from twinformers.configs._beams import Beams
from twinformers.configs._rope import RopeScaling, rotary_frequencies
from twinformers.configs._sampling import Sampling
from twinformers.configs.base import Config, located
from twinformers.errors import ConfigError, SourceError

__all__ = [
    "Beams",
    "Config",
    "RopeScaling",
    "Sampling",
    "architectures",
    "config_class",
    "config_from_gguf",
    "config_from_hf",
    "preset",
    "presets",
    "rotary_frequencies",
]


@cache
def architectures() -> tuple[str, ...]:
    """The stems of all architectures, sorted."""
    names = (m.name for m in pkgutil.iter_modules(__path__))
    return tuple(sorted(n for n in names if not n.startswith("_") and n != "base"))


def _module(architecture: str) -> Any:
    return importlib.import_module(f"{__name__}.{architecture}")


def config_class(architecture: str) -> type[Config]:
    """The configuration class of an architecture's stem."""
    module = _module(architecture)
    return next(
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Config) and c.__module__ == module.__name__
    )


@cache
def presets() -> dict[str, Config]:
    """Every preset of every architecture, by name."""
    return {name: config for a in architectures() for name, config in _module(a).PRESETS.items()}


def preset(name: str) -> Config:
    """The preset of that name. Raises SourceError with close names otherwise."""
    try:
        return presets()[name]
    except KeyError:
        import difflib

        close = difflib.get_close_matches(name, presets(), n=3) or sorted(presets())
        raise SourceError(
            "no such preset", where=f"preset:{name}", hint=f"did you mean {', '.join(close)}?"
        ) from None


def _supported(name: object, known: Mapping[str, str], where: str) -> str:
    if not isinstance(name, str) or name not in known:
        raise ConfigError(
            "this architecture is not implemented",
            where=where,
            expected=f"one of {', '.join(sorted(known))}",
            found=repr(name),
        )
    return known[name]


def config_from_hf(raw: Mapping[str, Any], where: str = "config.json") -> Config:
    """The configuration that a Hugging Face config.json, given as its dictionary, describes."""
    known = {model_type: a for a in architectures() for model_type in config_class(a).hf_classes()}
    return config_class(_supported(raw.get("model_type"), known, f"{where}: model_type")).from_hf(raw, where)


def config_from_gguf(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Any],
    read: Callable[[str], Any],
    where: str,
) -> Config:
    """The configuration in a GGUF file's metadata; `read` gives a tensor that holds hyper-parameters."""
    key = "general.architecture"
    known = {a: a for a in architectures() if "from_gguf" in vars(config_class(a))}
    cls = config_class(_supported(metadata.get(key), known, f"{where}: {key}"))
    try:
        return cls.from_gguf(metadata, tensors, read, where)
    except ConfigError as error:
        raise error if where in error.where else located(error, where) from None
