"""Speed, memory and compile time of a framework, each measured in a process of its own.

A process that has run another framework has its memory and its caches already, so a fresh interpreter loads
the model, runs once to compile, and then several times against the clock. The run starts this module.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from twinformers.benchmarks.memory import resident
from twinformers.benchmarks.process import interpreter
from twinformers.checkpoints import Checkpoint, opened
from twinformers.errors import TwinformersError, first_line
from twinformers.loading import find_device, load
from twinformers.parity.kinds import Call, kind
from twinformers.parity.reference import precise, reference_model
from twinformers.parity.twins import jax_caller, torch_caller

NEW_TOKENS, REPEATS = 16, 5


@dataclass(frozen=True)
class Speed:
    """What one framework needed. Times and rates are medians of `repeats` runs after the first.

    `compile_seconds` is by how much the first prompt and step took longer than later ones. Memory is
    in bytes: of the process once the framework is imported, at its peak, and at the peak of an accelerator.
    `load` is how many processes wanted a core meanwhile. `error` says why there are no figures.
    """

    framework: str
    dtype: str
    prompt_tokens: int = 0
    new_tokens: int = 0
    repeats: int = 0
    load_seconds: float | None = None
    compile_seconds: float | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    imported_bytes: int | None = None
    peak_bytes: int | None = None
    device_bytes: int | None = None
    load: float | None = None
    error: str = ""


def measure(source: str, framework: str, dtype: str, device: str | None) -> Speed:
    """Run a fresh interpreter that measures "jax", "torch" or "transformers"."""
    command, environment = interpreter(__name__, [source, framework, dtype, device])
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode < 0:
        return Speed(framework, dtype, error=f"the process was ended by signal {-done.returncode}")
    try:
        return Speed(**json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError, TypeError):
        said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return Speed(framework, dtype, error=said[0][:300])


class _Flax:
    def __init__(self, checkpoint: Checkpoint, dtype: str, device: str | None):
        import jax

        jax.config.update("jax_enable_x64", dtype == "float64")
        jax.config.update("jax_default_matmul_precision", "highest")
        self._place = find_device("jax", device) or jax.devices()[0]
        jax.config.update("jax_default_device", self._place)
        self._checkpoint, self._dtype = checkpoint, dtype

    def load(self) -> None:
        self._model = load(self._checkpoint, "jax", self._dtype, self._place)
        self._call = jax_caller(self._model, ("__call__", "decode"))

    def run(self, prompt: Sequence[int], new: int) -> list[float]:
        return _timed(self._checkpoint, self._call, self._model.empty_cache, prompt, new)

    def device_bytes(self) -> int | None:
        return (self._place.memory_stats() or {}).get("peak_bytes_in_use")


class _Torch:
    def __init__(self, checkpoint: Checkpoint, dtype: str, device: str | None):
        import torch

        self._torch, self._place = torch, find_device("torch", device) or torch.get_default_device()
        self._checkpoint, self._dtype = checkpoint, dtype

    def load(self) -> None:
        self._model = load(self._checkpoint, "torch", self._dtype, self._place)

    def run(self, prompt: Sequence[int], new: int) -> list[float]:
        with self._torch.inference_mode():
            call = torch_caller(self._model, self._place)
            return _timed(self._checkpoint, call, self._model.empty_cache, prompt, new)

    def device_bytes(self) -> int | None:
        if self._place.type != "cuda":
            return None
        return self._torch.cuda.max_memory_allocated(self._place)


class _Transformers(_Torch):
    """transformers' own `generate`, with its fused attention where the model has it."""

    def load(self) -> None:
        with precise(self._dtype):
            self._model = reference_model(self._checkpoint, self._dtype).to(self._place)
        if self._model._supports_sdpa:
            self._model.set_attn_implementation("sdpa")

    def run(self, prompt: Sequence[int], new: int) -> list[float]:
        stamps = [time.perf_counter()]

        def stamp(tokens: Any, scores: Any) -> Any:
            scores.argmax().item()  # waits for an accelerator
            stamps.append(time.perf_counter())
            return scores

        with precise(self._dtype), self._torch.inference_mode():
            self._model.generate(
                self._torch.tensor([prompt], device=self._place),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                num_beams=1,
                logits_processor=[stamp],
            )
        return [after - before for before, after in itertools.pairwise(stamps)]


def _timed(
    checkpoint: Checkpoint, call: Call, empty_cache: Call, prompt: Sequence[int], new: int
) -> list[float]:
    """Seconds until the first new token, then for each one after it."""
    config, stamps = checkpoint.config, [time.perf_counter()]
    calls = kind(config)
    for _ in calls.steps(config, call, empty_cache, calls.prompted(config, prompt), new - 1):
        stamps.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(stamps)]


def _measured(source: str, framework: str, dtype: str, device: str | None) -> Speed:
    """Load, run once, run `REPEATS` times; in this process."""
    side: Any = {"jax": _Flax, "torch": _Torch, "transformers": _Transformers}[framework]
    with opened(source) as checkpoint:
        config: Any = checkpoint.config
        new = min(NEW_TOKENS, config.max_position_embeddings // 2)
        prompt = kind(config).inputs(config)[0][0].tolist()[: config.max_position_embeddings - new]
        model = side(checkpoint, dtype, device)
        imported, started = resident(peak=False), time.perf_counter()
        model.load()
        loaded = time.perf_counter() - started
        first, *runs = [model.run(prompt, new) for _ in range(1 + REPEATS)]
        prefill = statistics.median(run[0] for run in runs)
        step = statistics.median(seconds for run in runs for seconds in run[1:])
        return Speed(
            framework,
            dtype,
            prompt_tokens=len(prompt),
            new_tokens=new,
            repeats=REPEATS,
            load_seconds=loaded,
            compile_seconds=max(0.0, first[0] + first[1] - prefill - step),
            prefill_tokens_per_second=len(prompt) / prefill,
            decode_tokens_per_second=1 / step,
            imported_bytes=imported,
            peak_bytes=resident(peak=True),
            device_bytes=model.device_bytes(),
            load=round(os.getloadavg()[0], 1),
        )


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    try:
        result = _measured(*arguments)
    except (TwinformersError, RuntimeError, MemoryError) as error:  # RuntimeError: out of memory, say
        result = Speed(arguments[1], arguments[2], error=first_line(error))
    print(json.dumps(asdict(result)))
