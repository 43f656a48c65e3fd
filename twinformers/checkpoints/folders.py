"""Folders of weights: Hugging Face's, and the twins' own.

Every folder carries config.json (in Hugging Face's spelling), the tokenizer's files and the generation
settings. What tells the twins' folders apart is `twinformers.json`:
`{"format": "torch" | "jax", "version": 1, "architecture": STEM}`. A torch folder holds safetensors with
our module names, a jax folder an Orbax checkpoint in `params/` with our flat dotted names.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from twinformers.checkpoints.base import ASSETS, Checkpoint, TensorInfo
from twinformers.checkpoints.files import read_file, read_json
from twinformers.checkpoints.msgpack import msgpack_spans
from twinformers.checkpoints.pickles import pickle_spans
from twinformers.checkpoints.safetensors_io import SafetensorsFiles
from twinformers.checkpoints.spans import SpanFiles
from twinformers.configs import Config, config_from_hf
from twinformers.errors import FormatError, SourceError
from twinformers.weight_maps import weight_map

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

MARKER = "twinformers.json"
VERSION = 1
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class FolderCheckpoint(Checkpoint):
    """What all folders share: config.json and the files that travel with the weights."""

    def __init__(self, source: str, folder: Path):
        self.folder = folder
        self.raw_config = read_json(folder / "config.json", folder)
        super().__init__(source, config_from_hf(self.raw_config, str(folder / "config.json")))

    @cached_property
    def assets(self) -> Mapping[str, bytes]:  # type: ignore[override]
        names = [name for name in ASSETS if os.path.lexists(self.folder / name)]
        found = {name: read_file(self.folder / name, self.folder) for name in names}
        if "generation_config.json" not in found:
            ids = {k: self.raw_config[k] for k in TOKEN_IDS if self.raw_config.get(k) is not None}
            if ids:
                found["generation_config.json"] = (json.dumps(ids, indent=2) + "\n").encode()
        return found

    @property
    def files(self) -> list[str]:
        return [str(self.folder)]


class TensorFiles(Protocol):
    """Several files of one format read as one."""

    tensors: dict[str, TensorInfo]

    @property
    def files(self) -> Sequence[Path]: ...
    def read(self, name: str) -> np.ndarray: ...
    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray: ...
    def close(self) -> None: ...


class Renamed:
    """The same files with other names for their tensors."""

    def __init__(self, files: TensorFiles, names: Mapping[str, str]):
        self._names, self._whole = names, files
        self.tensors = {name: files.tensors[stored] for name, stored in names.items()}

    @property
    def files(self) -> Sequence[Path]:
        return self._whole.files

    def read(self, name: str) -> np.ndarray:
        return self._whole.read(self._names[name])

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self._whole.read_part(self._names[name], index)

    def close(self) -> None:
        self._whole.close()


def completed(files: TensorFiles, config: Config) -> TensorFiles:
    """The files by the names of the model with its head, as transformers has them today.

    Those that were saved from the model below the head lack the name that it has there.
    """
    names: dict[str, str] = {}
    for stored, info in files.tensors.items():
        if (twin := names.setdefault(config.hf_name(stored), stored)) != stored:
            raise FormatError(
                "a tensor occurs under two names", where=f"{info.file}: {stored}", found=f"also as {twin}"
            )
    base = f"{config.hf_base}."
    if config.hf_base and not any(name.startswith(base) for name in names):
        table = weight_map(config)
        known = table.tensors("hf").keys() | table.buffers("hf")
        names = {base + n if base + n in known else n: stored for n, stored in names.items()}
    return files if all(name == stored for name, stored in names.items()) else Renamed(files, names)


@dataclass(frozen=True)
class Kind:
    """One way of storing a folder's tensors: in one file, or in shards that an index lists."""

    single: str
    index: str
    side: str
    open: Callable[[list[Path], Path | None], TensorFiles]


#: In the order in which transformers looks for them.
KINDS = (
    Kind(SINGLE, INDEX, "hf", lambda files, folder: SafetensorsFiles(files)),
    Kind(
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "hf",
        lambda files, folder: SpanFiles(files, pickle_spans, folder),
    ),
    Kind(
        "flax_model.msgpack",
        "flax_model.msgpack.index.json",
        "flax",
        lambda files, folder: SpanFiles(files, msgpack_spans, folder),
    ),
)


