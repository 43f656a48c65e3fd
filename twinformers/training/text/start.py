"""The model of a run, and the weights that it begins with: the same in both frameworks."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np

from twinformers.checkpoints.files import read_json
from twinformers.configs import Config, config_from_hf, preset
from twinformers.errors import UsageError
from twinformers.training.state import Arrays
from twinformers.training.text.data import TokenData
from twinformers.training.text.settings import Run, TextSettings
from twinformers.weight_maps import weight_map

#: What writes into the residual stream; each block does so twice.
RESIDUAL = ("o_proj", "down_proj")
STD = 0.02


def chosen_model(settings: TextSettings) -> Config:
    """The configuration that the settings name. Raises UsageError for a model that reads no plain text."""
    if settings.preset is not None:
        config = preset(settings.preset.removeprefix("preset:"))
    else:
        path = Path(str(settings.config)).expanduser()
        path = path / "config.json" if path.is_dir() else path
        config = config_from_hf(read_json(path), str(path))
    if config.kind != "causal":
        raise UsageError(
            "only language models learn from plain text",
            where="preset" if settings.preset else "config",
            expected="a decoder, such as llama-10m",
            found=config.architecture,
        )
    return config


def fitted_model(run: Run, data: TokenData) -> Config:
    """The run's model with the vocabulary of its tokens: of a preset its size follows from them.

    Raises UsageError where a token is beyond the vocabulary, or a window beyond the model's positions.
    """
    config, s = run.model, run.settings
    if s.config is None:
        config = config.replace(vocab_size=data.vocab_size or s.vocab_size or config.vocab_size)
    least = max(data.largest + 1, data.vocab_size or 0)
    if config.vocab_size < least:
        raise UsageError(
            "the vocabulary is too small",
            where="vocab_size",
            expected=f"at least {least}, for all tokens of the data",
            found=str(config.vocab_size),
        )
    longest = getattr(config, "max_position_embeddings", s.sequence)
    if s.sequence > longest:
        raise UsageError(
            "more positions than the model has",
            where="sequence",
            expected=f"at most {longest}",
            found=str(s.sequence),
        )
    return config


def initial_weights(config: Config, seed: int) -> Arrays:
    """Random float32 weights by the torch twin's names, each drawn from the seed and its name alone.

    Normal with deviation 0.02; what writes into the residual stream has 0.02 / sqrt(2 L), so that its sum
    over L blocks stays as large whatever L is (Radford et al. 2019, GPT-2). Norms do nothing yet.
    """
    layers = getattr(config, "num_hidden_layers", 1)
    result = {}
    for name, leaf in weight_map(config).leaves("torch").items():
        shape, kind = leaf.shape("torch"), leaf.name("jax").rpartition(".")[2]
        if kind in ("scale", "bias"):
            result[name] = np.full(shape, 1 if kind == "scale" else 0, np.float32)
            continue
        generator = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))
        residual = name.split(".")[-2] in RESIDUAL
        std = STD / math.sqrt(2 * layers) if residual else STD
        result[name] = generator.standard_normal(shape, dtype=np.float32) * np.float32(std)
    return result


def blank_weights(config: Config) -> Arrays:
    """Zeros in place of the weights, which a checkpoint is about to fill."""
    leaves = weight_map(config).leaves("torch")
    return {name: np.zeros(leaf.shape("torch"), np.float32) for name, leaf in leaves.items()}
