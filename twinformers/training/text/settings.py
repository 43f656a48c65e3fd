"""What determines a training run on text, and the file that keeps it.

A run's folder holds `run.json` (this), `data/` (tokens and tokenizer), `checkpoints/`, `metrics.jsonl`,
`loss.png` and, at the end, `model/`. Each of them appears whole or not at all, whenever the process dies.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinformers.checkpoints.atomic import sync
from twinformers.checkpoints.files import read_json
from twinformers.configs import config_from_hf
from twinformers.errors import FormatError, SourceError, TwinformersError, UsageError
from twinformers.sharding import DATA, FSDP
from twinformers.sharding.mesh import mesh_sizes, mesh_text
from twinformers.training.adamw import AdamW
from twinformers.training.step import StepOptions

log = logging.getLogger(__name__)

VERSION = 1
RUN = "run.json"
#: What may differ from the run that is resumed: it changes no number.
FREE = ("save_every", "eval_every", "eval_batches", "keep", "device")
#: What may differ and is reported: sums are then taken in another order.
ROUNDING = ("mesh",)
PACKAGES = {"jax": ("jax", "flax", "optax"), "torch": ("torch",)}


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Everything that determines a run, and how often it saves and evaluates.

    `data` are files and folders, `tokenizer` a source or a tokenizer.json (None: one is trained on the data,
    with `vocab_size` entries), `token_dtype` the type of raw token files. The model is a `preset` or the
    Hugging Face configuration in a file (`config`). Each update learns from `batch_size` windows of
    `sequence` tokens in `accumulate` parts. Weights and moments are kept in `dtype`; `compute_dtype`, `remat`
    and `chunk` are those of `StepOptions`, `peak` to `clip` those of `AdamW` (`floor` None: a tenth of the
    peak). `eval_share` of the tokens is held out at the end of the text; an evaluation reads at most
    `eval_batches` batches of it. `mesh` is how many devices share the work along which axis, such as
    "data=2,fsdp=4" (None: one device). Raises UsageError for values that make no sense.
    """

    data: tuple[str, ...]
    framework: str = "jax"
    preset: str | None = None
    config: str | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    token_dtype: str | None = None
    steps: int = 1000
    batch_size: int = 8
    sequence: int = 256
    accumulate: int = 1
    dtype: str = "float32"
    compute_dtype: str | None = None
    remat: str = "none"
    chunk: int | None = None
    attention: str = "fused"
    peak: float = 1e-3
    floor: float | None = None
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    save_every: int = 500
    eval_every: int = 100
    eval_share: float = 0.02
    eval_batches: int = 16
    keep: int = 2
    device: str | None = None
    mesh: str | None = None

    def __post_init__(self) -> None:
        positive, counted = "a positive integer", "an integer from 0"
        for name, ok, expected in (
            ("data", len(self.data) > 0, "a file or a folder"),
            ("framework", self.framework in PACKAGES, "jax or torch"),
            ("dtype", self.dtype in ("float32", "float64"), "float32 or float64"),
            ("token_dtype", self.token_dtype in (None, "uint16", "uint32"), "uint16 or uint32"),
            ("attention", self.attention in ("einsum", "fused"), "einsum or fused"),
            *((name, getattr(self, name) >= 1, positive) for name in ("steps", "batch_size", "keep")),
            *((name, getattr(self, name) >= 0, counted) for name in ("warmup", "save_every", "eval_every")),
            ("sequence", self.sequence >= 1, positive),
            ("eval_batches", self.eval_batches >= 1, positive),
            ("vocab_size", self.vocab_size is None or self.vocab_size >= 1, positive),
            ("peak", 0 < self.peak < float("inf"), "a positive number"),
            ("floor", self.floor is None or 0 <= self.floor <= self.peak, "a number from 0 to the peak"),
            ("weight_decay", 0 <= self.weight_decay < float("inf"), "a number from 0"),
            ("clip", self.clip > 0, "a positive number"),
            ("seed", 0 <= self.seed < 2**32, "an integer in [0, 2^32)"),
            ("eval_share", 0 <= self.eval_share < 1, "a number from 0, below 1"),
        ):
            if not ok:
                raise UsageError("bad value", where=name, expected=expected, found=str(getattr(self, name)))
        if (self.preset is None) == (self.config is None):
            raise UsageError(
                "the model is a preset or a configuration",
                where="preset, config",
                expected="one of them",
                found="neither" if self.preset is None else "both",
                hint="for example --preset llama-10m",
            )
        self.step_options  # noqa: B018  (checks what it is made of)
        if self.batch_size % self.accumulate:
            raise UsageError(
                "the rows cannot be shared out evenly over the micro-batches",
                where="batch_size",
                expected=f"a multiple of accumulate = {self.accumulate}",
                found=str(self.batch_size),
            )
        if self.mesh is not None:
            self._check_mesh()

    def _check_mesh(self) -> None:
        sizes = mesh_sizes(self.mesh or "")
        object.__setattr__(self, "mesh", mesh_text(sizes))  # one spelling, so that two can be compared
        parts = sizes[DATA] * sizes[FSDP] * self.accumulate
        if self.batch_size % parts:
            raise UsageError(
                "the rows cannot be shared out evenly over the mesh",
                where="batch_size",
                expected=f"a multiple of data x fsdp x accumulate = {parts}",
                found=str(self.batch_size),
            )

    @property
    def recipe(self) -> AdamW:
        floor = self.peak / 10 if self.floor is None else self.floor
        return AdamW(
            peak=self.peak,
            floor=floor,
            warmup=self.warmup,
            steps=self.steps,
            weight_decay=self.weight_decay,
            clip=self.clip,
        )

    @property
    def step_options(self) -> StepOptions:
        """The options of the training step; dropout's keys come from the seed and the update's number."""
        return StepOptions(
            accumulate=self.accumulate,
            remat=self.remat,
            compute_dtype=self.compute_dtype,
            chunk=self.chunk,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Run:
    """A run as `run.json` keeps it: the settings, the model before its vocabulary is known, and where."""

    folder: Path
    settings: TextSettings
    model: Any  # a Config with a vocab_size

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def write(self) -> None:
        about = {
            "version": VERSION,
            "settings": dataclasses.asdict(self.settings),
            "model": self.model.to_hf(),
            "made_with": made_with(self.settings.framework),
        }
        write_whole(self.folder / RUN, (json.dumps(about, indent=2) + "\n").encode())


def read_run(folder: Path, given: dict[str, Any]) -> Run:
    """The run in a folder, with what may change of it changed to what is `given`.

    Raises SourceError where there is none, FormatError where it is damaged, UsageError for a setting that
    differs from the run's.
    """
    path = folder / RUN
    if not path.is_file():
        raise SourceError(
            "no training run to resume",
            where=str(folder),
            expected=f"a folder with {RUN}, written by `twinformers train text`",
            hint="check the path, or start anew without --resume",
        )
    about = read_json(path)
    if about.get("version") != VERSION:
        raise FormatError(
            "unknown kind of training run",
            where=str(path),
            expected=f"version {VERSION}",
            found=f"version {about.get('version')!r}",
            hint="it may have been written by a newer version of twinformers",
        )
    try:
        kept = TextSettings(**{**about["settings"], "data": tuple(about["settings"]["data"])})
        model, before = config_from_hf(about["model"], f"{path}: model"), dict(about["made_with"])
    except (KeyError, TypeError, ValueError, TwinformersError) as error:
        raise FormatError(
            "the training run cannot be read",
            where=str(path),
            found=f"{type(error).__name__}: {error}",
            hint="the file was changed by hand; start anew",
        ) from None
    given = dict(given)
    if given.get("mesh") is not None:
        given["mesh"] = mesh_text(mesh_sizes(given["mesh"]))
    for name, value in given.items():
        if name not in (*FREE, *ROUNDING) and value != getattr(kept, name):
            raise UsageError(
                "a run that is resumed keeps its settings",
                where=name,
                expected=repr(getattr(kept, name)),
                found=repr(value),
                hint="leave the option out, or start a new run in another folder",
            )
    now_with = made_with(kept.framework)
    for name in ROUNDING:
        before[name], now_with[name] = getattr(kept, name), given.get(name, getattr(kept, name))
    for name, now in now_with.items():
        if before.get(name) != now:
            log.warning(
                "%s: begun with %s = %s, resumed with %s; the numbers may differ in their last digits",
                folder, name, before.get(name), now,
            )  # fmt: skip
    changes = {name: value for name, value in given.items() if name in (*FREE, *ROUNDING)}
    return Run(folder, dataclasses.replace(kept, **changes), model)


def made_with(framework: str) -> dict[str, Any]:
    """What rounding depends on besides the settings: versions, and how many threads share a sum."""
    found: dict[str, Any] = {name: importlib.metadata.version(name) for name in PACKAGES[framework]}
    cores = getattr(os, "sched_getaffinity", None)
    return {**found, "cores": len(cores(0)) if cores else os.cpu_count()}


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is the old one or the new one at every moment."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(content)
    sync(new)
    os.replace(new, path)
    sync(path.parent)
