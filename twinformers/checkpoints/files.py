"""Opening foreign files: what they are is checked before a byte is read, how much is read is bounded.

A checkpoint's folder is foreign input. It may hold a pipe that never ends, a link to somebody's secrets, a
configuration of many gigabytes.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from twinformers.errors import FormatError

#: No tokenizer, index or configuration of a real model comes near.
MAX_TEXT = 256 << 20


def open_file(path: Path | str, folder: Path | None = None) -> BinaryIO:
    """A regular file, opened for reading without a buffer of its own.

    With `folder`, the file that a link leads to must lie in it (or where a hub's cache keeps it). Raises
    FormatError for what does not exist, is no regular file (which is never waited for) or lies elsewhere.
    """
    if "\0" in str(path):
        raise FormatError("no file has such a name", where=str(path), found="a NUL in it")
    if folder is not None:
        _check_inside(Path(path), folder)
    try:
        # Without O_NONBLOCK, opening a pipe waits for its writer.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise FormatError("the file does not exist", where=str(path)) from None
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise _not_regular(path, "a socket") from None
        raise FormatError("the file cannot be read", where=str(path), found=str(error.strerror)) from None
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise _not_regular(path, _KINDS.get(stat.S_IFMT(mode), "a special file"))
    return open(handle, "rb", buffering=0)


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _not_regular(path: Path | str, found: str) -> FormatError:
    return FormatError("not a regular file", where=str(path), expected="a file", found=found)


def _check_inside(path: Path, folder: Path) -> None:
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    allowed = [home]
    # A hub's cache: REPO/snapshots/REVISION holds links to REPO/blobs.
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise FormatError(
            "the file is a link that leaves its folder",
            where=str(path),
            expected=f"a file in {folder}",
            found=f"a link to {real}",
            hint="copy the file into the folder, if it is meant to be read",
        )


@contextmanager
def uncollected() -> Iterator[None]:
    """No collection of garbage meanwhile: what is parsed is held anyway.

    The collector walks everything that lives again and again while many small objects come up. For a header
    of 80,000 tensors that is two thirds of the time, and more where the process holds much else.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def read_file(path: Path, folder: Path | None = None, limit: int = MAX_TEXT) -> bytes:
    """The content of a small file, of at most `limit` bytes. Raises FormatError where it cannot be read."""
    with open_file(path, folder) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise FormatError(
                "the file is too large", where=str(path), expected=f"at most {limit} bytes", found=str(size)
            )
        try:
            return b"".join(iter(lambda: file.read(1 << 20), b""))
        except OSError as error:
            raise FormatError("the file cannot be read", where=str(path), found=str(error)) from None


def json_object(content: bytes, where: str, *, unique: bool = False) -> dict[str, Any]:
    """The object that some JSON is. Raises FormatError for anything else.

    With `unique`, a key that an object names twice is refused; otherwise the last one counts, as elsewhere.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            for name, _ in items:  # what is left of the result names a key for the second time
                if result.pop(name, items) is items:
                    twice = name
                    break
            raise FormatError("a key appears twice", where=where, found=repr(twice)[:200])
        return result

    try:
        with uncollected():
            value = json.loads(content, object_pairs_hook=pairs if unique else None)
    except (ValueError, RecursionError) as error:
        raise FormatError("not readable as JSON", where=where, found=str(error)) from None
    if not isinstance(value, dict):
        raise FormatError("not a JSON object", where=where, expected="an object", found=type(value).__name__)
    return value


def read_json(path: Path, folder: Path | None = None, *, unique: bool = False) -> dict[str, Any]:
    """The object in a JSON file. Raises FormatError for anything else."""
    return json_object(read_file(path, folder), str(path), unique=unique)
