"""Freed memory is kept or goes back: counted in pages that the system had to give anew."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

# Without huge pages: a fault then gives 4 KiB, and the number of faults does not hang on the memory's state.
PROGRAM = """
import ctypes, json, resource, sys
PR_SET_THP_DISABLE = 41  # from Linux's prctl.h
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
import numpy as np
from twinformers.allocator import give_back, keep_memory
from twinformers.benchmarks.memory import resident
kept = keep_memory() if sys.argv[1] == "keep" else None
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(32 << 20).sum()  # 256 MB, taken and freed
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, second, held = faults(), faults(), resident(peak=False)
give_back()
print(json.dumps([kept, first, second, held, resident(peak=False), faults()]))
"""


def measured(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library: nothing is arranged there")
def test_memory_is_kept_until_it_is_given_back():
    kept, first, second, held, after, again = measured("keep")
    assert kept is True
    assert second < 0.02 * first  # the pages of the first time serve the second
    assert held - after > 200 << 20 and again > 0.9 * first
    kept, first, second, held, after, _ = measured("leave")
    assert kept is None and second > 0.9 * first and held - after < 50 << 20


def test_another_system_is_left_alone(monkeypatch):
    from twinformers import allocator

    monkeypatch.setattr(sys, "platform", "darwin")
    assert allocator.keep_memory() is False
    allocator.give_back()
