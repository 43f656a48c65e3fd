"""The pairs of models between which `diverge` looks for a planted mistake."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

import twinformers
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.configs import preset
from twinformers.configs.transformer import TransformerConfig
from twinformers.parity.twins import jax_precision

TINY = cast(TransformerConfig, preset("transformer-tiny"))
GELU = TINY.replace(
    share_embeddings=False, tie_word_embeddings=True, source_vocab_size=97, activation_function="gelu"
)
MARIAN = TINY.replace(model_type="marian", activation_function="swish")


def _presets(name: str, left: str = "jax", right: str = "torch", **options: Any) -> Any:
    return twinformers.diverge(f"{left}:preset:{name}", f"{right}:preset:{name}", **options)


def _gelu() -> Any:
    """The twins of a configuration that no preset has: tables partly tied, GELU."""
    checkpoint, rng = PresetCheckpoint("gelu", GELU), np.random.default_rng(0)
    with jax_precision("float64"):
        left = twinformers.load(checkpoint, "jax", "float64")
    inputs = []
    for length, vocabulary in ((17, GELU.source_vocab_size), (13, GELU.target_vocab_size)):
        inputs += [rng.integers(0, vocabulary, (2, length)), np.tile(np.arange(length), (2, 1))]
    return twinformers.diverge(
        left,
        twinformers.load(checkpoint, "torch", "float64"),
        inputs=[x.astype(np.int32) for x in inputs],
        call_left=lambda model, *inputs: model(*inputs)[0],
        call_right=lambda model, *inputs: model(*inputs)[0],
    )


def _marian() -> Any:
    """The PyTorch twin and transformers. The latter's table of positions is float32, which sets the limit."""
    with tempfile.TemporaryDirectory() as folder:
        twinformers.port(PresetCheckpoint("marian", MARIAN), Path(folder) / "torch", to="torch")
        return twinformers.diverge(f"torch:{folder}/torch", f"hf:{folder}/torch", limit=1e-6)


def _attention() -> Any:
    """One attention module of each framework, with a window to both sides."""
    from test_attention import Module, Shape

    shape, rng = Shape("GroupedQueryAttention", K=2), np.random.default_rng(0)
    with jax_precision("float64"):
        left, right = (
            Module(f, shape, d, causal=False, window=7) for f, d in (("jax", None), ("torch", "cpu"))
        )
    positions = np.tile(np.arange(23, dtype=np.int32), (2, 1))
    return twinformers.diverge(
        left.module, right.module, inputs=[rng.standard_normal((2, 23, shape.D)), positions]
    )


PAIRS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _presets("llama-tiny"),
    "llama-hf": lambda: _presets("llama-tiny", "torch", "hf"),
    "transformer": lambda: _presets("transformer-tiny"),
    "transformer-gradients": lambda: _presets("transformer-tiny", gradients=True),
    "transformer-gelu": _gelu,
    "marian-hf": _marian,
    "attention": _attention,
    **{name: partial(_presets, f"{name}-tiny") for name in ("gpt2", "mistral", "bert")},
}
