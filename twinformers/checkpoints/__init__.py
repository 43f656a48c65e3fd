"""Reading and writing weights: one interface for every format, headers before data."""

from __future__ import annotations

from twinformers.checkpoints.base import Checkpoint, TensorInfo
from twinformers.checkpoints.grouping import grouped
from twinformers.checkpoints.porting import PortResult, convert, port
from twinformers.checkpoints.sources import open_checkpoint, opened

__all__ = [
    "Checkpoint",
    "PortResult",
    "TensorInfo",
    "convert",
    "grouped",
    "open_checkpoint",
    "opened",
    "port",
]