class WeightsFolder(FolderCheckpoint):
    """A folder with one file of weights, or an index and its shards: the first of `kinds` that it holds."""

    def __init__(self, source: str, folder: Path, *, side: str = "", kinds: Sequence[Kind] = KINDS):
        super().__init__(source, folder)
        found = [k for k in kinds if any(os.path.lexists(folder / name) for name in (k.single, k.index))]
        if not found:
            raise SourceError(
                "no weights in the folder",
                where=str(folder),
                expected=" or ".join(f"{k.single} or {k.index}" for k in kinds),
                found=", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing",
            )
        kind, *others = found
        if others:
            log.info("%s: reading %s as transformers does, not %s", folder, kind.single, others[0].single)
        self.format = self.side = side or kind.side
        single, index = folder / kind.single, folder / kind.index
        self._listed = read_index(index) if index.exists() else None
        names = [kind.single] if self._listed is None else list(dict.fromkeys(self._listed.values()))
        self._files = kind.open([folder / name for name in names], folder)
        if self._listed is not None:
            if single.exists() and kind.single not in names:
                raise FormatError(
                    "the folder holds two sets of weights",
                    where=str(single),
                    expected=f"this file or {kind.index} with its shards",
                    found="both",
                    hint="remove the one that is out of date; transformers would read this file",
                )
            self._compare_with_index(index, self._listed)
        self.config = self.config.fitted(self._files.tensors.keys())
        if self.side == "hf":
            self._files = completed(self._files, self.config)

    def _compare_with_index(self, path: Path, listed: Mapping[str, str]) -> None:
        actual = {name: Path(info.file).name for name, info in self._files.tensors.items()}
        for name in sorted(listed.keys() | actual.keys()):
            if listed.get(name) != actual.get(name):
                raise FormatError(
                    "the index and the files disagree",
                    where=f"{path}: {name}",
                    expected=f"in {listed[name]}" if name in listed else "not listed in the index",
                    found=f"in {actual[name]}" if name in actual else "in no file",
                    hint="old and new shards may be mixed; fetch the folder again",
                )

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._files.tensors

    def read(self, name: str) -> np.ndarray:
        return self._files.read(name)

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self._files.read_part(name, index)

    @property
    def files(self) -> list[str]:
        # A hub's folder holds links: its files lie somewhere else.
        return [*super().files, *(str(f) for f in self._files.files)]

    def close(self) -> None:
        self._files.close()


def read_index(path: Path) -> dict[str, str]:
    """Which shard holds which tensor. Raises FormatError for an index that names what is not beside it."""
    listed = read_json(path, path.parent, unique=True).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise FormatError("the index lists no tensors", where=f"{path}: weight_map")
    for name, file in listed.items():
        # An index is foreign input: it may name files of its own folder and nothing else.
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise FormatError(
                "the index points out of its folder",
                where=f"{path}: weight_map[{name!r}]",
                expected="the plain name of a file beside the index",
                found=repr(file),
            )
    return listed


def open_folder(source: str, folder: Path) -> Checkpoint:
    """Open a folder by what lies in it: a twin's marker, Hugging Face's config.json or Meta's params.json."""
    marker = folder / MARKER
    if marker.exists():
        found = read_json(marker, folder)
        if found.get("version") != VERSION or found.get("format") not in ("torch", "jax"):
            raise FormatError(
                "unknown kind of twinformers folder",
                where=str(marker),
                expected=f"version {VERSION}, format torch or jax",
                found=f"version {found.get('version')!r}, format {found.get('format')!r}",
                hint="it may have been written by a newer version of twinformers",
            )
        checkpoint: FolderCheckpoint
        if found["format"] == "torch":
            checkpoint = WeightsFolder(source, folder, side="torch", kinds=KINDS[:1])
        else:
            from twinformers.checkpoints.orbax import OrbaxFolder

            checkpoint = OrbaxFolder(source, folder)
        if (stem := found.get("architecture")) != checkpoint.config.architecture:
            raise FormatError(
                "the folder's files disagree about the architecture",
                where=str(marker),
                expected=f"{checkpoint.config.architecture!r}, as in config.json",
                found=repr(stem),
            )
        return checkpoint
    if (folder / "config.json").exists():
        return WeightsFolder(source, folder)
    if (folder / "params.json").exists():
        from twinformers.checkpoints.meta import MetaFolder

        return MetaFolder(source, folder)
    raise SourceError(
        "the folder is no checkpoint",
        where=str(folder),
        expected=f"config.json with weights, params.json with consolidated.NN.pth, or {MARKER}",
        found=", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing",
    )
