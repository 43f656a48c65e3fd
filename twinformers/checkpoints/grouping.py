"""From multi-head to grouped-query attention: key and value heads pooled into fewer by their mean.

Ainslie et al. 2023 (arXiv:2305.13245, section 2.1) start so before they train on: the mean keeps more of
what was learned than one head of each group or new weights would. The result is another model, close to
the first only after that training; where the heads of a group are equal already, it is the same one.

Rotary positions need no care: every head of a token is turned by the same angles, and the mean of turned
keys is the turned mean. Query head n reads key-value head n // G before and after, so a new head is the
mean of neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from twinformers.checkpoints.base import Checkpoint, TensorInfo
from twinformers.configs import Config
from twinformers.errors import UsageError
from twinformers.weight_maps import Leaf, weight_map

if TYPE_CHECKING:
    import numpy as np


#: How the present heads are counted: the new heads one after the other, each with its neighbours.
NEIGHBOURS = "K pooled"


def grouped(checkpoint: Checkpoint, num_key_value_heads: int) -> Checkpoint:
    """The checkpoint with its key and value heads pooled to that many; whatever is read is pooled on the way.

    Every tensor whose axes hold the key-value heads is averaged in float64 and cast back to its own dtype.
    Raises UsageError where the architecture has no grouped form or the number does not divide the present
    one, WeightsError where the tensors are not those of the configuration.
    """
    config = checkpoint.config
    heads = getattr(config, "num_key_value_heads", None)
    if heads is None:
        raise UsageError(
            "this architecture has no grouped-query form",
            where="kv_heads",
            expected="an architecture with num_key_value_heads",
            found=config.architecture,
        )
    if num_key_value_heads < 1 or heads % num_key_value_heads:
        raise UsageError(
            "key-value heads cannot be pooled into groups of one size",
            where="kv_heads",
            expected=f"a divisor of num_key_value_heads = {heads}",
            found=str(num_key_value_heads),
        )
    weight_map(config).check(checkpoint.side, checkpoint.tensors, checkpoint.source)
    return _Grouped(checkpoint, config.replace(num_key_value_heads=num_key_value_heads))


class _Grouped(Checkpoint):
    """Another checkpoint's tensors in its own names and layout, with fewer key-value heads."""

    def __init__(self, checkpoint: Checkpoint, config: Config):
        super().__init__(checkpoint.source, config)
        self.format, self.side = checkpoint.format, checkpoint.side
        self._original = checkpoint
        self._before = weight_map(checkpoint.config).tensors(self.side)
        self._after = weight_map(config).tensors(self.side)

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:  # type: ignore[override]
        return {
            name: replace(info, shape=self._after[name][0].shape(self.side)) if name in self._after else info
            for name, info in self._original.tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        array = self._original.read(name)
        if self.tensors[name].shape == array.shape:
            return array
        parts = zip(self._before[name], self._after[name], strict=True)
        pieces = [
            self._pool(before.move(array, self.side, self.side), before, after) for before, after in parts
        ]
        return self._after[name][0].pack(pieces, self.side)

    def _pool(self, piece: np.ndarray, before: Leaf, after: Leaf) -> np.ndarray:
        """One parameter in the side's axes. Queries that are stored by group, "(K G H)", are no key heads."""
        import numpy as np
        from einops import reduce

        axes = before.places[self.side].own_axes
        sizes = {a: after.sizes[a] for a in re.findall(r"[A-Za-z]\w*", axes)}
        if "K" not in sizes or "G" in sizes:
            return piece
        pattern = re.sub(r"\bK\b", NEIGHBOURS, axes) + f" -> {axes}"
        sizes["pooled"] = before.sizes["K"] // after.sizes["K"]
        return reduce(piece.astype(np.float64), pattern, "mean", **sizes).astype(piece.dtype)

    @property
    def assets(self) -> Mapping[str, bytes]:
        return self._original.assets

    @property
    def files(self) -> list[str]:
        return self._original.files

    def close(self) -> None:
        self._original.close()
