"""An array that lies in a file as plain bytes, row after row: a part of it is read without the rest."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from twinformers.checkpoints.layout import empty
from twinformers.errors import FormatError

if TYPE_CHECKING:
    import numpy as np

#: Of an array that is cut across its rows, as much is read at a time.
PART_BYTES = 4 << 20


def read_rows(
    file: int, start: int, first: int, shape: tuple[int, ...], dtype: np.dtype, where: str
) -> np.ndarray:
    """As many rows as `shape` says, from row `first` of the array that begins at byte `start` of a file.

    Raises FormatError, which says `where`, for a file that ends before and for a disk that fails.
    """
    import numpy as np

    out = empty(shape, dtype)
    offset = start + first * math.prod(shape[1:]) * dtype.itemsize
    left = memoryview(out.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    try:
        while left:  # one call reads 2 GB at most
            if not (count := os.preadv(file, [left], offset)):
                raise FormatError("the file became shorter while it was read", where=where)
            left, offset = left[count:], offset + count
    except OSError as error:
        raise FormatError(
            "the tensor cannot be read",
            where=where,
            found=error.strerror or str(error),
            hint="its disk fails",
        ) from None
    return out


def read_part(
    shape: tuple[int, ...],
    dtype: np.dtype,
    index: tuple[slice, ...],
    rows: Callable[[int, tuple[int, ...]], np.ndarray],
) -> np.ndarray:
    """A part of an array of that shape, a slice of step 1 for each axis; besides it, few rows are in memory.

    `rows(first, shape)` reads rows. Those that are not asked for are not read; of those that are, the whole
    is, for they lie together.
    """
    import numpy as np

    if not shape:
        return rows(0, shape)
    (first, last, _), rest = index[0].indices(shape[0]), index[1:]
    if all(s.indices(n) == (0, n, 1) for s, n in zip(rest, shape[1:], strict=True)):
        return rows(first, (last - first, *shape[1:]))
    few = max(1, PART_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize))
    counts = [len(range(*s.indices(n))) for s, n in zip(rest, shape[1:], strict=True)]
    out = np.empty((max(0, last - first), *counts), dtype)
    for at in range(first, last, few):
        count = min(few, last - at)
        out[at - first : at - first + count] = rows(at, (count, *shape[1:]))[:, *rest]
    return out
