"""A file that is written past the system's cache: every byte, its sum, and errors that are not lost."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import stat
import time
import weakref
from functools import partial

import numpy as np
import pytest

from twinformers.checkpoints import hashed_file
from twinformers.checkpoints.dtypes import Ledger
from twinformers.checkpoints.hashed_file import HashedFile
from twinformers.checkpoints.safetensors_io import Entry, write_safetensors

BUFFER = 16384


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr(hashed_file, "_BUFFER", BUFFER)


def refuses(monkeypatch, how):
    """No direct writing: the system lacks it, the file system does, or its blocks are larger than ours."""
    import fcntl

    real, pwrite, direct = fcntl.fcntl, os.pwrite, set()

    def control(file, command, flags=0):
        if flags and how == "file system":
            raise OSError(errno.EINVAL, "no")
        (direct.add if flags else direct.discard)(file)
        return 0 if how == "blocks" else real(file, command, flags)

    def write(file, data, offset):
        if file in direct:
            raise OSError(errno.EINVAL, "no")
        return pwrite(file, data, offset)

    if how == "system":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    elif how != "none":
        monkeypatch.setattr(fcntl, "fcntl", control)
        monkeypatch.setattr(os, "pwrite", write)


@pytest.mark.parametrize("how", ["none", "system", "file system", "blocks"])
@pytest.mark.parametrize(
    "size", [0, 1, 4095, 4096, BUFFER - 1, BUFFER, BUFFER + 1, 4 * BUFFER, 7 * BUFFER + 4097]
)
def test_every_byte_is_written_and_summed(size, how, tmp_path, monkeypatch):
    refuses(monkeypatch, how)
    draw = random.Random(size)
    data, place = draw.randbytes(size), 0
    with HashedFile(tmp_path / "a") as file:
        while place < size:
            count = draw.choice([1, 77, 4096, BUFFER, 3 * BUFFER])
            file.write(data[place : place + count])
            place += count
        digest = file.close()
    assert (tmp_path / "a").read_bytes() == data
    assert digest == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("head", [0, 100, 3 * BUFFER + 5])
def test_what_is_appended_counts_with_what_was_there(head, tmp_path):
    data = random.Random(head).randbytes(head + 50_000)
    (tmp_path / "a").write_bytes(data[:head])
    with HashedFile(tmp_path / "a", append=True) as file:
        file.write(data[head:])
        digest = file.close()
    assert (tmp_path / "a").read_bytes() == data
    assert digest == hashlib.sha256(data).hexdigest()


def test_short_writes_go_on_where_they_stopped(tmp_path, monkeypatch):
    pwrite, data = os.pwrite, random.Random(1).randbytes(5 * BUFFER + 333)
    monkeypatch.setattr(os, "pwrite", lambda file, part, offset: pwrite(file, part[:4096], offset))
    with HashedFile(tmp_path / "a") as file:
        file.write(data)
        file.close()
    assert (tmp_path / "a").read_bytes() == data


def test_bytes_may_change_once_they_are_handed_over(tmp_path):
    memory = np.zeros(BUFFER, np.uint8)
    with HashedFile(tmp_path / "a") as file:
        for n in range(9):
            memory[:] = n
            file.write(memory.data)
        digest = file.close()
    expected = b"".join(bytes([n]) * BUFFER for n in range(9))
    assert (tmp_path / "a").read_bytes() == expected and digest == hashlib.sha256(expected).hexdigest()


@pytest.mark.parametrize("size", [10, BUFFER, 20 * BUFFER])
def test_a_full_disk_is_told(size, tmp_path, monkeypatch):
    def full(file, data, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with pytest.raises(OSError, match="No space"), HashedFile(tmp_path / "a") as file:
        file.write(bytes(size))
        file.close()
    assert not before or len(os.listdir("/proc/self/fd")) == before  # it is closed all the same


def test_the_mode_is_the_umasks(tmp_path):
    before = os.umask(0o027)
    try:
        with HashedFile(tmp_path / "a") as file:
            file.close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_nothing_of_a_tensor_is_held_when_the_next_is_made(tmp_path):
    alive, held = weakref.WeakValueDictionary(), []

    def produce(rows):
        time.sleep(0.02)  # a thread that is done lets go a moment later
        held.append(len(alive))
        array = np.ones((rows, 1000), np.float32)
        alive[id(array)] = array
        return array

    entries = [
        Entry(f"{n}", (r, 1000), "float32", partial(produce, r)) for n, r in enumerate((40, 40, 50, 100))
    ]
    write_safetensors(tmp_path / "a.safetensors", entries, {}, Ledger())
    assert held == [0, 0, 0, 0]
