"""What training starts from and what it keeps: weights and moments by the torch twin's names, and the losses.

A training folder is a checkpoint like any other, with more files beside it: settings, losses, the optimizer's
moments. All of it appears at once, so what lies there is always whole.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from twinformers.checkpoints import port
from twinformers.checkpoints.base import Checkpoint, TensorInfo
from twinformers.checkpoints.dtypes import check_dtype
from twinformers.checkpoints.files import read_file, read_json
from twinformers.checkpoints.folders import open_folder
from twinformers.configs.transformer import TransformerConfig
from twinformers.errors import FormatError, SourceError, UsageError
from twinformers.weight_maps import weight_map

VERSION = 1
#: What a number name's translation needs at most, the end token included, and then some.
LONGEST = 32
SETTINGS, MOMENTS, LOSSES, PLOT = "training.json", "training.safetensors", "losses.csv", "losses.png"
#: Arrays by parameter, in the torch twin's names and layout: both frameworks read and write these.
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What determines a training run, whichever framework runs it. All but `steps` is fixed by its start."""

    preset: str = "transformer-numbers"
    steps: int = 3000
    batch_size: int = 64
    warmup: int = 1000
    dropout: float = 0.0
    label_smoothing: float = 0.1
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self):
        check_dtype(self.dtype)
        for name, ok, expected in (
            ("steps", self.steps >= 1, "a positive integer"),
            ("batch_size", self.batch_size >= 1, "a positive integer"),
            ("warmup", self.warmup >= 1, "a positive integer"),
            ("dropout", 0 <= self.dropout < 1, "a number from 0, below 1"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "a number from 0, below 1"),
            ("seed", 0 <= self.seed < 2**32, "an integer in [0, 2^32)"),
        ):
            if not ok:
                raise UsageError("bad value", where=name, expected=expected, found=str(getattr(self, name)))


class Weights(Checkpoint):
    """Arrays in memory as a source, in the torch twin's names; `assets` are all files that go with them."""

    format = "memory"
    side = "torch"

    def __init__(self, config: TransformerConfig, arrays: Arrays, assets: Mapping[str, bytes]):
        super().__init__("the training run", config)
        self._arrays, self._assets = arrays, assets

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(x.shape, str(x.dtype), "") for name, x in self._arrays.items()}

    def read(self, name: str) -> np.ndarray:
        return self._arrays[name]

    @property
    def assets(self) -> Mapping[str, bytes]:
        return self._assets


@dataclass
class TrainState:
    """Where a run stands after `step` updates: all it takes to go on, in either framework."""

    settings: TrainSettings
    config: TransformerConfig
    tokenizer: bytes
    weights: Arrays
    first: Arrays  # running mean of the gradients
    second: Arrays  # and of their squares
    losses: list[float] = field(default_factory=list)

    @property
    def step(self) -> int:
        return len(self.losses)


def initial_weights(config: TransformerConfig, seed: int) -> Arrays:
    """Random float64 weights of small size, drawn per tensor from the seed and its name.

    Matrices after Glorot & Bengio 2010, embeddings with standard deviation d_model^-0.5, so that they have 1
    after scaling and logits are moderate; norms do nothing yet.
    """
    result = {}
    for name, leaf in weight_map(config).leaves("torch").items():
        generator = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))
        shape, kind = leaf.shape("torch"), leaf.name("jax").rpartition(".")[2]
        if kind == "kernel":
            draw = (2 * generator.random(shape) - 1) * np.sqrt(6 / sum(shape))
        elif kind == "embedding":
            draw = generator.standard_normal(shape) * config.d_model**-0.5
        else:
            draw = np.full(shape, 1.0 if kind == "scale" else 0.0)
        result[name] = draw
    return result


def save(state: TrainState, folder: Path, framework: str, files: Mapping[str, bytes]) -> None:
    """Write the run as a folder of the framework's format, whole or not at all."""
    from safetensors.numpy import save as to_bytes

    moments = {f"first.{n}": x for n, x in state.first.items()}
    moments |= {f"second.{n}": x for n, x in state.second.items()}
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["step", "loss"])
    writer.writerows([n, repr(loss)] for n, loss in enumerate(state.losses, 1))
    about = {
        "version": VERSION,
        "step": state.step,
        "framework": framework,
        "settings": dataclasses.asdict(state.settings),
    }
    c = state.config
    named = {name: getattr(c, name) for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id")}
    named |= {"num_beams": 4, "max_new_tokens": LONGEST}
    assets = {
        "tokenizer.json": state.tokenizer,
        "generation_config.json": (json.dumps(named, indent=2) + "\n").encode(),
        SETTINGS: (json.dumps(about, indent=2) + "\n").encode(),
        MOMENTS: to_bytes({name: np.ascontiguousarray(x) for name, x in moments.items()}),
        LOSSES: table.getvalue().encode(),
        **files,
    }
    port(Weights(c, state.weights, assets), folder, to=framework, overwrite=True)


def restore(folder: Path) -> TrainState:
    """Read what `save` wrote. Raises SourceError where there is no run, FormatError where it is damaged."""
    from twinformers.checkpoints.porting import convert
    from twinformers.checkpoints.safetensors_io import SafetensorsFiles

    if not (folder / SETTINGS).is_file():
        raise SourceError(
            "no training run to resume",
            where=str(folder),
            expected=f"a folder with {SETTINGS}, written by `twinformers train`",
            hint="check the path, or start anew without --resume",
        )
    about = read_json(folder / SETTINGS)
    if about.get("version") != VERSION:
        raise FormatError(
            "unknown kind of training run",
            where=str(folder / SETTINGS),
            expected=f"version {VERSION}",
            found=f"version {about.get('version')!r}",
            hint="it may have been written by a newer version of twinformers",
        )
    try:
        settings = TrainSettings(**about["settings"])
        rows = list(csv.reader(io.StringIO(read_file(folder / LOSSES).decode())))
        losses = [float(loss) for _, loss in rows[1:]]
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            "the training run cannot be read",
            where=f"{folder / SETTINGS} or {LOSSES}",
            found=f"{type(error).__name__}: {error}",
            hint="a file was changed by hand; start anew",
        ) from None
    with open_folder(str(folder), folder) as checkpoint:
        weights = dict(convert(checkpoint, "torch"))
        config: Any = checkpoint.config
        tokenizer = checkpoint.assets["tokenizer.json"]
    files = SafetensorsFiles([folder / MOMENTS])
    moments: dict[str, Arrays] = {}
    for kind in ("first", "second"):
        moments[kind] = {}
        for name, x in weights.items():
            found = files.tensors.get(f"{kind}.{name}")
            if found is None or found.shape != x.shape:
                raise FormatError(
                    "the optimizer's moments do not fit the weights",
                    where=f"{folder / MOMENTS}: {kind}.{name}",
                    expected=str(list(x.shape)),
                    found="nothing" if found is None else str(list(found.shape)),
                )
            moments[kind][name] = files.read(f"{kind}.{name}")
    files.close()
    if about.get("step") != len(losses):
        raise FormatError(
            "the files of the training run disagree",
            where=str(folder / LOSSES),
            expected=f"{about.get('step')} steps, as in {SETTINGS}",
            found=str(len(losses)),
        )
    return TrainState(settings, config, tokenizer, weights, **moments, losses=losses)
