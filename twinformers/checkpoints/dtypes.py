"""The float types of checkpoints by name, and casting between them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from twinformers.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

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
    with np.errstate(over="ignore"):
        result = array.astype(target)
    if target.itemsize < array.dtype.itemsize or dtype == "float16":
        lost = int(np.count_nonzero(np.isinf(result)) - np.count_nonzero(np.isinf(array)))
        if lost:
            log.warning("%s: %d values are too large for %s and became infinite", name, lost, dtype)
    return result
