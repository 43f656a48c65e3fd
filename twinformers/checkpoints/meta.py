"""LLaMA as Meta publishes it: params.json and one `consolidated.NN.pth` for each model-parallel rank.

Every rank holds a slice of each matrix and a copy of each norm. Here the slices are joined one tensor at a
time, so that neither fairscale nor a process per rank is needed and memory is bounded by the largest tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from twinformers.checkpoints.base import ASSETS, Checkpoint, TensorInfo
from twinformers.checkpoints.dtypes import numpy_dtype
from twinformers.checkpoints.files import read_file, read_json
from twinformers.checkpoints.pickles import pickle_spans
from twinformers.checkpoints.spans import SpanFiles
from twinformers.configs.base import located
from twinformers.configs.llama import LlamaConfig
from twinformers.errors import ConfigError, FormatError, WeightsError

if TYPE_CHECKING:
    import numpy as np

PARAMS = "params.json"
RANK = re.compile(r"consolidated\.(\d+)\.pth")
#: Which axis the ranks share out, by the module's name: column-parallel layers split their outputs,
#: row-parallel ones their inputs. What is not here (the norms) every rank holds whole.
AXES = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
#: Rows in which the head is compared with the embedding to learn whether the two are tied.
SAMPLE = 64


class MetaFolder(Checkpoint):
    """A folder of Meta's. The tensors have Meta's names and the shapes that they have when joined.

    Raises FormatError where a rank is missing or its file is damaged or asks for code, WeightsError where the
    ranks disagree, ConfigError where params.json is incomplete or of another model.
    """

    format = side = "meta"
    config: LlamaConfig

    def __init__(self, source: str, folder: Path):
        self.folder = folder
        path = folder / PARAMS
        params = read_json(path)
        self._paths = _rank_files(folder)
        self._ranks = [SpanFiles([p], pickle_spans) for p in self._paths]
        self._compare_ranks()
        # LLaMA 1 and 2 split the embedding's features, Llama 3 its vocabulary.
        table = self._ranks[0].tensors.get("tok_embeddings.weight")
        split = 0 if table is not None and tuple(table.shape[1:]) == (params.get("dim"),) else 1
        self._axes = AXES | {"tok_embeddings": split}
        self._tensors = {name: self._joined(name) for name in self._ranks[0].tensors}
        try:
            config = LlamaConfig.from_meta(params, self._tensors, self._is_tied())
        except ConfigError as error:
            raise located(error, str(path)) from None
        super().__init__(source, config)

    def _compare_ranks(self) -> None:
        first = self._ranks[0].tensors
        for path, rank in zip(self._paths, (r.tensors for r in self._ranks), strict=True):
            for name in sorted(first.keys() | rank.keys()):
                if (expected := _describe(first.get(name))) != (found := _describe(rank.get(name))):
                    raise WeightsError(
                        "the ranks disagree about a tensor",
                        where=f"{path}: {name}",
                        expected=f"{expected}, as in {self._paths[0].name}",
                        found=found,
                        hint="the files belong to different checkpoints; fetch the folder again",
                    )

    def _axis(self, name: str) -> int | None:
        """The axis on which to join a tensor; None where every rank holds the whole of it."""
        axis = self._axes.get(name.removesuffix(".weight").rpartition(".")[2])
        return axis if len(self._ranks) > 1 and len(self._ranks[0].tensors[name].shape) == 2 else None

    def _joined(self, name: str) -> TensorInfo:
        piece, axis = self._ranks[0].tensors[name], self._axis(name)
        shape = tuple(n * len(self._ranks) if i == axis else n for i, n in enumerate(piece.shape))
        return TensorInfo(shape, piece.dtype, piece.file)

    def _is_tied(self) -> bool:
        """Whether the head is the embedding: absent, or equal in a sample. The port compares all of it."""
        first, (embed, head) = self._ranks[0], ("tok_embeddings.weight", "output.weight")
        shapes = [first.tensors[name].shape if name in first.tensors else () for name in (embed, head)]
        if any(len(shape) != 2 for shape in shapes):
            return head not in first.tensors
        # Whatever the split, the first rank's pieces begin at the same corner of their matrices.
        rows, columns = (min(sizes) for sizes in zip(*shapes, strict=True))
        return all(
            (first.row(embed, i)[:columns] == first.row(head, i)[:columns]).all()
            for i in range(0, rows, max(1, rows // SAMPLE))
        )

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str) -> np.ndarray:
        import numpy as np

        if (axis := self._axis(name)) is not None:
            info = self._tensors[name]
            whole = np.empty(info.shape, numpy_dtype(info.dtype))
            for place, rank in zip(np.split(whole, len(self._ranks), axis), self._ranks, strict=True):
                place[...] = rank.read(name)
            return whole
        first = self._ranks[0].read(name)
        for path, rank in zip(self._paths[1:], self._ranks[1:], strict=True):
            if (
                rank.read(name).tobytes() != first.tobytes()
            ):  # bit by bit: NaN differs from itself as a number
                raise WeightsError(
                    "the ranks hold different values of a tensor that all have whole",
                    where=f"{path}: {name}",
                    expected=f"the values of {self._paths[0].name}",
                    found="other values",
                    hint="the files belong to different checkpoints; fetch the folder again",
                )
        return first

    @cached_property
    def assets(self) -> Mapping[str, bytes]:  # type: ignore[override]
        """The tokenizer of the folder or, as in Meta's downloads, of its parent; as it is and converted."""
        found = {name: read_file(self.folder / name) for name in ASSETS if (self.folder / name).is_file()}
        path = self.folder / "tokenizer.model"
        if not path.is_file():
            path = self.folder.resolve().parent / "tokenizer.model"
        # A tokenizer.json that somebody put beside the weights is meant to be used.
        if path.is_file() and "tokenizer.json" not in found:
            from twinformers.checkpoints.meta_tokenizer import tokenizer_assets

            data = read_file(path)
            found = {"tokenizer.model": data, **tokenizer_assets(data, self.config, str(path)), **found}
        return found

    @property
    def files(self) -> list[str]:
        return [str(p) for p in (self.folder / PARAMS, *self._paths)]

    def close(self) -> None:
        for rank in self._ranks:
            rank.close()


def _rank_files(folder: Path) -> list[Path]:
    """The ranks' files in order; their numbers must be 0, 1, 2, ..."""
    found = sorted((int(m[1]), path) for path in folder.iterdir() if (m := RANK.fullmatch(path.name)))
    numbers = [number for number, _ in found]
    if not found or numbers != list(range(len(found))):
        raise FormatError(
            "a rank's file is missing" if found else "there are no weights beside params.json",
            where=str(folder),
            expected="consolidated.00.pth and so on, without a gap",
            found=", ".join(path.name for _, path in found) or "no such file",
            hint="fetch the folder again; every rank's file is needed",
        )
    return [path for _, path in found]


def _describe(info: TensorInfo | None) -> str:
    return f"{info.dtype} {list(info.shape)}" if info else "no such tensor"
