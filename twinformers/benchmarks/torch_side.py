"""The PyTorch twin's measurements, and what transformers' model shares with them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from twinformers.benchmarks.cases import Case
from twinformers.benchmarks.side import EDGES, LONG, Side, Twin, long_array, numpy_bandwidth


class OnTorch(Side):
    """The device, its memory and its limits."""

    def default_device(self) -> Any:
        return torch.get_default_device()

    def about(self) -> dict[str, Any]:
        if self.device.type == "cuda":
            return {
                "platform": "gpu",
                "device": torch.cuda.get_device_name(self.device),
                "threads": torch.get_num_threads(),
            }
        return {"platform": self.device.type, "device": self.device.type, "threads": torch.get_num_threads()}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _timed(self, work: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            return super()._timed(work)
        # The device's own clock, between two points of the queue that `work` joins: what the host takes to
        # learn that it is done does not count. JAX has no such events, its side waits and reads the host's.
        with torch.cuda.device(self.device):
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.wait()
            started.record()
            work()
            ended.record()
            self.wait()
        return started.elapsed_time(ended) / 1000  # milliseconds

    def forget_compiled(self) -> None:
        # It would also give up compiling after a few shapes.
        torch._dynamo.reset()

    def forget(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def device_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    @torch.inference_mode()
    def bandwidth(self) -> dict[str, float]:
        x = torch.from_numpy(long_array()).to(self.device)
        found = {"torch": 4 * LONG / self.fastest(x.sum)}
        del x
        if self.device.type == "cpu":
            found["numpy"] = numpy_bandwidth(self, torch.get_num_threads())
        return found

    @torch.inference_mode()
    def matrix(self) -> dict[str, float]:
        matrix = 0.0
        for edge in EDGES["cpu" if self.device.type == "cpu" else "gpu"]:
            x = torch.full((edge, edge), 0.5, dtype=getattr(torch, self.dtype), device=self.device)
            seconds = self.fastest(partial(torch.matmul, x, x))
            matrix = max(matrix, 2 * edge**3 / seconds)
        return {"torch": matrix}


class TorchSide(OnTorch, Twin):
    framework = "torch"

    def trainer(self, case: Case, variant: str) -> Callable[[], float]:
        return self.stepper(case, compiled=variant == "compile")
