"""`twinformers bench`: arithmetic by hand, order, processes that die, and figures that are consistent."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from twinformers import load, port
from twinformers.benchmarks import cases as all_cases
from twinformers.benchmarks import running
from twinformers.benchmarks.cases import Case, cases, swept
from twinformers.benchmarks.cost import cost, parameters
from twinformers.benchmarks.memory import forget_peak, resident
from twinformers.benchmarks.page import HEAD, TITLE, check_report, markdown, write_report
from twinformers.benchmarks.plots import _growth, write_plots
from twinformers.benchmarks.process import Worker
from twinformers.benchmarks.results import BenchResult, Row, compared, limited, row, steady
from twinformers.benchmarks.running import Way, bench, interleaved
from twinformers.benchmarks.side import LONG
from twinformers.cli.app import run
from twinformers.configs import preset
from twinformers.errors import DestinationError, MissingDependency, UsageError, WorkerError

SOURCE = "preset:llama-tiny"
TINY = preset("llama-tiny")
DECODE = Case(task="decode", batch=2, tokens=24, new_tokens=9)
PREFILL = Case(task="prefill", batch=2, tokens=24)
TRAIN = Case(task="train", batch=2, tokens=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "model"
    port(SOURCE, path, to="hf")
    return str(path)


# What the work amounts to


def test_parameters_by_hand():
    # V 251, D 48, F 88, L 3, N 6, K 2, H 10
    block = 48 * 60 + 2 * 48 * 20 + 60 * 48 + 3 * 48 * 88
    assert (block, 251 * 48, 7 * 48) == (20352, 12048, 336)
    found = parameters(TINY)
    assert (found.blocks, found.head, found.vectors) == (3 * 20352, 12048, 336)
    tied = parameters(TINY.replace(tie_word_embeddings=True))
    assert tied == found  # the table is the head, and as large as one


def test_decode_by_hand():
    # Three steps see 6, 7 and 8 tokens; each token has 2 x 3 layers x 2 heads x 10 numbers of cache.
    case = Case(task="decode", batch=2, tokens=5, new_tokens=4)
    weights = 61056 + 12048 + 336 + 2 * 48
    assert cost(TINY, case, "float32") == ("bandwidth", 4 * (3 * weights + 2 * 120 * (6 + 7 + 8)))
    assert cost(TINY, case, "bfloat16") == ("bandwidth", 2 * (3 * weights + 2 * 120 * (6 + 7 + 8)))


def test_products_by_hand():
    # Queries see 1, 2 and 3 keys; 2 products x 2 operations x 3 layers x 6 heads x 10.
    attention = 720 * (1 + 2 + 3)
    case = Case(task="prefill", batch=2, tokens=3)
    assert cost(TINY, case, "float32") == ("matrix", 2 * (2 * 61056 * 3 + 2 * 12048 + attention))
    case = Case(task="train", batch=2, tokens=3)
    assert cost(TINY, case, "float32") == ("matrix", 2 * (6 * (61056 + 12048) * 3 + 3 * attention))
    halved = replace(case, layers=1)
    assert cost(TINY, halved, "float32") == ("matrix", 2 * (6 * (20352 + 12048) * 3 + attention))
    assert cost(TINY, Case(task="load"), "float32") is None


def test_products_match_torch_flop_counter(folder):
    """It counts all products that the twin makes, those of masked keys too."""
    model, T = load(folder, "torch"), 24
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 251, (2, T)))
    with FlopCounterMode(display=False) as counter:
        model(tokens, torch.arange(T).expand(2, T))[0].sum().backward()
    masked = 720 * (T * T - T * (T + 1) // 2)
    assert counter.get_total_flops() == cost(TINY, TRAIN, "float32")[1] + 3 * 2 * masked


def test_bytes_match_the_modules(folder):
    model = load(folder, "torch")
    weights = sum(p.nbytes for name, p in model.named_parameters() if name != "embed.weight")
    cache = model.empty_cache(1, 10)
    per_token = (cache.k[:, :, :, 0].nbytes + cache.v[:, :, :, 0].nbytes) * 10
    found = cost(TINY, Case(task="decode", tokens=9, new_tokens=2), "float32")
    assert found == ("bandwidth", weights + 4 * 48 + per_token)


def test_bytes_of_rounded_weights_match_the_modules(folder):
    from torch_models.quantized import QuantizedLinear
    from twinformers.benchmarks.torch_side import TorchSide

    model = TorchSide(folder, "float32", None, "fused", "int8").read("float32", True)
    read = sum(p.nbytes for name, p in model.named_parameters() if name.endswith("norm.weight"))
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            read += module.weight.nbytes + module.scale.nbytes
    cache = model.empty_cache(1, 10)
    per_token = (cache.k[:, :, :, 0].nbytes + cache.v[:, :, :, 0].nbytes) * 10
    found = cost(TINY, Case(task="decode", tokens=9, new_tokens=2), "float32", "int8")
    assert found == ("bandwidth", read + 4 * 48 + per_token)


# Cases


def test_cases_of_the_tasks():
    found = cases(["decode", "load", "start"], batches=(1, 8), tokens=32, new_tokens=16)
    assert [(c.task, c.batch, c.warm) for c in found] == [
        ("decode", 1, False),
        ("decode", 8, False),
        ("load", 1, False),
        ("start", 1, False),
        ("start", 1, True),
    ]
    assert found[1].produced == 8 * 15 and Case(task="prefill", batch=2, tokens=7).produced == 14
    assert len(cases(["train", "train"], batches=(4, 4))) == 1


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        ("length", [("tokens", n) for n in (50, 100, 200, 400, 800)]),
        ("batch", [("batch", n) for n in (2, 4, 8, 16, 32)]),
        ("size", [("layers", n) for n in (1, 2, 3)]),
    ],
)
def test_sweeps_go_up(sweep, expected):
    case = Case(task="decode", batch=8, tokens=200, new_tokens=16)
    found = swept(case, sweep, TINY)
    assert [(name, getattr(c, name)) for (name, _), c in zip(expected, found, strict=True)] == expected
    assert {c.sweep for c in found} == {sweep}


def test_a_sweep_ends_where_the_model_does():
    found = swept(Case(task="prefill", tokens=600), "length", TINY)
    assert [c.tokens for c in found] == [150, 300, 600, 1023]
    all_cases.fits(found, TINY)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: cases(["sleep"]), "unknown task"),
        (lambda: cases(["decode"], batches=(0,)), "batch: bad value"),
        (lambda: cases(["decode"], tokens=0), "prompt_tokens: bad value"),
        (lambda: cases(["decode"], new_tokens=1), "new_tokens: bad value"),
        (lambda: swept(Case(task="load"), "length", TINY), "no size to sweep"),
        (lambda: swept(PREFILL, "width", TINY), "unknown sweep"),
        (lambda: bench(SOURCE, []), "nothing to measure"),
        (lambda: bench(SOURCE, [PREFILL], frameworks=["caffe"]), "unknown framework"),
        (lambda: bench(SOURCE, [PREFILL], dtype="keep"), "unknown dtype"),
        (lambda: bench(SOURCE, [PREFILL], quantize="int3"), "unknown quantize"),
        (lambda: bench(SOURCE, [PREFILL, TRAIN], quantize="int8"), "rounded weights do not train"),
        (lambda: bench(SOURCE, [PREFILL], repeats=0), "repeats: bad value"),
        (lambda: bench(SOURCE, [PREFILL], limit=math.nan), "limit: bad value"),
        (lambda: bench(SOURCE, [replace(PREFILL, tokens=1024)]), "more positions"),
        (lambda: bench(SOURCE, [replace(PREFILL, layers=-1)]), "num_hidden_layers"),
        (lambda: bench("preset:transformer-tiny", [PREFILL]), "only causal language models"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, said):
    with pytest.raises(Exception, match=said) as caught:
        wrong()
    assert type(caught.value).__module__ == "twinformers.errors"


def test_a_framework_that_is_missing(monkeypatch):
    monkeypatch.setattr(running.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"torch is not installed[\s\S]*twinformers\[torch\]"):
        bench(SOURCE, [PREFILL], frameworks=["torch"])
    with pytest.raises(MissingDependency, match="no framework"):
        bench(SOURCE, [PREFILL])


# Order and medians


def test_measurements_take_turns():
    ways, asked = [Way("jax", ""), Way("torch", ""), Way("transformers", "sdpa")], []
    begun = []

    def measure(way):
        asked.append(way)
        return len(asked)

    found, errors = interleaved(ways, measure, 3, lambda: begun.append(len(asked)))
    assert asked == ways * 3 and errors == {} and begun == [0, 3, 6]
    assert found == {ways[0]: [1, 4, 7], ways[1]: [2, 5, 8], ways[2]: [3, 6, 9]}


def test_who_fails_takes_no_more_part():
    ways, asked = [Way("jax", ""), Way("torch", "")], []

    def measure(way):
        asked.append(way)
        if len(asked) == 3:
            raise WorkerError("the process ended", where=way.framework)
        return 1.0

    found, errors = interleaved(ways, measure, 3)
    assert asked == [*ways, ways[0], ways[1], ways[1]] and errors == {ways[0]: "jax: the process ended"}
    assert found[ways[1]] == [1.0] * 3


def measured(*seconds, **more):
    return [{"seconds": s, "total": s + 1, "peak_bytes": 7 + n, **more} for n, s in enumerate(seconds)]


def test_row_by_hand():
    runs = measured(0.5, 4.0, 2.0, device_bytes=5)
    found = row(DECODE, "jax", "", runs, 10.0)
    assert (found.seconds, found.runs, found.tokens_per_second) == (2.0, [0.5, 4.0, 2.0], 2 * 8 / 2.0)
    part = limited(
        found, ("bandwidth", 60.0), [{"cpu": {"bandwidth": {"jax": 100.0, "numpy": 120.0}}}], "cpu"
    )
    assert (part.bound, part.limit, part.fraction) == ("bandwidth", 120.0, 60 / 2 / 120)
    assert limited(found, None, [], "cpu") == limited(found, ("matrix", 1.0), [], "cpu") == found
    assert (found.compile_seconds, found.peak_bytes, found.device_bytes) == (10.0 - 3.0, 9, 5)
    assert row(DECODE, "jax", "", measured(1.0, 2.0), None).seconds == 1.5
    assert row(Case(task="load"), "jax", "", runs, 1.0).tokens_per_second is None


def test_what_is_too_short_is_no_figure():
    found = row(DECODE, "jax", "", measured(-0.1, -0.2, 5.0), 1.0)
    assert "too short" in found.error and found.seconds is found.tokens_per_second is None
    assert limited(found, ("matrix", 1.0), [{"cpu": {"matrix": {"jax": 1.0}}}], "cpu").fraction is None


def test_ratio_is_to_the_fastest_of_transformers():
    def of(framework, variant, seconds):
        return row(DECODE, framework, variant, measured(seconds) if seconds else [], None)

    rows = [of("jax", "", 1.0), of("transformers", "eager", 8.0), of("transformers", "sdpa", 2.0)]
    assert [r.ratio for r in compared(rows)] == [2.0, 0.25, 1.0]
    assert [r.ratio for r in compared([rows[0], of("transformers", "sdpa", None)])] == [None, None]


def test_the_best_limit_is_taken_on_the_same_platform():
    peaks = {"cpu": {"bandwidth": {"jax": 3.0, "numpy": 5.0}}, "gpu": {"bandwidth": {"jax": 100.0}}}
    assert (steady([peaks], "cpu", "bandwidth"), steady([peaks], "gpu", "bandwidth")) == (5.0, 100.0)
    assert steady([peaks], "cpu", "matrix") is steady([], "cpu", "bandwidth") is None


def test_the_limit_is_that_of_most_rounds():
    rounds = [
        {"cpu": {"bandwidth": {"jax": j, "numpy": n}}} for j, n in ((3.0, 50.0), (4.0, 2.0), (9.0, 1.0))
    ]
    assert steady(rounds, "cpu", "bandwidth") == 4.0  # numpy's best is higher, and was an exception
    assert steady([*rounds, {}], "cpu", "bandwidth") == 4.0  # a round in which it failed


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can forget a peak")
def test_a_peak_is_forgotten():
    np.ones(32 << 20).sum()  # 256 MiB, given back at once
    before = resident(peak=True)
    forget_peak()
    assert resident(peak=True) < before - (100 << 20)


# Processes


class Scripted(Worker):
    """A worker whose process is a script that answers as the test wants."""

    script = "print(json.dumps({'value': {'platform': 'cpu'}}), flush=True)\n"

    def __init__(self, body):
        super().__init__("jax", SOURCE, "float32")
        self._code = f"import json, os, signal, sys, time\n{self.script}{body}"

    @property
    def command(self):
        return [sys.executable, "-c", self._code], dict(os.environ)


ECHO = "for line in sys.stdin: print(json.dumps({'value': json.loads(line)['method']}), flush=True)"
DIES = "line = sys.stdin.readline(); print('last words', file=sys.stderr, flush=True); "


def test_answers_follow_requests():
    worker = Scripted(ECHO)
    assert [worker.ask(m) for m in ("a", "b", "c")] == ["a", "b", "c"] and worker.about == {"platform": "cpu"}
    worker.close()
    worker.close()


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            r"jax: the process ended by signal SIGKILL[\s\S]*last words[\s\S]*memory",
        ),
        ("sys.exit(3)", r"jax: the process ended with exit code 3[\s\S]*last words"),
    ],
)
def test_a_worker_that_dies(end, said):
    worker = Scripted(DIES + end)
    for _ in range(2):  # it is started anew
        with pytest.raises(WorkerError, match=said):
            worker.ask("measure")
    assert worker._child is None


def test_a_worker_that_died_between_requests():
    worker = Scripted(ECHO)
    assert worker.ask("a") == "a"
    os.kill(worker._child.pid, signal.SIGKILL)
    worker._child.wait()
    with pytest.raises(WorkerError, match="SIGKILL"):
        worker.ask("b")
    assert worker.ask("c") == "c"
    worker.close()


def test_a_worker_that_does_not_answer_is_ended():
    worker = Scripted("time.sleep(600)")
    worker.start()
    pid = worker._child.pid
    with pytest.raises(WorkerError, match=r"jax: no answer within 0.2 s"):
        worker.ask("measure", 0.2)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_a_worker_starts_ends_with_it():
    worker = Scripted(
        "import subprocess\nsys.stdin.readline()\nchild = subprocess.Popen(['sleep', '600'])\n"
        "print(json.dumps({'value': child.pid}), flush=True)\ntime.sleep(600)"
    )
    pid = worker.ask("start")
    worker.close()
    for _ in range(200):  # whoever adopts it may take a moment
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child lives on")


@pytest.fixture(scope="module")
def workers(folder):
    found = {name: Worker(name, folder, "float32") for name in all_cases.FRAMEWORKS}
    yield found
    for worker in found.values():
        worker.close()


def test_every_framework_goes_on_with_the_same_token(workers):
    answers = [worker.ask("first_token", 120) for worker in workers.values()]
    assert len({a["token"] for a in answers}) == 1 and all(a["peak_bytes"] > 50 << 20 for a in answers)


def test_nothing_is_measured_unprepared(workers):
    with pytest.raises(WorkerError, match="started anew"):
        workers["torch"].ask("measure", case=PREFILL.to_dict(), variant="")


def test_an_error_leaves_the_worker_alive(workers):
    with pytest.raises(WorkerError, match="more positions"):
        workers["torch"].ask("prepare", case=replace(PREFILL, tokens=2000).to_dict(), variant="")
    pid = workers["torch"]._child.pid  # of the process that this first question started
    with pytest.raises(WorkerError, match="AttributeError"):
        workers["torch"].ask("dance")
    assert workers["torch"]._child.pid == pid


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can forget a peak")
@pytest.mark.parametrize("name", ["jax", "torch"])
def test_what_a_limit_is_measured_on_is_not_in_the_peak_of_a_case(workers, name: str):
    asked = {"case": cases(["prefill"], batches=[1], tokens=4)[0].to_dict(), "variant": ""}
    workers[name].ask("prepare", 120, **asked)
    before = workers[name].ask("measure", 120, **asked)["peak_bytes"]
    workers[name].ask("bandwidth", 120)
    assert workers[name].ask("measure", 120, **asked)["peak_bytes"] < before + 2 * LONG  # bytes; it has four


def test_a_worker_that_cannot_load_says_why(tmp_path):
    worker = Worker("torch", str(tmp_path), "float32")
    with pytest.raises(WorkerError, match="no checkpoint"):
        worker.ask("about", 120)
    worker = Worker("torch", SOURCE, "float32", "abacus")
    with pytest.raises(WorkerError, match="no such device"):
        worker.ask("about", 120)


# Every implementation does the same work


@pytest.fixture(scope="module")
def sides(folder):
    import jax

    from twinformers.benchmarks.jax_side import JaxSide
    from twinformers.benchmarks.torch_side import TorchSide
    from twinformers.benchmarks.transformers_side import TransformersSide

    before = jax.config.jax_default_matmul_precision, jax.config.jax_default_device
    found = [side(folder, "float32", None) for side in (JaxSide, TorchSide, TransformersSide)]
    for side in found:
        side.load()
    yield found
    jax.config.update("jax_default_matmul_precision", before[0])
    jax.config.update("jax_default_device", before[1])


def done(sides, case, work):
    """What each implementation gave that does not compile for minutes."""
    return {
        (side.framework, variant): work(side, case, variant)
        for side in sides
        for variant in case.variants(side.framework)
        if variant != "compile"
    }


def test_every_implementation_decodes_the_same(sides):
    found = done(sides, DECODE, lambda side, case, variant: side.decode(case, variant, case.new_tokens))
    assert len(found) == 5 and np.shape(found["jax", ""]) == (9, 2)
    assert all(tokens == found["jax", ""] for tokens in found.values()), found
    first = done(sides, PREFILL, lambda side, case, variant: side.prefill(case, variant))
    assert len(first) == 4 and all(tokens == found["jax", ""][:1] for tokens in first.values())


def test_every_implementation_learns_the_same(sides):
    def losses(side, case, variant):
        update = side.trainer(case, variant)
        return [update() for _ in range(3)]

    found = done(sides, TRAIN, losses)
    assert len(found) == 4
    firsts = [losses[0] for name, losses in found.items() if name != ("transformers", "sdpa")]
    np.testing.assert_allclose(firsts, firsts[0], rtol=1e-5)  # sdpa goes on from where eager stopped
    assert all(losses[2] < losses[0] for losses in found.values())
    for side in sides:
        side.load()


def test_variants_of_transformers_are_what_they_are_called(sides):
    side = sides[2]
    models = {name: side.using(name) for name in ("eager", "sdpa")}
    assert {name: m.config._attn_implementation for name, m in models.items()} == {n: n for n in models}
    first, second = (next(m.parameters()) for m in models.values())
    assert first is second


@pytest.mark.slow
def test_what_is_called_compiled_is(sides):
    from torch._dynamo.utils import counters

    side = sides[2]
    for case, work in (
        (DECODE, lambda: side.decode(DECODE, "compile", 9)),
        (PREFILL, lambda: side.prefill(PREFILL, "compile")),
    ):
        side.release()
        counters.clear()
        compiled = work()
        assert counters["stats"]["unique_graphs"] > 0
        assert compiled == (
            side.decode(DECODE, "static", 9) if case is DECODE else side.prefill(PREFILL, "sdpa")
        )
        assert counters["stats"]["unique_graphs"] == 1


def test_running_reads_the_model_that_the_case_needs(sides):
    side = sides[1]
    assert side.run(TRAIN, "eager")["seconds"] > 0
    side.dtype = "bfloat16"
    try:
        side.release()
        side.run(TRAIN, "eager")
        assert next(side.model.parameters()).dtype == torch.float32
        side.run(PREFILL, "")
        assert next(side.model.parameters()).dtype == torch.bfloat16
    finally:
        side.dtype = "float32"
        side.load()


# The whole


@pytest.fixture(scope="module")
def result():
    with pytest.MonkeyPatch.context() as patch:
        for key, variants in all_cases.WAYS.items():
            patch.setitem(all_cases.WAYS, key, tuple(v for v in variants if v != "compile"))
        wanted = [replace(DECODE, new_tokens=40), PREFILL, TRAIN, Case(task="load")]
        return bench(SOURCE, wanted, repeats=3)


def test_figures_are_positive_and_consistent(result):
    assert [r.error for r in result.rows] == [""] * len(result.rows) and len(result.rows) == 5 + 4 + 4 + 3
    for r in result.rows:
        assert len(r.runs) == 3 and r.seconds == sorted(r.runs)[1] > 0
        assert r.compile_seconds >= 0 and 50 << 20 < r.peak_bytes < 8 << 30
        if r.case.task == "load":
            assert r.tokens_per_second is r.fraction is None
            continue
        assert r.tokens_per_second * r.seconds == pytest.approx(r.case.produced)
        what, amount = cost(TINY, r.case, "float32")
        assert r.bound == what
        assert r.fraction == pytest.approx(amount / r.seconds / r.limit)
        assert 0 < r.limit <= max(result.peaks["cpu"][what].values())


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch):
    """Stands in for a GPU: what is asked of it, in which order, and whose time counts."""
    from twinformers.benchmarks.torch_side import TorchSide

    asked: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self):
            self.number = len(asked)
            asked.append("event")

        def elapsed_time(self, later: Event) -> float:
            assert asked[self.number + 1 : later.number] == ["work"]
            assert asked[later.number + 1 :] == ["wait"]  # an event that is not over yet has no time
            return 2500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append("wait"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    side = TorchSide.__new__(TorchSide)
    side.device = torch.device("cuda", 1)
    assert side._timed(lambda: asked.append("work")) == 2.5
    assert asked == ["wait", "event", "work", "event", "wait"]
    side.device = torch.device("cpu")
    assert 0 < side._timed(lambda: None) < 1 and len(asked) == 5


def test_limits_are_those_of_a_machine(result):
    peaks = result.peaks["cpu"]
    assert peaks.keys() == {"bandwidth", "matrix"} and peaks["bandwidth"].keys() == {"jax", "torch", "numpy"}
    assert peaks["matrix"].keys() == {"jax", "torch"}
    assert all(1e8 < v < 1e15 for values in peaks.values() for v in values.values())


def test_ratios_are_those_of_the_seconds(result):
    for case in {r.case for r in result.rows}:
        rows = [r for r in result.rows if r.case == case]
        best = min(r.seconds for r in rows if r.framework == "transformers")
        assert [r.ratio for r in rows] == pytest.approx([best / r.seconds for r in rows])


def test_json_schema(result):
    found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert found.keys() == {
        "source",
        "architecture",
        "parameters",
        "dtype",
        "repeats",
        "facts",
        "peaks",
        "rows",
    }
    assert (found["source"], found["architecture"], found["parameters"]) == (SOURCE, "llama", 85488)
    assert all(r.keys() == set(Row.__dataclass_fields__) for r in found["rows"])
    assert all(r["case"].keys() == set(Case.__dataclass_fields__) for r in found["rows"])
    assert {"machine", "jax", "torch", "transformers", "jax ran on", "torch ran on"} <= found["facts"].keys()
    assert all("threads" in found["facts"][f"{name} ran on"] for name in all_cases.FRAMEWORKS)


@pytest.mark.slow
def test_starts_and_depths():
    found = bench(
        SOURCE,
        [Case(task="start", warm=warm) for warm in (False, True)] + [replace(PREFILL, layers=2)],
        frameworks=["jax", "torch"],
        repeats=1,
    )
    assert [r.error for r in found.rows] == [""] * 6 and all(r.seconds > 0 for r in found.rows)
    assert found.rows[4].case.label == "prefill 24 tokens, batch 2, 2 layers"


class Fake:
    """A worker without a process, which notes what it is asked and never compiles in time."""

    asked: list
    peak = 0.0

    def __init__(self, framework, *options):
        self.framework, self.options = framework, options
        self.about = {"platform": "cpu", "device": "cpu", "threads": 1}

    def start(self, limit):
        self.asked.append((self.framework, "start"))
        self.about["device"] = f"cpu {self.options[-1]}"

    def ask(self, method, limit=None, *, case=None, variant=""):
        limits = method in ("bandwidth", "matrix")
        if limits and self.framework == "torch":
            raise WorkerError("no memory", where=self.framework)
        if limits:
            self.peak += 50.0  # better from round to round
            return {self.framework: self.peak}
        self.asked.append((f"{self.framework} {variant}".rstrip(), method))
        if variant == "compile":
            raise WorkerError("no answer within 4 s", where=self.framework)
        return {"seconds": 2.0, "total": 3.0, "peak_bytes": 1, "device_bytes": None}

    def forget(self):
        self.asked.append((self.framework, "release"))

    def close(self):
        self.asked.append((self.framework, "close"))


def test_the_run_prepares_then_measures_in_turn_then_lets_go(monkeypatch):
    monkeypatch.setattr(running, "Worker", Fake)
    monkeypatch.setattr(Fake, "asked", asked := [], raising=False)
    found = bench(SOURCE, [TRAIN, replace(TRAIN, batch=1)], frameworks=["jax", "torch"], repeats=2, limit=4)
    case = [("jax", "prepare"), ("torch compile", "prepare"), ("torch eager", "prepare")]
    turns = [("jax", "measure"), ("torch eager", "measure")] * 2
    done = [("jax", "release"), ("torch", "release")]
    again = [c for c in case if c[0] != "torch compile"]  # what was not ready once is not waited for again
    closed = [("torch", "close"), ("jax", "close")]
    started = [("jax", "start"), ("torch", "start")]
    assert asked == [*started, *case, *turns, *done, *again, *turns, *done, *closed]
    assert [(r.variant, r.error) for r in found.rows] == [
        ("", ""),
        ("compile", "torch: no answer within 4 s"),
        ("eager", ""),
    ] * 2
    assert [r.compile_seconds for r in found.rows] == [0.0, None, 0.0] * 2
    for r, limit in ((found.rows[0], (50 + 100) / 2), (found.rows[3], (150 + 200) / 2)):
        assert (r.limit, r.fraction) == (limit, cost(TINY, r.case, "float32")[1] / 2 / limit)
    assert found.peaks == {"cpu": {"matrix": {"jax": 200.0}}}
    assert found.facts["limits in torch"] == "not measured: torch: no memory"


def test_rounded_weights_are_told_of_and_measured_by_their_own_bytes(monkeypatch):
    monkeypatch.setattr(running, "Worker", Fake)
    monkeypatch.setattr(Fake, "asked", [], raising=False)
    found = bench(SOURCE, [DECODE], frameworks=["jax", "transformers"], repeats=1, quantize="int8")
    rows = {r.framework: r for r in found.rows}
    assert found.facts["weights of the twins"] == found.facts["jax ran on"][4:8] == "int8"
    least = [cost(TINY, DECODE, "float32", quantize)[1] / 2 / 50 for quantize in ("int8", None)]
    assert [rows["jax"].fraction, rows["transformers"].fraction] == least and least[0] < 0.4 * least[1]


def test_command(capsys):
    arguments = [
        "bench",
        SOURCE,
        "--task",
        "prefill",
        "--batch",
        "2",
        "--prompt-tokens",
        "24",
        "--repeats",
        "1",
    ]
    assert run([*arguments, "--framework", "torch", "--json"]) == 0
    out, err = capsys.readouterr()
    (found,) = json.loads(out)["rows"]
    assert (found["framework"], found["case"]["batch"], found["error"], err) == ("torch", 2, "", "")
    assert found["case"]["tokens"] == 24 and len(found["runs"]) == 1


def test_command_shows_a_table(result, capsys, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("twinformers.cli.bench.bench", lambda *a, **k: asked.append((a, k)) or result)
    report = tmp_path / "speed.md"
    assert run(["bench", SOURCE, "--sweep", "batch", "--report", str(report), "--plots", str(tmp_path)]) == 0
    out, _ = capsys.readouterr()
    assert [c.batch for c in asked[0][0][1] if c.task == "train"] == [1, 2, 4] and len(asked[0][0][1]) == 9
    assert asked[0][1]["quantize"] is None
    for r in result.rows:
        assert r.case.label in out
    assert out.count("transformers sdpa") == 3 and "written:" in out and "GB/s in numpy" in out
    assert "![speed](speed.png)" in report.read_text()
    assert run(["bench", SOURCE, "--quantize", "int8"]) == 0
    assert asked[1][1]["quantize"] == "int8"
    assert {c.task for c in asked[1][0][1]} == {"decode", "prefill", "load", "start"}


# Pages and pictures


@pytest.fixture
def shown(result):
    """The result with a row that has no figures, and a name that is not to be trusted."""
    failed = replace(result.rows[0], error="out | of memory", seconds=None)
    evil = "<script>alert(1)</script>--> $x"
    return replace(result, source=evil, rows=[*result.rows[1:], failed])


def test_markdown_has_every_row(shown):
    text = markdown(shown, ["a/b.png"])
    assert text.startswith(TITLE)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(shown.rows) and len({line.count("|") for line in lines}) == 1
    assert lines[0].count("|") == len(HEAD) + 1
    first = shown.rows[0]
    assert f"| {first.ratio:.2f}x | {first.fraction:.0%} |" in lines[2]
    assert "not measured" in lines[-1] and "was not measured" in text and "out | of memory" in text
    assert "![b](a/b.png)" in text and shown.facts["torch"] in text and "GB/s in numpy" in text


def test_html_needs_nothing_but_itself(shown, tmp_path):
    write_report(shown, tmp_path / "speed.html", [])
    text = (tmp_path / "speed.html").read_text()
    assert "<script" not in text and text.count("<svg") == 1 and text.count("<tr") == len(shown.rows) + 1
    assert not re.search(r"""(src|href)=["'](?!#)""", text)
    write_report(shown, tmp_path / "speed.html", [])  # over the earlier one


