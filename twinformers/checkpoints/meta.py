"""LLaMA as Meta publishes it: params.json and one `consolidated.NN.pth` for each model-parallel rank.

Every rank holds a slice of each matrix and a copy of each norm. Here the slices are joined one tensor at a
time out of memory-mapped files, so that neither fairscale nor a process per rank is needed and memory is
bounded by the largest tensor. A .pth file is a pickle: torch reads it with weights only, which executes
nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinformers.checkpoints.base import ASSETS, Checkpoint, TensorInfo
from twinformers.checkpoints.dtypes import DTYPES, numpy_dtype
from twinformers.checkpoints.files import read_json
from twinformers.configs.base import located
from twinformers.configs.llama import LlamaConfig
from twinformers.errors import ConfigError, FormatError, MissingDependency, SourceError, WeightsError

if TYPE_CHECKING:
    import numpy as np
    import torch

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
    ranks disagree, ConfigError where params.json is incomplete or of another model, MissingDependency without
    torch.
    """

    format = side = "meta"
    config: LlamaConfig

    def __init__(self, source: str, folder: Path):
        self.folder = folder
        path = folder / PARAMS
        params = read_json(path)
        self._paths = _rank_files(folder)
        self._ranks = [_load(p) for p in self._paths]
        self._compare_ranks()
        # LLaMA 1 and 2 split the embedding's features, Llama 3 its vocabulary.
        table = self._ranks[0].get("tok_embeddings.weight")
        split = 0 if table is not None and tuple(table.shape[1:]) == (params.get("dim"),) else 1
        self._axes = AXES | {"tok_embeddings": split}
        self._tensors = {name: self._joined(name) for name in self._ranks[0]}
        try:
            config = LlamaConfig.from_meta(params, self._tensors, self._is_tied())
        except ConfigError as error:
            raise located(error, str(path)) from None
        super().__init__(source, config)

    def _compare_ranks(self) -> None:
        first = self._ranks[0]
        for path, rank in zip(self._paths, self._ranks, strict=True):
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
        return axis if len(self._ranks) > 1 and self._ranks[0][name].ndim == 2 else None

    def _joined(self, name: str) -> TensorInfo:
        piece, axis = self._ranks[0][name], self._axis(name)
        shape = tuple(n * len(self._ranks) if i == axis else n for i, n in enumerate(piece.shape))
        return TensorInfo(shape, _dtype(piece), str(self._paths[0]))

    def _is_tied(self) -> bool:
        """Whether the head is the embedding: absent, or equal in a sample. The port compares all of it."""
        embed, head = (self._ranks[0].get(f"{name}.weight") for name in ("tok_embeddings", "output"))
        if embed is None or head is None or embed.ndim != 2 or head.ndim != 2:
            return head is None
        # Whatever the split, the first rank's pieces begin at the same corner of their matrices.
        rows, columns = min(len(embed), len(head)), min(embed.shape[1], head.shape[1])
        at = slice(0, rows, max(1, rows // SAMPLE))
        return bool((embed[at, :columns] == head[at, :columns]).all())

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str) -> np.ndarray:
        import numpy as np

        if not self._ranks:
            raise SourceError("the checkpoint is closed", where=str(self.folder))
        pieces = [_numpy(rank[name]) for rank in self._ranks]
        if (axis := self._axis(name)) is not None:
            return np.concatenate(pieces, axis)
        for path, piece in zip(self._paths, pieces, strict=True):
            if piece.tobytes() != pieces[0].tobytes():  # bit by bit: NaN differs from itself as a number
                raise WeightsError(
                    "the ranks hold different values of a tensor that all have whole",
                    where=f"{path}: {name}",
                    expected=f"the values of {self._paths[0].name}",
                    found="other values",
                    hint="the files belong to different checkpoints; fetch the folder again",
                )
        return pieces[0].copy()  # the array must outlive the mapping

    @cached_property
    def assets(self) -> Mapping[str, bytes]:  # type: ignore[override]
        """The tokenizer of the folder or, as in Meta's downloads, of its parent; as it is and converted."""
        found = {name: (self.folder / name).read_bytes() for name in ASSETS if (self.folder / name).is_file()}
        path = self.folder / "tokenizer.model"
        if not path.is_file():
            path = self.folder.resolve().parent / "tokenizer.model"
        # A tokenizer.json that somebody put beside the weights is meant to be used.
        if path.is_file() and "tokenizer.json" not in found:
            from twinformers.checkpoints.meta_tokenizer import tokenizer_assets

            data = path.read_bytes()
            found = {"tokenizer.model": data, **tokenizer_assets(data, self.config, str(path)), **found}
        return found

    @property
    def files(self) -> list[str]:
        return [str(p) for p in (self.folder / PARAMS, *self._paths)]

    def close(self) -> None:
        self._ranks = []


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


def _load(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one rank, mapped and not yet read."""
    try:
        import torch
    except ImportError:
        raise MissingDependency(
            "reading Meta's .pth files needs PyTorch", hint="pip install 'twinformers[torch]'"
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch and pickle raise many types
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise FormatError(
                "the file asks for code to be run, which was refused",
                where=str(path),
                expected="tensors and nothing else",
                found=code[1],
                hint="do not trust this file",
            ) from None
        raise FormatError(
            "not a readable PyTorch file",
            where=str(path),
            expected="a zip file as torch.save writes it",
            found=str(error).splitlines()[0][:200],
            hint="the file is truncated or damaged; fetch it again",
        ) from None
    if not isinstance(state, dict):
        raise FormatError(
            "not a dictionary of tensors", where=str(path), expected="a dict", found=type(state).__name__
        )
    for name, value in state.items():
        if not isinstance(name, str) or not _is_plain(value):
            raise FormatError(
                "not a plain tensor",
                where=f"{path}: {name}",
                expected=f"a dense tensor of {', '.join(DTYPES)}",
                found=_describe(value),
            )
    return state


def _is_plain(value: Any) -> bool:
    import torch

    return (
        isinstance(value, torch.Tensor)
        and value.is_cpu
        and value.layout is torch.strided
        and _dtype(value) in DTYPES
        # A stride of zero would make much out of a few bytes.
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _describe(value: Any) -> str:
    if value is None:
        return "no such tensor"
    return f"{_dtype(value)} {list(value.shape)}" if hasattr(value, "dtype") else type(value).__name__


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    """The tensor as numpy sees it, C-contiguous; a view of the mapped file where it can be."""
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype is torch.bfloat16:  # torch gives numpy no bfloat16: pass the bits
        return tensor.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
    return tensor.numpy()
