"""Parts of a checkpoint's parameters as a twin has them, cut where they are read; for either framework."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twinformers.checkpoints.base import Checkpoint
from twinformers.checkpoints.dtypes import cast
from twinformers.weight_maps import weight_map

if TYPE_CHECKING:
    import numpy as np


class Parts:
    """The parts of one parameter as a twin has it: `parts(index)`, each read when asked for.

    `side` is "jax" or "torch", `dtype` what the twin is to have. A part is contiguous and the caller's own.
    Devices that keep the same part ask one after another, so the last one is remembered.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, side: str, dtype: str):
        self._checkpoint, self._side, self._dtype = checkpoint, side, dtype
        self._leaf = weight_map(checkpoint.config).leaves(side)[name]
        self._last: tuple[Any, Any] = (None, None)

    @property
    def trains(self) -> bool:
        """Whether it is a parameter, and no buffer."""
        return self._leaf.trains

    def __call__(self, index: tuple[slice, ...]) -> np.ndarray:
        import numpy as np

        asked = tuple((s.start, s.stop) for s in index)
        if self._last[0] != asked:
            self._last = (None, None)  # let go before more is read
            part = self._read(index)
            name = self._leaf.name(self._checkpoint.side)
            self._last = (asked, np.require(cast(part, self._dtype, name), requirements=["C", "W"]))
        return self._last[1]

    def _read(self, index: tuple[slice, ...]) -> np.ndarray:
        leaf, side = self._leaf, self._checkpoint.side
        name = leaf.name(side)
        order = leaf.order(side, self._side)
        if order is None:  # the axes themselves are taken apart
            return leaf.move(self._checkpoint.read(name), side, self._side)[index]
        there = [slice(None)] * len(index)
        for here, axis in enumerate(order):
            there[axis] = index[here]
        return self._checkpoint.read_part(name, tuple(there)).transpose(order)
