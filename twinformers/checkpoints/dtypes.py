"""The float types of checkpoints by name, casting between them, and what is lost by it."""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twinformers.checkpoints.layout import contiguous, empty, pieces
from twinformers.errors import UsageError, WeightsError

if TYPE_CHECKING:
    import numpy as np

    from twinformers.checkpoints.safetensors_io import Entry

log = logging.getLogger(__name__)

DTYPES = ("float64", "float32", "bfloat16", "float16")


def check_dtype(name: str, *, keep: bool = False) -> str:
    """The name itself. Raises UsageError for what is no float type of a checkpoint."""
    allowed = (("keep",) if keep else ()) + DTYPES
    if name not in allowed:
        raise UsageError(
            "unknown dtype", where="dtype", expected=f"one of {', '.join(allowed)}", found=repr(name)
        )
    return name


def numpy_dtype(name: str) -> np.dtype:
    """numpy's dtype of that name; ml_dtypes gives numpy its bfloat16."""
    import ml_dtypes
    import numpy as np

    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def stored_dtype(dtype: str, stored: str) -> str:
    """What a tensor stored as `stored` becomes; a quantised one is kept as float32."""
    if dtype != "keep":
        return dtype
    return stored if stored in DTYPES else "float32"


def widest(names: set[str]) -> str:
    """The smallest dtype that holds what each of them holds: float32 for bfloat16 and float16 together."""
    if len(names) == 1:
        return next(iter(names))
    return "float64" if "float64" in names else "float32"


