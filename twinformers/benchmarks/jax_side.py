"""The Flax twin's measurements."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from twinformers.benchmarks.cases import Case
from twinformers.benchmarks.side import EDGES, LONG, Twin, long_array


class JaxSide(Twin):
    framework = "jax"

    def __init__(self, source: str, dtype: str, *options: Any):
        jax.config.update("jax_enable_x64", dtype == "float64")
        # What PyTorch does without being asked; a GPU would otherwise round float32 to TF32.
        jax.config.update("jax_default_matmul_precision", "highest")
        super().__init__(source, dtype, *options)
        jax.config.update("jax_default_device", self.device)

    def default_device(self) -> Any:
        return jax.devices()[0]

    def about(self) -> dict[str, Any]:
        platform = "gpu" if self.device.platform in ("gpu", "cuda", "rocm") else self.device.platform
        # XLA's pool has a thread for each core that the process may use.
        return {
            "platform": platform,
            "device": self.device.device_kind,
            "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        }

    def wait(self) -> None:
        # A device works through what it is given in order.
        jax.block_until_ready(jax.device_put(0, self.device) + 0)

    def read(self, dtype: str, decoding: bool) -> Any:
        model = super().read(dtype, decoding)
        jax.block_until_ready(nnx.to_pure_dict(nnx.state(model)))
        return model

    def forget_compiled(self) -> None:
        jax.clear_caches()

    def trainer(self, case: Case, variant: str) -> Callable[[], float]:
        update = self.stepper(case)
        self.drop()  # the state is a copy
        return update

    def device_bytes(self) -> int | None:
        return (self.device.memory_stats() or {}).get("peak_bytes_in_use")

    @staticmethod
    def _finished(function: Callable[..., Any], *args: Any) -> None:
        jax.block_until_ready(function(*args))

    # Compiled once for all rounds.
    _add = staticmethod(jax.jit(partial(jnp.sum, axis=1)))
    _multiply = staticmethod(jax.jit(jnp.matmul))

    def bandwidth(self) -> dict[str, float]:
        rows = long_array().reshape(LONG >> 14, 1 << 14)  # so that every thread has some
        x = jax.device_put(rows, self.device, may_alias=True)
        return {"jax": 4 * LONG / self.fastest(partial(self._finished, self._add, x))}

    def matrix(self) -> dict[str, float]:
        matrix = 0.0
        for edge in EDGES["cpu" if self.about()["platform"] == "cpu" else "gpu"]:
            x = jnp.asarray(np.full((edge, edge), 0.5), self.dtype)
            seconds = self.fastest(partial(self._finished, self._multiply, x, x))
            matrix = max(matrix, 2 * edge**3 / seconds)
        return {"jax": matrix}
