"""An array's elements in row-major order, without a second copy of it and at the speed of memory."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

#: What is handed on at a time.
PIECE_BYTES = 4 << 20
#: Rows that are turned at a time, and columns: so many lines of both sides stay in the processor's cache.
ROWS, COLUMNS = 128, 512
#: Elements between the rows of the block that is turned. Rows that are a power of two apart share few places
#: of the cache, so that each would drive out the others: 5 times slower.
GAP = 32


def pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """The elements in row-major order as flat arrays of a few megabytes: views where the layout allows it."""
    import numpy as np

    if array.flags.c_contiguous:
        flat = array.reshape(-1)
        step = max(1, PIECE_BYTES // array.itemsize)
        yield from (flat[start : start + step] for start in range(0, flat.size, step))
    elif array.ndim > 2:
        for part in array:
            yield from pieces(part)
    elif array.ndim == 2:
        step = max(1, PIECE_BYTES // (array.shape[1] * array.itemsize))
        for start in range(0, array.shape[0], step):
            yield contiguous(array[start : start + step]).reshape(-1)
    else:
        yield np.ascontiguousarray(array)


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array in row-major order; itself, if it is that already. What is transposed is turned by blocks."""
    import numpy as np

    if array.ndim != 2 or array.flags.c_contiguous or abs(array.strides[0]) >= abs(array.strides[1]):
        return np.ascontiguousarray(array)
    bits = array.view(f"u{array.itemsize}")  # numpy copies its own types faster than bfloat16
    out = empty(array.shape, bits.dtype)
    block = np.empty((ROWS, COLUMNS + GAP), bits.dtype)
    for left in range(0, array.shape[0], COLUMNS):
        target = out[left : left + COLUMNS]
        for top in range(0, array.shape[1], ROWS):
            source = bits[left : left + COLUMNS, top : top + ROWS].T
            turned = block[: source.shape[0], : source.shape[1]]
            turned[...] = source
            target[:, top : top + ROWS] = turned.T
    return out.view(array.dtype)


@dataclass
class _Used:
    """Memory that waits for its next use, smallest first; at most what the largest took, and a piece."""

    waiting: list[np.ndarray] = field(default_factory=list)
    largest: int = 0

    def take(self, size: int) -> np.ndarray:
        import numpy as np

        self.largest = max(self.largest, size)
        for number, memory in enumerate(self.waiting):
            if memory.nbytes >= size:
                return self.waiting.pop(number)
        self._shrink(self.largest - size)  # what is too small would only be held in addition
        return np.empty(size, np.uint8)

    def give_back(self, memory: np.ndarray) -> None:
        self.waiting.append(memory)
        self.waiting.sort(key=lambda m: m.nbytes)
        self._shrink(self.largest + PIECE_BYTES)

    def _shrink(self, most: int) -> None:
        while sum(m.nbytes for m in self.waiting) > most:
            self.waiting.pop()


_used: ContextVar[_Used | None] = ContextVar("used", default=None)


@contextlib.contextmanager
def reusing() -> Iterator[None]:
    """In the block, `empty` gives the memory of arrays that are gone to new ones.

    Fresh memory of the size of a tensor costs more than reading the tensor: the system clears each page.
    """
    token = _used.set(_Used())
    try:
        yield
    finally:
        _used.reset(token)


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """As `np.empty`; in a block of `reusing`, in memory that an earlier array has left."""
    import numpy as np

    used, size = _used.get(), math.prod(shape) * dtype.itemsize
    if used is None or size < PIECE_BYTES // 4:
        return np.empty(shape, dtype)
    memory = used.take(size)
    loan = _Loan(memory)
    weakref.finalize(loan, used.give_back, memory).atexit = False
    return np.asarray(loan)[:size].view(dtype).reshape(shape)


class _Loan:
    """What an array in used memory is based on: when its last view is gone, so is the loan.

    It is no array itself: numpy bases a view of a view on the array at the bottom, which outlives them all.
    """

    def __init__(self, memory: np.ndarray):
        self.__array_interface__ = memory.__array_interface__
