"""Files in which a tensor is a span of plain bytes: found when they are opened, read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from twinformers.checkpoints.base import TensorInfo
from twinformers.checkpoints.dtypes import DTYPES, numpy_dtype
from twinformers.checkpoints.files import open_file
from twinformers.errors import FormatError, SourceError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Span:
    """Where a tensor's bytes lie in its file: `pieces` are (offset, bytes), joined in their order.

    With `strides`, counted in elements, the only piece holds the elements in another order than row by row.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...]
    strides: tuple[int, ...] | None = None

    @property
    def reach(self) -> int:
        """From the first to the last element, both counted."""
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides or (), strict=True))


#: Finds the tensors of one format in an opened file, which the text names in errors.
Parse = Callable[[BinaryIO, str], Mapping[str, Span]]


class SpanFiles:
    """Several files of one format read as one: names across all of them are unique.

    With `folder`, no file may be a link that leaves it. Raises FormatError for what `parse` refuses, for
    tensors of other types than DTYPES and for a name in two files.
    """

    def __init__(self, files: Sequence[Path], parse: Parse, folder: Path | None = None):
        self.files = list(files)
        self.tensors: dict[str, TensorInfo] = {}
        self._spans: dict[str, Span] = {}
        self._handles: dict[str, BinaryIO] = {}
        try:
            for path in self.files:
                self._handles[str(path)] = open_file(path, folder)
                for name, span in parse(self._handles[str(path)], str(path)).items():
                    self._add(name, span, str(path))
        except BaseException:
            self.close()
            raise

    def _add(self, name: str, span: Span, file: str) -> None:
        if name in self.tensors:
            raise FormatError(
                "a tensor occurs in two files",
                where=f"{file}: {name}",
                found=f"also in {self.tensors[name].file}",
                hint="old and new files may be mixed; fetch the folder again",
            )
        if span.dtype not in DTYPES:
            raise not_plain(f"{file}: {name}", f"{span.dtype} {list(span.shape)}")
        self.tensors[name] = TensorInfo(span.shape, span.dtype, file)
        self._spans[name] = span

    def read(self, name: str) -> np.ndarray:
        """One tensor, C-contiguous; of its file, nothing but what it spans is touched."""
        import numpy as np

        span = self._spans[name]
        if span.strides is None:
            return self._read(name, span.shape, span.pieces)
        flat = self._read(name, (span.reach,), span.pieces)
        strides = [s * flat.itemsize for s in span.strides]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, span.shape, strides))

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, of which all is read."""
        return self.read(name)[index]

    def row(self, name: str, index: int) -> np.ndarray:
        """One row of a matrix in one piece, without reading the others."""
        span, itemsize = self._spans[name], numpy_dtype(self._spans[name].dtype).itemsize
        row, column = span.strides or (span.shape[1], 1)
        reach = (span.shape[1] - 1) * column + 1
        piece = (span.pieces[0][0] + index * row * itemsize, reach * itemsize)
        return self._read(name, (reach,), (piece,))[::column]

    def _read(self, name: str, shape: tuple[int, ...], pieces: Sequence[tuple[int, int]]) -> np.ndarray:
        import numpy as np

        path = self.tensors[name].file
        if (file := self._handles.get(path)) is None:
            raise SourceError("the checkpoint is closed", where=path)
        array = np.empty(shape, numpy_dtype(self.tensors[name].dtype))
        data: Any = array.reshape(-1).view(np.uint8).data
        filled = 0
        try:
            for offset, size in pieces:
                file.seek(offset)
                end = filled + size
                # Linux gives no more than 2 GB at once.
                while filled < end and (count := file.readinto(data[filled:end])):  # type: ignore[attr-defined]
                    filled += count
        except OSError as error:
            raise FormatError(
                "the tensor cannot be read", where=f"{path}: {name}", found=str(error)
            ) from None
        if filled < len(data):
            raise FormatError(
                "the file ends within a tensor",
                where=f"{path}: {name}",
                expected=f"{len(data)} bytes",
                found=f"{filled} bytes",
                hint="the file changed while it was read",
            )
        return array

    def close(self) -> None:
        """Release the files; reading afterwards raises SourceError."""
        for file in self._handles.values():
            file.close()
        self._handles.clear()


def not_plain(where: str, found: str) -> FormatError:
    """The error for a value that the twins have no parameter for."""
    return FormatError(
        "not a plain tensor",
        where=where,
        expected=f"a dense tensor of {', '.join(DTYPES)}",
        found=found,
        hint="save a state dict in one of these types: nothing else is read, and nothing is dequantised here",
    )
