"""50,000 damaged files (`scripts/fuzz-files` is the long run), and whether the check would notice."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import file_fuzzing
import pytest
from file_fuzzing import CHUNK, TARGETS, Failed

from twinformers.checkpoints import safetensors_io

CASES = 50_000
CHUNKS = -(-CASES // CHUNK // len(TARGETS)) * len(TARGETS)  # as many for each


@pytest.fixture(scope="module")
def apart():
    """A process without the threads and the memory of what was tested before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_damaged_files_are_read_or_refused(chunk, apart):
    target = list(TARGETS)[chunk % len(TARGETS)]
    ends, _ = apart.submit(file_fuzzing.run, target, chunk // len(TARGETS) * CHUNK, CHUNK).result()
    assert ends.total() == CHUNK and len(ends) > 1


@pytest.mark.parametrize("target", TARGETS)
def test_some_damaged_files(target):
    ends, _ = file_fuzzing.run(target, 10**6, 100)
    assert ends.total() == 100 and len(ends) > 1


def test_the_files_are_good_before_they_are_damaged():
    bench = file_fuzzing.Bench()
    try:
        for target in TARGETS.values():
            file_fuzzing.read(bench.root / target.kind / target.source)
    finally:
        bench.close()


def broken(error):
    def described(value, where):
        raise error

    return described


class Endless(safetensors_io.FormatError):
    def __str__(self):
        return "x" * 5000


def hang(value, where):
    while True:
        time.process_time()


def eat(value, where):
    eaten.append(bytearray(b"x" * (16 << 20)))
    raise safetensors_io.FormatError("too much")


eaten: list[bytearray] = []


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        (broken(KeyError("dtype")), "KeyError"),
        (hang, "TooSlow"),
        (broken(Endless("planted")), "a message of 5000"),
        (eat, "memory grew"),
    ],
)
def test_a_reader_that_misbehaves_is_caught(planted, said, monkeypatch):
    monkeypatch.setattr(safetensors_io, "_described", planted)
    with pytest.raises(Failed, match=said) as caught:
        file_fuzzing.run("safetensors", 0, 100)
    assert "safetensors:" in str(caught.value)
    eaten.clear()
