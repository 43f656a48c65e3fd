"""`bench`: every case by every implementation, one measurement in turn with the next, medians of several."""

from __future__ import annotations

import importlib.util
import itertools
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from twinformers.benchmarks.cases import FRAMEWORKS, Case, fits, known, positive
from twinformers.benchmarks.cost import BOUNDS, BYTES, QUANTIZED, cost
from twinformers.benchmarks.process import Worker, first_token
from twinformers.benchmarks.results import BenchResult, Peaks, Row, compared, limited, row
from twinformers.checkpoints import Checkpoint, opened, port
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.errors import MissingDependency, UsageError, WorkerError
from twinformers.loading import Source
from twinformers.parity.page import installed
from twinformers.weight_maps import weight_map

NEEDED = {"jax": "flax", "torch": "torch", "transformers": "transformers"}
EXTRAS = {"jax": "jax", "torch": "torch", "transformers": "reference"}
VERSIONS = ("twinformers", "jax", "jaxlib", "flax", "torch", "transformers", "numpy")
#: Every case compiles for itself, whatever earlier runs left.
COLD = {"JAX_ENABLE_COMPILATION_CACHE": "false", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
Progress = Callable[[str], None]


class Way(NamedTuple):
    """An implementation: a framework, and which of the ways that it offers."""

    framework: str
    variant: str


def bench(
    source: Source,
    cases: Sequence[Case],
    *,
    frameworks: Sequence[str] | None = None,
    dtype: str = "float32",
    attention: str = "fused",
    quantize: str | None = None,
    repeats: int = 5,
    jax_device: str | None = None,
    torch_device: str | None = None,
    limit: float = 300.0,
    on_progress: Progress = lambda text: None,
) -> BenchResult:
    """Measure the cases with "jax", "torch" and "transformers" (default: those that are installed).

    Each framework runs in a process of its own and reads the same Hugging Face folder, into which the source
    is ported first. `attention` and `quantize` are those of the twins, as in `load`: transformers' weights
    stay as they are, and what is rounded is not trained. An implementation that is not ready for a case after
    `limit` seconds has no figures for it, and its row says so. Raises UsageError for bad options and for what
    is no causal language model, MissingDependency for a framework that was asked for and is not installed,
    and the errors of the source.
    """
    known("dtype", [dtype], tuple(BYTES))
    known("quantize", [quantize] if quantize else [], QUANTIZED)
    positive("repeats", repeats)
    positive("limit", limit)
    chosen = _installed(frameworks)
    if not cases:
        raise UsageError("there is nothing to measure", where="task", expected="at least one case")
    if quantize and any(case.task == "train" for case in cases):
        raise UsageError(
            "rounded weights do not train", where="quantize", expected="other tasks", found="train"
        )
    # A compiler that was ended may still be writing.
    temporary = tempfile.TemporaryDirectory(prefix="twinformers-bench-", ignore_cleanup_errors=True)
    with temporary as room, opened(source) as checkpoint:
        config: Any = checkpoint.config
        if config.kind != "causal":
            raise UsageError(
                "only causal language models are measured",
                where=checkpoint.source,
                expected="a model that continues a text",
                found=config.architecture,
            )
        fits(cases, config)
        devices = {"jax": jax_device, "torch": torch_device, "transformers": torch_device}
        bench_ = _Bench(
            Path(room), chosen, dtype, (attention, quantize), devices, repeats, limit, on_progress
        )
        rows: list[Row] = []
        for layers, group in itertools.groupby(cases, key=lambda case: case.layers):
            with bench_.crew(checkpoint, layers):
                for case in group:
                    rows += bench_.rows(case, config)
        return BenchResult(
            checkpoint.source,
            config.architecture,
            weight_map(config).parameters,
            dtype,
            repeats,
            {
                **facts(bench_.about),
                "attention of the twins": attention,
                "weights of the twins": quantize or dtype,
            },
            bench_.peaks,
            rows,
        )


def interleaved(
    ways: Sequence[Way],
    measure: Callable[[Way], Any],
    repeats: int,
    begin: Callable[[], None] = lambda: None,
) -> tuple[dict[Way, list[Any]], dict[Way, str]]:
    """What each of the ways gave, round by round and in turn, and why one that failed takes no more part.

    `begin` begins each round.
    """
    found: dict[Way, list[Any]] = {way: [] for way in ways}
    errors: dict[Way, str] = {}
    for _ in range(repeats):
        begin()
        for way in ways:
            if way not in errors:
                try:
                    found[way].append(measure(way))
                except WorkerError as error:
                    errors[way] = said(error)
    return found, errors


def said(error: WorkerError) -> str:
    """The error in one line."""
    return "; ".join(part.strip() for part in str(error).splitlines())


class _Bench:
    """One run: its options, its processes, and what they say of the machine."""

    def __init__(
        self,
        room: Path,
        frameworks: Sequence[str],
        dtype: str,
        choice: tuple[str, str | None],
        devices: Mapping[str, str | None],
        repeats: int,
        limit: float,
        on_progress: Progress,
    ):
        self._room, self._frameworks, self._dtype, self._devices = room, frameworks, dtype, devices
        self._choice, self._repeats, self._limit, self._say = choice, repeats, limit, on_progress
        self._fresh = itertools.count()
        self._gone: dict[tuple[str, Way], str] = {}
        self.about: dict[str, dict[str, Any]] = {}
        self.peaks: Peaks = {}

    @contextmanager
    def crew(self, checkpoint: Checkpoint, layers: int | None) -> Iterator[None]:
        """A process for each framework, with the model at the depth that is asked for."""
        self._say("the weights as a Hugging Face folder")
        self._folder = str(_folder(checkpoint, layers, self._dtype, self._room))
        with ExitStack() as stack:
            self._workers = {name: self._worker(name, self._caches() | COLD) for name in self._frameworks}
            for worker in self._workers.values():
                stack.callback(worker.close)
            for name, worker in self._workers.items():
                self._say(f"{name} loads")
                worker.start(self._limit)
                self.about[name] = worker.about
            yield

    def rows(self, case: Case, config: Any) -> list[Row]:
        """Every implementation's row for a case."""
        ways = [Way(name, variant) for name in self._frameworks for variant in case.variants(name)]
        errors: dict[Way, str] = {}
        firsts: dict[Way, float] = {}
        if case.task == "start":
            measure = self._starts(case, ways, errors)
        else:
            measure = self._prepared(case, ways, errors, firsts)
        rounds: list[Peaks] = []

        def begin() -> None:
            if case.task in BOUNDS:
                rounds.append(self._measure_peaks(BOUNDS[case.task]))

        found, failed = interleaved([w for w in ways if w not in errors], measure, self._repeats, begin)
        for worker in self._workers.values():
            worker.forget()
        errors |= failed
        rows = compared(
            [row(case, *way, found.get(way, []), firsts.get(way), errors.get(way, "")) for way in ways]
        )
        return [
            limited(
                r,
                cost(config, case, self._dtype, None if r.framework == "transformers" else self._choice[1]),
                rounds,
                self.about[r.framework]["platform"],
            )
            for r in rows
        ]

    def _prepared(
        self, case: Case, ways: Sequence[Way], errors: dict[Way, str], firsts: dict[Way, float]
    ) -> Callable[[Way], Any]:
        """Run each once, in which it compiles; what then measures it."""
        for way in ways:
            # What did not compile in time once will not do so at the next size.
            if (case.task, way) in self._gone:
                errors[way] = self._gone[case.task, way]
                continue
            self._say(f"{case.label}: {' '.join(way)} for the first time")
            try:
                firsts[way] = self._workers[way.framework].ask(
                    "prepare", self._limit, case=case.to_dict(), variant=way.variant
                )["total"]
            except WorkerError as error:
                errors[way] = said(error)
                if way.variant == "compile":
                    self._gone[case.task, way] = errors[way]

        def measure(way: Way) -> Any:
            self._say(f"{case.label}: {' '.join(way)}")
            return self._workers[way.framework].ask(
                "measure", self._limit, case=case.to_dict(), variant=way.variant
            )

        return measure

    def _starts(
        self, case: Case, ways: Sequence[Way], errors: dict[Way, str]
    ) -> Callable[[Way], dict[str, Any]]:
        """What measures a fresh process: with empty caches each time, or with those of the one before it."""
        kept = {way: self._caches() for way in ways}

        def measure(way: Way) -> dict[str, Any]:
            self._say(f"{case.label}: {way.framework}")
            worker = self._worker(way.framework, kept[way] if case.warm else self._caches())
            return first_token(worker, self._limit)

        for way in ways if case.warm else ():
            try:
                measure(way)
            except WorkerError as error:
                errors[way] = said(error)
        return measure

    def _measure_peaks(self, kind: str) -> Peaks:
        """What the machine can do now, which other work on it may change from one minute to the next."""
        now: Peaks = {}
        for name, worker in self._workers.items():
            if name == "transformers" and "torch" in self._workers:
                continue  # it would measure the same
            self._say(f"the machine's {kind} in {name}")
            platform_ = worker.about["platform"]
            best = self.peaks.setdefault(platform_, {}).setdefault(kind, {})
            try:
                found = worker.ask(kind, self._limit)
            except WorkerError as error:  # the figures of the cases are worth having without
                self.about[name]["limits"] = said(error)
                continue
            now.setdefault(platform_, {}).setdefault(kind, {}).update(found)
            for by, value in found.items():
                best[by] = max(value, best.get(by, 0.0))
        return now

    def _worker(self, name: str, environment: Mapping[str, str]) -> Worker:
        # What they leave, should they be ended, goes with the room.
        environment = {**environment, "TMPDIR": str(self._room)}
        return Worker(name, self._folder, self._dtype, self._devices[name], environment, *self._choice)

    def _caches(self) -> dict[str, str]:
        """New, empty folders for what the frameworks compile."""
        place = self._room / f"compiled-{next(self._fresh)}"
        return {"JAX_COMPILATION_CACHE_DIR": f"{place}/jax", "TORCHINDUCTOR_CACHE_DIR": f"{place}/torch"}


def _installed(frameworks: Sequence[str] | None) -> list[str]:
    """The frameworks in our order. Raises UsageError for others, MissingDependency for what is not there."""
    known("framework", frameworks or (), FRAMEWORKS)
    present = [name for name in FRAMEWORKS if importlib.util.find_spec(NEEDED[name])]
    for name in frameworks or ():
        if name not in present:
            raise MissingDependency(
                f"{name} is not installed", hint=f"pip install 'twinformers[{EXTRAS[name]}]'"
            )
    chosen = [name for name in FRAMEWORKS if name in (frameworks or present)]
    if not chosen:
        raise MissingDependency("no framework is installed", hint="pip install 'twinformers[jax,torch]'")
    return chosen


def _folder(checkpoint: Checkpoint, layers: int | None, dtype: str, room: Path) -> Path:
    """A Hugging Face folder that all frameworks read: of the weights, or of random ones at another depth."""
    place = room / f"model-{layers or 'whole'}"
    if not place.exists():
        wanted: Source = checkpoint
        if layers:
            wanted = PresetCheckpoint(f"{layers} layers", checkpoint.config.replace(num_hidden_layers=layers))
        port(wanted, place, to="hf", dtype=dtype)
    return place


def facts(about: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Versions, machine, and where each framework ran with how many threads."""
    found = installed(VERSIONS)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found["machine"] = f"{platform.system()} {platform.machine()}, {_processor()}, {cores} cores"
    found["load when it ended"] = f"{os.getloadavg()[0]:.1f}"
    for name, a in about.items():
        found[f"{name} ran on"] = f"{a['device']}, {a['threads']} threads"
        if "limits" in a:
            found[f"limits in {name}"] = f"not measured: {a['limits']}"
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    return next(
        (x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "unknown processor"
    )