def test_reports_do_not_replace_what_is_none(result, tmp_path):
    (tmp_path / "notes.md").write_text("# Notes\n")
    with pytest.raises(DestinationError, match="taken"):
        write_report(result, tmp_path / "notes.md", [])
    assert (tmp_path / "notes.md").read_text() == "# Notes\n"
    with pytest.raises(UsageError, match=r"\.html or NAME\.md"):
        check_report(tmp_path / "speed.txt")
    with pytest.raises(DestinationError, match="does not exist"):
        check_report(tmp_path / "nowhere" / "speed.md")
    for _ in range(2):
        write_report(result, tmp_path / "speed.md", [tmp_path / "x" / "speed.png"])
    assert "(x/speed.png)" in (tmp_path / "speed.md").read_text()


def test_pictures(shown, tmp_path):
    lengths = [
        replace(r, case=replace(r.case, sweep="length", tokens=r.case.tokens * n))
        for n in (1, 2)
        for r in shown.rows
        if r.case.task in ("prefill", "train")
    ]
    written = write_plots(replace(shown, rows=[*shown.rows, *lengths]), tmp_path / "new" / "plots")
    assert [p.name for p in written] == ["speed.png", "speed-length.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written)
    (tmp_path / "file").touch()
    with pytest.raises(DestinationError, match="cannot be made"):
        write_plots(shown, tmp_path / "file")


def test_growth_reads_as_the_table_does():
    rows = [
        Row(Case(task="decode", batch=n, sweep="batch"), "jax", "", [t], seconds=t, peak_bytes=n * 10**9)
        for n, t in ((1, 0.4), (2, 0.9), (4, 2.1))
    ]
    figure = _growth(rows, "batch", BenchResult("demo", "llama", 1, "float32", 1, {}, {}, rows))
    figure.draw_without_rendering()
    time, memory = figure.axes
    assert [label.get_text() for label in memory.get_xticklabels()] == ["1", "2", "4"]
    assert {"500 ms", "1.00 s", "2.00 s"} <= {label.get_text() for label in time.get_yticklabels()}
    assert memory.get_ylim()[0] == 0 and [*memory.lines[0].get_ydata()] == [1, 2, 4]


def test_nothing_measured_is_shown_too(result, tmp_path):
    empty: BenchResult = replace(result, rows=[replace(r, seconds=None, error="no") for r in result.rows])
    assert write_plots(empty, tmp_path) == []
    write_report(empty, tmp_path / "speed.html", [])
    assert "not measured" in markdown(empty, [])
