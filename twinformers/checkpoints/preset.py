"""`preset:NAME`: a released model's shape with random weights from a seed, the same in both frameworks.

The weights are drawn so that a wrong port shows: matrices with standard deviation 1.5/sqrt(fan_in),
embeddings with 1, norm scales away from 1.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from twinformers.checkpoints.base import Checkpoint, TensorInfo
from twinformers.configs import Config
from twinformers.weight_maps import Leaf, weight_map

if TYPE_CHECKING:
    import numpy as np


class PresetCheckpoint(Checkpoint):
    """Random float32 weights; each tensor depends on the seed and its own name alone."""

    format = "preset"
    side = "torch"

    def __init__(self, source: str, config: Config, seed: int = 0):
        super().__init__(source, config)
        self.seed = seed

    @cached_property
    def _leaves(self) -> Mapping[str, Leaf]:
        return weight_map(self.config).leaves("torch")

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:  # type: ignore[override]
        return {n: TensorInfo(leaf.shape("torch"), "float32", "") for n, leaf in self._leaves.items()}

    def read(self, name: str) -> np.ndarray:
        import numpy as np

        leaf = self._leaves[name]
        generator = np.random.Generator(np.random.Philox(key=[self.seed, zlib.crc32(name.encode())]))
        draw = generator.standard_normal(leaf.shape("torch"), dtype=np.float32)
        kind = leaf.name("jax").rpartition(".")[2]
        if kind == "kernel":
            draw *= np.float32(1.5 / np.sqrt(draw.shape[-1]))
        elif kind == "scale":
            draw = 1 + np.float32(0.3) * draw
        elif kind == "bias":
            draw *= np.float32(0.5)
        return draw

    @property
    def assets(self) -> Mapping[str, bytes]:
        return {"generation_config.json": (json.dumps({"do_sample": False}) + "\n").encode()}
