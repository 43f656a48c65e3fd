"""One table per architecture; `weight_map(config)` finds it by the stem."""

from __future__ import annotations

import importlib

from twinformers.configs import Config
from twinformers.weight_maps.base import Leaf, WeightMap

__all__ = ["Leaf", "WeightMap", "weight_map"]


def weight_map(config: Config) -> WeightMap:
    """The weight map of this very configuration."""
    module = importlib.import_module(f"{__name__}.{config.architecture}")
    return module.weight_map(config)