def cast(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """The array in that dtype. A finite value that becomes infinite is reported as a warning."""
    import numpy as np

    target = numpy_dtype(dtype)
    if array.dtype == target:
        return array
    result = _cast(array, target)
    if not _holds(target, array.dtype):
        lost = int(np.count_nonzero(np.isinf(result)) - np.count_nonzero(np.isinf(array)))
        if lost:
            _warn_overflow(name, lost, dtype)
    return result


def _cast(array: np.ndarray, target: np.dtype) -> np.ndarray:
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(target)


def _holds(target: np.dtype, source: np.dtype) -> bool:
    """Whether every value of the source's type is one of the target's."""
    import ml_dtypes

    ours, theirs = ml_dtypes.finfo(target), ml_dtypes.finfo(source)
    return ours.nexp >= theirs.nexp and ours.nmant >= theirs.nmant


def _warn_overflow(name: str, count: int, dtype: str) -> None:
    log.warning("%s: %d values are too large for %s and became infinite", name, count, dtype)


@dataclass
class Loss:
    """What a dtype could not hold: the largest relative error and its tensor, and what has none.

    `overflows` counts finite values that became infinite, `zeros` those that became zero.
    """

    relative: float = 0.0
    tensor: str = ""
    overflows: int = 0
    zeros: int = 0


class Ledger:
    """Hands tensors to writers in pieces, and keeps account of what is in them and of what casting loses.

    A NaN or an infinity is warned of once for each tensor, and with `strict` refused. `losses` is by the name
    of the dtype, for those that did not hold what they were given. All of it runs over pieces small enough
    for the processor's cache, so that it takes no memory and less time than a checksum.
    """

    def __init__(self, strict: bool = False):
        self.strict = strict
        self.losses: dict[str, Loss] = {}

    def pieces(self, entry: Entry) -> Iterator[np.ndarray]:
        """The tensor in its dtype and in row-major order, flat, a few megabytes at a time.

        Raises WeightsError for what is not finite, if that is refused, and for a tensor of another shape.
        """
        return self._pieces(entry, self._raw(entry))

    def array(self, entry: Entry) -> np.ndarray:
        """The whole tensor in its dtype, contiguous."""
        raw, target = self._raw(entry), numpy_dtype(entry.dtype)
        if raw.dtype == target:
            result = contiguous(raw)
            deque(self._pieces(entry, result), maxlen=0)  # they are looked at
            return result
        result = empty(entry.shape, target)
        flat, filled = result.reshape(-1), 0
        for piece in self._pieces(entry, raw):
            flat[filled : filled + piece.size] = piece
            filled += piece.size
        return result

    def _pieces(self, entry: Entry, array: np.ndarray) -> Iterator[np.ndarray]:
        target, overflows = numpy_dtype(entry.dtype), 0
        nans = infinities = 0
        for piece in pieces(array):
            found = _not_finite(piece)
            nans, infinities = nans + found[0], infinities + found[1]
            if piece.dtype == target:
                yield piece
                continue
            if piece.itemsize == target.itemsize == 2:
                result, changed = _looked_up(piece, target)
                overflows += self._account(entry, piece[changed], result[changed])
            else:
                result = _cast(piece, target)
                if not _holds(target, piece.dtype):
                    overflows += self._account(entry, piece, result)
            yield result
        if overflows:
            _warn_overflow(entry.name, overflows, entry.dtype)
        if nans or infinities:
            if self.strict:
                raise WeightsError(
                    "a weight is not finite",
                    where=entry.source or entry.name,
                    expected="finite values only, as --strict asks",
                    found=f"{nans} NaN, {infinities} infinite",
                    hint="it is damaged or its training diverged; port without --strict to keep it",
                )
            log.warning("%s: %d values are NaN, %d infinite", entry.source or entry.name, nans, infinities)

    def _raw(self, entry: Entry) -> np.ndarray:
        array = entry.produce()
        if array.shape != entry.shape:
            raise WeightsError(
                "a tensor is not what its header says",
                where=entry.name,
                expected=str(list(entry.shape)),
                found=str(list(array.shape)),
            )
        return array

    def _account(self, entry: Entry, before: np.ndarray, after: np.ndarray) -> int:
        import numpy as np

        loss = self.losses.setdefault(entry.dtype, Loss())
        wide = np.promote_types(before.dtype, np.float32) if before.dtype.kind == "f" else np.float32
        overflows = 0
        for start in range(0, before.size, _CACHED):
            old = before[start : start + _CACHED].astype(wide)
            new = after[start : start + _CACHED].astype(wide)
            different = new != old
            if 4 * np.count_nonzero(different) < old.size:  # most are exact, in float16 from bfloat16
                old, new = old[different], new[different]
            with np.errstate(divide="ignore", invalid="ignore"):
                error = np.abs(new - old) / np.abs(old)
            for lost in (gone := np.isinf(new) & np.isfinite(old), zero := (new == 0) & (old != 0)):
                error[lost] = 0
            overflows += int(np.count_nonzero(gone))
            loss.zeros += int(np.count_nonzero(zero))
            worst = float(np.fmax.reduce(error, initial=0))  # passes over NaN
            if worst > loss.relative:
                loss.relative, loss.tensor = worst, entry.name
        loss.overflows += overflows
        return overflows


@functools.cache
def _table(source: np.dtype, target: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """What each of the 65,536 values of a type of 16 bits becomes in another, and whether that differs."""
    import numpy as np

    before = np.arange(1 << 16, dtype=np.uint16).view(source)
    after = _cast(before, target)
    wide = before.astype(np.float32)
    return after, (after.astype(np.float32) != wide) & ~np.isnan(wide)


def _looked_up(flat: np.ndarray, target: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The values in another type of 16 bits, and the places of those that changed.

    Looking them up is three times as fast as a cast and a comparison.
    """
    import numpy as np

    values, changes = _table(flat.dtype, target)
    bits, out, changed = flat.view(np.uint16), np.empty(flat.shape, target), []
    place, flags = np.empty(min(_CACHED, flat.size), np.intp), np.empty(min(_CACHED, flat.size), bool)
    for start in range(0, flat.size, _CACHED):
        part = bits[start : start + _CACHED]
        np.copyto(place[: part.size], part)
        here = place[: part.size]
        np.take(
            values, here, out=out[start : start + _CACHED], mode="wrap"
        )  # "raise" would go through a copy
        np.take(changes, here, out=flags[: part.size], mode="wrap")
        changed.append(np.flatnonzero(flags[: part.size]) + start)
    return out, np.concatenate(changed) if changed else np.empty(0, np.intp)


#: Elements that are looked at at a time: with what is made of them, they stay in the processor's cache.
_CACHED = 1 << 16


def _not_finite(flat: np.ndarray) -> tuple[int, int]:
    """How many NaN and infinite values there are, by their bits."""
    import numpy as np

    bits = flat.view(f"u{flat.itemsize}")
    infinity = np.array(np.inf, flat.dtype).view(bits.dtype)
    sign = bits.dtype.type(1 << (8 * flat.itemsize - 1))
    nans = infinities = 0
    scratch = np.empty(min(_CACHED, bits.size), bits.dtype)
    for start in range(0, bits.size, _CACHED):
        part = bits[start : start + _CACHED]
        magnitude = np.bitwise_and(part, ~sign, out=scratch[: part.size])
        if magnitude.max() >= infinity:
            nans += int(np.count_nonzero(magnitude > infinity))
            infinities += int(np.count_nonzero(magnitude == infinity))
    return nans, infinities
