"""Writing that survives bad luck: kills, full disks, second writers, file systems of other makes."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from twinformers import port
from twinformers.checkpoints import atomic, manifest, open_checkpoint
from twinformers.checkpoints.atomic import new_file, new_folder
from twinformers.errors import DestinationError, IntegrityError, SourceError

ROOT = Path(__file__).parents[1]
TINY, OTHER = "preset:llama-tiny@1", "preset:llama-tiny@2"


def kill_port(*options):
    """The script in a process of its own, since it forks; in memory, where that is a place."""
    memory = Path("/dev/shm")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if memory.is_dir() and os.access(memory, os.W_OK):
        environment["TMPDIR"] = str(memory)
    command = [sys.executable, str(ROOT / "scripts" / "kill-port"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def rows(output):
    """Mode: kills, absent, old, new, with left-overs, anything else."""
    cells = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| ")]
    return {c[0]: [int(x) for x in c[1:]] for c in cells if c[1].isdecimal()}


@pytest.mark.slow
def test_a_kill_before_any_call_leaves_the_old_or_the_new():
    done = kill_port("--every-call")
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(done.stdout)
    assert found.keys() == {"first write", "overwrite", "overwrite by two renames"}
    for mode, (kills, absent, old, new, left, bad) in found.items():
        assert kills > 40 and new > 0 and left > 0 and bad == 0
        assert (absent, old > 0) == ((kills - new, False) if mode == "first write" else (0, True))


def test_kills_at_random_moments_leave_the_old_or_the_new():
    done = kill_port("--kills", "15")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(row[0] for row in rows(done.stdout).values()) == 15


def test_kills_find_a_port_that_deletes_the_old_one_first():
    done = kill_port("--every-call", "--plant", "--mode", "overwrite")
    assert done.returncode == 1 and "BAD: the old one is gone" in done.stdout, done.stdout + done.stderr


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def exchange(request, monkeypatch):
    """Both ways of putting the new one in place."""
    if not request.param:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    return request.param


def content(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def checkpoint(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(text)


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="this system knows no exchange")
def test_exchange_takes_one_step(tmp_path):
    for name in ("one", "other"):
        checkpoint(tmp_path / name, name)
    assert atomic._exchange(tmp_path / "one", tmp_path / "other")
    assert [content(tmp_path / n)["config.json"] for n in ("one", "other")] == ["other", "one"]
    with pytest.raises(OSError) as caught:
        atomic._exchange(tmp_path / "one", tmp_path / "nothing")
    assert caught.value.errno == errno.ENOENT


def test_the_destination_is_never_missing_while_it_is_replaced(tmp_path):
    """A reader that looks all the time sees the old one or the new one."""
    checkpoint(tmp_path / "model", "0")
    seen, over = set(), threading.Event()

    def look():
        while not over.is_set():
            seen.add((tmp_path / "model" / "config.json").exists())

    reader = threading.Thread(target=look)
    reader.start()
    for n in range(40):
        with new_folder(tmp_path / "model", overwrite=True) as folder:
            checkpoint(folder, str(n))
    over.set()
    reader.join()
    assert seen == {True}


@pytest.mark.parametrize("nth", range(1, 6))
def test_every_failing_sync_keeps_the_old(nth, exchange, tmp_path, monkeypatch):
    checkpoint(tmp_path / "model", "old")
    calls, sync = [], os.fsync

    def fail(handle):
        calls.append(handle)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fail)
    try:
        with new_folder(tmp_path / "model", overwrite=True) as folder:
            checkpoint(folder, "new")
        expected = "new"
    except DestinationError:
        expected = "old"
    assert (expected == "old") == (nth <= 3)  # a file, its folder, the folder around the destination
    assert content(tmp_path / "model") == {"config.json": expected}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(DestinationError, match="exists"), new_folder(tmp_path / "model") as folder:
        checkpoint(folder, "new")
        checkpoint(tmp_path / "model", "somebody else's")
    assert content(tmp_path / "model") == {"config.json": "somebody else's"}
    with (
        pytest.raises(DestinationError, match="not a checkpoint"),
        new_folder(tmp_path / "model", overwrite=True) as folder,
    ):
        (tmp_path / "model" / "config.json").rename(tmp_path / "model" / "holiday.jpg")
    assert content(tmp_path / "model") == {"holiday.jpg": "somebody else's"}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_second_writer_is_refused_by_name(tmp_path):
    with new_folder(tmp_path / "model") as folder:
        checkpoint(folder, "first")
        start = time.perf_counter()
        command = (
            "import sys; from twinformers.cli import main; "
            f"sys.argv[1:] = ['port', {TINY!r}, {str(tmp_path / 'model')!r}, '--to', 'hf']; main()"
        )
        done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and f"another port is writing to {tmp_path / 'model'}" in done.stderr
        start = time.perf_counter()
        with pytest.raises(DestinationError, match="another port is writing"):
            port(TINY, tmp_path / "model", to="hf")
        assert time.perf_counter() - start < 2
    assert content(tmp_path / "model") == {"config.json": "first"}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_writers_at_once_leave_one_whole_checkpoint(tmp_path):
    """Each is refused or writes; nothing of a lock is left that could keep a third one out."""
    port(TINY, tmp_path / "model", to="hf")
    outcomes = []

    def write(seed):
        try:
            port(f"preset:llama-tiny@{seed}", tmp_path / "model", to="hf", overwrite=True)
            outcomes.append("written")
        except DestinationError as error:
            outcomes.append(error.problem)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "written" in outcomes and len(outcomes) == 6
    assert {o for o in outcomes if o != "written"} <= {f"another port is writing to {tmp_path / 'model'}"}
    manifest.check(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_left_overs_of_this_destination_alone_are_removed(tmp_path):
    place, other = tmp_path / "model", tmp_path / "model-2"
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a").write_text("a")
    left = atomic._named(place, "new")
    left.mkdir()
    (left / "link").symlink_to(tmp_path / "precious")
    foreign = [atomic._named(other, "new"), tmp_path / ".model.tmp", tmp_path / ".model.twinformers-new"]
    for path in foreign:
        path.mkdir()
    with new_folder(place) as folder:
        checkpoint(folder, "new")
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"model", "precious", *(p.name for p in foreign)}
    assert content(tmp_path / "precious") == {"a": "a"}


def test_a_link_with_the_name_of_a_left_over_is_not_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a").write_text("a")
    atomic._named(tmp_path / "model", "new").symlink_to(tmp_path / "precious")
    with new_folder(tmp_path / "model") as folder:
        checkpoint(folder, "new")
    assert content(tmp_path / "precious") == {"a": "a"} and (tmp_path / "model" / "config.json").exists()


def test_long_names_that_begin_alike_are_told_apart(tmp_path):
    one, other = tmp_path / ("x" * 200 + "1"), tmp_path / ("x" * 200 + "2")
    with new_folder(one) as first, new_folder(other) as second:
        assert first != second
        checkpoint(first, "1")
        checkpoint(second, "2")
    assert content(one) == {"config.json": "1"} and content(other) == {"config.json": "2"}


def interrupted(tmp_path):
    """The state between two renames: the old one under its other name, the new one still temporary."""
    port(TINY, tmp_path / "model", to="hf")
    before = content_bytes(tmp_path / "model")
    (tmp_path / "model").rename(atomic._named(tmp_path / "model", "old"))
    atomic._named(tmp_path / "model", "new").mkdir()
    return before


def content_bytes(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_opening_restores_what_a_killed_port_had_renamed(tmp_path):
    before = interrupted(tmp_path)
    open_checkpoint(tmp_path / "model").close()
    assert content_bytes(tmp_path / "model") == before
    assert not atomic._named(tmp_path / "model", "lock").exists()


@pytest.mark.parametrize("overwrite", [True, False])
def test_porting_restores_what_a_killed_port_had_renamed(overwrite, tmp_path):
    before = interrupted(tmp_path)
    if overwrite:
        port(OTHER, tmp_path / "model", to="hf", overwrite=True)
        assert content_bytes(tmp_path / "model") != before
    else:
        with pytest.raises(DestinationError, match="exists"):
            port(OTHER, tmp_path / "model", to="hf")
        assert content_bytes(tmp_path / "model") == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_reader_that_cannot_restore_says_where_the_old_one_is(tmp_path, monkeypatch):
    interrupted(tmp_path)

    def fail(source, target):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(SourceError, match="interrupted") as caught:
        open_checkpoint(tmp_path / "model")
    assert "twinformers-old" in caught.value.found


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
@pytest.mark.parametrize("to", ["hf", "jax"])
def test_files_have_the_mode_of_the_umask(to, mask, tmp_path):
    before = os.umask(mask)
    try:
        port(TINY, tmp_path / "model", to=to)
    finally:
        os.umask(before)
    for path in [tmp_path / "model", *(tmp_path / "model").rglob("*")]:
        expected = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_what_others_write_for_the_owner_alone_gets_the_mode_too(mask, tmp_path):
    before = os.umask(mask)
    try:
        with new_folder(tmp_path / "model") as folder, new_file(tmp_path / "m.gguf") as file:
            for path in (folder / "config.json", file):
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            (folder / "params").mkdir(mode=0o700)
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
    assert modes.pop("model") == modes.pop("params") == 0o777 & ~mask
    assert modes.keys() == {"config.json", "m.gguf", "m.gguf.sha256"} and set(modes.values()) == {
        0o666 & ~mask
    }


# Single files


def test_new_file_appears_with_its_sum(tmp_path):
    with new_file(tmp_path / "m.gguf") as path:
        assert path.suffix == ".gguf" and path.parent != tmp_path
        path.write_bytes(b"one")
    assert manifest.check(tmp_path / "m.gguf").keys() == {"m.gguf"}
    done = subprocess.run(["sha256sum", "-c", "m.gguf.sha256"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "m.gguf: OK\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "m.gguf.sha256"]


def test_new_file_replaces_files_only_and_only_if_told(exchange, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"one")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "m.gguf")
    for name, overwrite, message in (
        ("m.gguf", False, "exists"),
        ("folder", True, "not a checkpoint"),
        ("link", True, "symbolic link"),
    ):
        with (
            pytest.raises(DestinationError, match=message),
            new_file(tmp_path / name, overwrite=overwrite) as path,
        ):
            path.write_bytes(b"two")
    same = [str(tmp_path / "m.gguf")]
    with pytest.raises(DestinationError, match="source"), new_file(tmp_path / "m.gguf", sources=same) as path:
        path.write_bytes(b"two")
    assert (tmp_path / "m.gguf").read_bytes() == b"one"
    with new_file(tmp_path / "m.gguf", overwrite=True) as path:
        path.write_bytes(b"two")
    assert (tmp_path / "m.gguf").read_bytes() == b"two"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "link", "m.gguf", "m.gguf.sha256"]


class Stopped(BaseException):
    """As a kill, but for what a process does when it ends."""


def test_a_sum_never_belongs_to_another_file(exchange, tmp_path, monkeypatch):
    """Stopped before any of its renames, at every one in turn: old or new, and its own sum or none."""
    rename, states = os.rename, set()
    for nth in range(1, 9):
        with new_file(tmp_path / "m.gguf", overwrite=True) as path:
            path.write_bytes(b"old")
        calls = []

        def stop(source, target, nth=nth, calls=calls):
            calls.append(source)
            if len(calls) >= nth:  # nothing is put right afterwards either
                raise Stopped
            rename(source, target)

        monkeypatch.setattr(os, "rename", stop)
        try:
            with new_file(tmp_path / "m.gguf", overwrite=True) as path:
                path.write_bytes(b"new")
        except Stopped:
            pass
        finally:
            monkeypatch.setattr(os, "rename", rename)
        atomic.restore(tmp_path / "m.gguf")
        states.add((tmp_path / "m.gguf").read_bytes())
        if (tmp_path / "m.gguf.sha256").exists():
            manifest.check(tmp_path / "m.gguf")
    assert states == {b"old", b"new"}


def test_the_check_of_sums_would_see_a_wrong_one(tmp_path):
    with new_file(tmp_path / "m.gguf") as path:
        path.write_bytes(b"old")
    (tmp_path / "m.gguf").write_bytes(b"new")
    with pytest.raises(IntegrityError, match=r"m\.gguf"):
        manifest.check(tmp_path / "m.gguf")


@pytest.mark.parametrize("to", ["hf", "torch", "jax"])
@pytest.mark.parametrize("limit", [100, 20_000])
def test_a_disk_that_takes_no_more_is_one_message(to, limit, tmp_path):
    """The system refuses to let a file grow; other libraries have other words for it."""
    port(OTHER, tmp_path / "model", to="hf")
    before = content_bytes(tmp_path / "model")
    command = (
        "import resource, sys; from twinformers.cli import main; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
        f"sys.argv[1:] = ['port', {TINY!r}, {str(tmp_path / 'model')!r}, '--to', {to!r}, "
        "'--overwrite']; main()"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert content_bytes(tmp_path / "model") == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
