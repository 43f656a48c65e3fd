"""What every framework's side has: one measurement of a case, and the machine's limits in that framework."""

from __future__ import annotations

import contextlib
import gc
import importlib
import mmap
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from twinformers.allocator import give_back
from twinformers.benchmarks.cases import Case
from twinformers.checkpoints import opened
from twinformers.loading import find_device, load, load_tokenizer

PROMPT = "Once upon a time"
#: What is asked for after it, as `generate` would; the first one is waited for.
NEW_TOKENS = 64
#: Numbers of four bytes to add up: half a gigabyte, which no cache holds.
LONG = 1 << 27
#: Edges of square products: the best of several is the peak.
EDGES = {"cpu": (512, 1024, 2048), "gpu": (2048, 4096, 8192)}
TRIES = 5


class Side(ABC):
    """One framework with one source of weights, in one process."""

    framework: str

    def __init__(
        self,
        source: str,
        dtype: str,
        device: str | None,
        attention: str = "fused",
        quantize: str | None = None,
    ):
        self.source, self.dtype, self.attention, self.quantize = source, dtype, attention, quantize
        self.device = find_device(self.framework_of_device, device) or self.default_device()
        with opened(source) as checkpoint:
            self.config: Any = checkpoint.config
        self.model: Any = None
        self._held = ("", False)

    @property
    def framework_of_device(self) -> str:
        return "jax" if self.framework == "jax" else "torch"

    @abstractmethod
    def default_device(self) -> Any: ...

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Where it runs: `platform` is cpu, gpu or tpu; `device` its name; `threads` on the CPU."""

    @abstractmethod
    def wait(self) -> None:
        """Return when everything that was asked of the device is done."""

    @abstractmethod
    def read(self, dtype: str, decoding: bool) -> Any:
        """The model, from the folder to the device; `decoding` where it is to generate."""

    @abstractmethod
    def decode(self, case: Case, variant: str, count: int) -> list[list[int]]:
        """Continue the case's prompts by `count` tokens. [count, B]"""

    @abstractmethod
    def prefill(self, case: Case, variant: str) -> list[list[int]]:
        """The first new token of each of the case's prompts. [1, B]"""

    @abstractmethod
    def trainer(self, case: Case, variant: str) -> Callable[[], float]:
        """A function that makes one update and gives the loss before it."""

    @abstractmethod
    def device_bytes(self) -> int | None:
        """The most memory that an accelerator had to give since `forget`."""

    @abstractmethod
    def bandwidth(self) -> dict[str, float]:
        """Measured bytes/s of reading, by what measured them."""

    @abstractmethod
    def matrix(self) -> dict[str, float]:
        """Measured FLOP/s of square products, by what measured them."""

    def forget(self) -> None:  # noqa: B027  (not every framework can)
        """Let the accelerator's peak begin anew."""

    def load(self, dtype: str = "", decoding: bool = False) -> None:
        self.release()
        self.drop()
        gc.collect()
        held = dtype or self.dtype, decoding
        self.model, self._held = self.read(*held), held
        self.wait()

    def drop(self) -> None:
        """Keep no model: the next case reads it again."""
        self.model, self._held = None, ("", False)

    @property
    def narrow(self) -> bool:
        """Whether the dtype is too coarse for weights that train: those stay float32, the products do not."""
        return self.dtype in ("bfloat16", "float16")

    def release(self) -> None:
        """Give up what the last case needed beside the model, and what it compiled: the next compiles too."""
        self._updates: dict[tuple[Case, str], Callable[[], float]] = {}
        self.forget_compiled()
        gc.collect()

    @abstractmethod
    def forget_compiled(self) -> None: ...

    def prompts(self, case: Case) -> np.ndarray:
        """Random tokens. [B, T]"""
        return np.random.default_rng(0).integers(0, self.config.vocab_size, (case.batch, case.tokens))

    def first_token(self) -> int:
        """What a prompt goes on with, the tokenizer read too where there is one."""
        with opened(self.source) as checkpoint:
            given = "tokenizer.json" in checkpoint.assets
        ids = self.encode(PROMPT) if given else list(range(1, 8))
        return self.continued(ids)

    def encode(self, text: str) -> list[int]:
        return load_tokenizer(self.source).encode(text)

    @abstractmethod
    def continued(self, ids: list[int]) -> int: ...

    def run(self, case: Case, variant: str) -> dict[str, float]:
        """One measurement: `total` seconds that it took, and `seconds` of those that belong to the case."""
        dtype = "float32" if case.task == "train" and self.narrow else self.dtype
        wanted = dtype, case.task in ("decode", "prefill")
        if self._held != wanted and (case, variant) not in self._updates:
            self.drop()
            self.release()  # which collects what the model was
            give_back()  # one piece for all weights may find no room in what smaller ones left
            self.load(*wanted)
        if case.task == "decode":
            # One token is the prefill; what more of them take is decoding.
            first = self._timed(lambda: self.decode(case, variant, 1))
            total = self._timed(lambda: self.decode(case, variant, case.new_tokens))
            return {"seconds": total - first, "total": total}
        if case.task == "train":
            if (case, variant) not in self._updates:
                self._updates[case, variant] = self.trainer(case, variant)
            total = self._timed(self._updates[case, variant])
        elif case.task == "prefill":
            total = self._timed(lambda: self.prefill(case, variant))
        else:
            total = self._timed(self.load)
        return {"seconds": total, "total": total}

    def _timed(self, work: Callable[[], Any]) -> float:
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - started

    def fastest(self, work: Callable[[], Any]) -> float:
        """Seconds of the fastest of some runs after a first one."""
        return min([self._timed(work) for _ in range(1 + TRIES)][1:])


