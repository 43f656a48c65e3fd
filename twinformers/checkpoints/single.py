"""One file of weights by its path; what else a model needs lies beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from twinformers.checkpoints.base import TensorInfo
from twinformers.checkpoints.folders import KINDS, FolderCheckpoint, completed
from twinformers.configs import Config
from twinformers.errors import SourceError, WeightsError
from twinformers.weight_maps import weight_map

if TYPE_CHECKING:
    import numpy as np

SAFETENSORS, PICKLE, MSGPACK = KINDS
SUFFIXES = {
    ".safetensors": SAFETENSORS,
    ".bin": PICKLE,
    ".pt": PICKLE,
    ".pth": PICKLE,
    ".msgpack": MSGPACK,
}


class SingleFile(FolderCheckpoint):
    """A file of weights; the names of its tensors tell whose layout they have.

    Raises SourceError without a config.json beside it, WeightsError where the names fit no side of the weight
    map, and the errors of the format.
    """

    def __init__(self, source: str, path: Path):
        if not os.path.lexists(path.parent / "config.json"):
            raise SourceError(
                "a file of weights does not say what model they are of",
                where=str(path),
                expected=f"config.json in {path.parent}",
                found="params.json" if (path.parent / "params.json").exists() else "no such file",
                hint="put the model's config.json there; of Meta's files, give the folder",
            )
        super().__init__(source, path.parent)
        self._path = path
        files = SUFFIXES[path.suffix].open([path], None)
        self.config = self.config.fitted(files.tensors.keys())
        self._files = completed(files, self.config)
        self.format = self.side = find_side(self.config, self._files.tensors, str(path))

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._files.tensors

    def read(self, name: str) -> np.ndarray:
        return self._files.read(name)

    @property
    def files(self) -> list[str]:
        return [str(self._path)]

    def close(self) -> None:
        self._files.close()


def find_side(config: Config, tensors: Mapping[str, TensorInfo], where: str) -> str:
    """The side of the weight map that most of the names belong to. Raises WeightsError if none is."""
    table = weight_map(config)
    fits = {side: len(tensors.keys() & table.tensors(side).keys()) for side in table.sides}
    best = max(fits, key=lambda side: fits[side])
    if not fits[best]:
        raise WeightsError(
            "the names of the tensors are in no layout that this model has",
            where=where,
            expected=" or ".join(f"{next(iter(table.tensors(side)))} ({side})" for side in fits),
            found=", ".join(list(tensors)[:3])[:300] or "no tensors",
            hint="config.json belongs to another model, or the names have a prefix: rename them",
        )
    return best
