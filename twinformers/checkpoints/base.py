"""What every checkpoint looks like from outside: headers first, tensors one at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from twinformers.configs import Config

#: Files that travel with the weights: a folder always carries its tokenizer and its generation settings.
ASSETS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "source.spm",  # Marian's, one for each language
    "target.spm",
    "vocab-src.json",  # FSMT's
    "vocab-tgt.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the headers describe it; nothing of it has been read.

    `shape` is the logical shape (row-major, as numpy would see it), `dtype` the stored type by the
    name numpy or ml_dtypes gives it ("float32", "bfloat16"), or the quantisation ("Q4_1").
    """

    shape: tuple[int, ...]
    dtype: str
    file: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Checkpoint(ABC):
    """An opened source of weights. Opening reads headers only.

    `format` names the storage ("hf", "gguf", "meta", "flax", "torch", "jax", "preset"), `side` the column of
    the weight map whose names and layouts the tensors have (all of these but "preset"). `revision` is the
    commit of a hub's repository, and empty for what is local.
    """

    format: str
    side: str
    revision: str = ""

    def __init__(self, source: str, config: Config):
        self.source = source
        self.config = config

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its stored name."""

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """One tensor, C-contiguous, in its stored dtype; quantised tensors are dequantised to float32."""

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, a slice of step 1 for each axis; if the format allows, no more is read."""
        return self.read(name)[index]

    @property
    def assets(self) -> Mapping[str, bytes]:
        """The content of those files of `ASSETS` that the source has, or that its metadata amounts to."""
        return {}

    @property
    def files(self) -> list[str]:
        """The paths of the files that the source consists of, for the destination-is-the-source check."""
        return []

    def close(self) -> None:  # noqa: B027  (most formats hold nothing open)
        """Release file handles; reading afterwards is an error."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
