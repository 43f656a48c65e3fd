"""The model that a run leaves: an ordinary folder, written a weight at a time, whatever devices have it."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from twinformers.checkpoints import port
from twinformers.checkpoints.base import Checkpoint, TensorInfo
from twinformers.configs import Config
from twinformers.errors import WorkerError
from twinformers.training.text.processes import Processes
from twinformers.training.text.settings import Run
from twinformers.weight_maps import weight_map

PORT = "import sys; from twinformers.checkpoints import port; port(*sys.argv[1:], to='jax', overwrite=True)"


class Trained(Checkpoint):
    """A trainer's weights as a source, in the torch twin's names; each is gathered when it is read.

    All processes take part in that: who reads a weight here tells the others its name first.
    """

    format = "memory"
    side = "torch"

    def __init__(self, config: Any, dtype: str, trainer: Any, processes: Processes, assets: dict[str, bytes]):
        super().__init__("the training run", config)
        self._dtype, self._trainer, self._processes, self._assets = dtype, trainer, processes, assets
        self._one = threading.Lock()  # the others follow one at a time

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        leaves = weight_map(self.config).leaves("torch")
        return {name: TensorInfo(leaf.shape("torch"), self._dtype, "") for name, leaf in leaves.items()}

    def read(self, name: str) -> np.ndarray:
        with self._one:
            self._processes.tell(name)
            return self._trainer.weight(name)

    @property
    def assets(self) -> Mapping[str, bytes]:
        return self._assets


def write_model(
    run: Run, config: Config, trainer: Any, processes: Processes, tokenizer: dict[str, bytes]
) -> None:
    """Write `OUT/model` in the framework's format. The first process writes, the others give their parts."""
    if not processes.first:
        while name := processes.tell():
            trainer.weight(name)
        return
    assets = {"generation_config.json": json.dumps({"do_sample": False}).encode() + b"\n", **tokenizer}
    source, place = Trained(config, run.settings.dtype, trainer, processes, assets), run.folder / "model"
    try:
        if run.settings.framework == "jax" and processes.count > 1:
            _apart(source, place)
        else:
            port(source, place, to=run.settings.framework, overwrite=True)
    finally:
        processes.tell("")


def _apart(source: Checkpoint, place: Path) -> None:
    """Write a jax folder by a process of its own: among several, Orbax saves nothing without all of them."""
    between = place.with_name(".model")
    try:
        port(source, between, to="torch", overwrite=True)
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}  # the devices are taken
        command = [sys.executable, "-c", PORT, str(between), str(place)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise WorkerError("the model cannot be written", where=str(place), found=done.stderr[-600:])
    finally:
        shutil.rmtree(between, ignore_errors=True)


def parameters(config: Config) -> int:
    """How many numbers a model keeps."""
    return sum(math.prod(leaf.shape("torch")) for leaf in weight_map(config).leaves("torch").values())