class Twin(Side):
    """A twin with its generation engine."""

    _engine: Any = None

    def release(self) -> None:
        self._engine = None
        super().release()

    def read(self, dtype: str, decoding: bool) -> Any:
        options = {"attention": self.attention, "decoding": decoding, "quantize": self.quantize}
        return load(self.source, self.framework, dtype, self.device, **options)  # type: ignore[arg-type]

    def stepper(self, case: Case, **options: Any) -> Callable[[], float]:
        """The training step on one batch, again and again."""
        from twinformers.training.adamw import AdamW
        from twinformers.training.step import random_batch

        if self.narrow:
            options["compute_dtype"] = self.dtype
        module = importlib.import_module(f"twinformers.training.{self.framework}_step")
        step = module.make_step(self.model, AdamW(), **options)
        batch = random_batch(self.config, case.batch, case.tokens)
        state = step.init(self.model)

        def update() -> float:
            nonlocal state
            state, metrics = step(state, batch)
            return float(metrics.loss)

        return update

    def engine(self) -> Any:
        if self._engine is None:
            self._engine = importlib.import_module(f"{self.framework}_models.generate").Generator(self.model)
        return self._engine

    def steps(self, prompts: list[list[int]], count: int) -> Iterator[list[int | None]]:
        return self.engine().stream(prompts, max_new_tokens=count)

    def decode(self, case: Case, variant: str, count: int) -> list[list[int]]:
        return list(self.steps(self.prompts(case).tolist(), count))  # type: ignore[arg-type]

    def prefill(self, case: Case, variant: str) -> list[list[int]]:
        return self.decode(case, variant, 1)

    def continued(self, ids: list[int]) -> int:
        return int(next(self.steps([ids], NEW_TOKENS))[0])  # type: ignore[arg-type]


def long_array() -> np.ndarray:
    """An array of `LONG` ones whose memory goes with it: what malloc gave, this process would keep.

    In large pages where the system has them, as NumPy asks for: the limit is the memory's.
    """
    memory = mmap.mmap(-1, 4 * LONG)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.float32)
    array.fill(1.0)
    return array


def numpy_bandwidth(side: Side, threads: int) -> float:
    """Bytes/s of adding up in numpy, a part of the array for each thread."""
    parts = np.array_split(long_array(), threads)
    with ThreadPoolExecutor(threads) as pool:
        return 4 * LONG / side.fastest(lambda: list(pool.map(np.sum, parts)))
