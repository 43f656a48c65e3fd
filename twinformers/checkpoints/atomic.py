"""Files and folders that appear whole: at every moment a destination is the old one or the new one.

What is written lies in a temporary folder beside the destination until all of it has reached the disk. Then
it takes the destination's place: by a rename where there was nothing, else by an exchange of the two names in
one step (`renameat2` of Linux, `renamex_np` of macOS). A file system that knows no exchange gets two renames;
a process killed between them leaves a state that the next writer and the next reader recognise and undo.

A lock keeps other writers away. The names beside a destination follow from its own, so that what a killed
writer left behind is found by whoever holds the lock next, and nothing else is ever removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from twinformers.checkpoints import manifest
from twinformers.errors import DestinationError, SourceError

#: Seconds that a second writer waits for the first.
PATIENCE = 0.8


@contextlib.contextmanager
def new_folder(dest: Path, *, overwrite: bool = False, sources: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder that takes the place of `dest` if the block ends well, and vanishes if not.

    `overwrite` replaces a checkpoint and nothing else; `sources` are paths that `dest` must stay apart from.
    Raises DestinationError for a destination that exists, is no checkpoint, cannot be written or is being
    written by somebody else.
    """

    def check() -> None:
        _check_apart(dest, sources)
        _check_replaceable(dest, overwrite, "a folder with a config.json", _is_checkpoint)

    with _beside(dest, check) as (place, temporary):
        yield temporary
        _settle(temporary)
        check()  # it may have taken hours
        _put(temporary, place)


@contextlib.contextmanager
def new_file(dest: Path, *, overwrite: bool = False, sources: Sequence[str] = ()) -> Iterator[Path]:
    """The path of a temporary file that takes the place of `dest` if the block ends well; as `new_folder`.

    `NAME.sha256` is written beside it. The two names cannot change in one step: the old sum goes first and
    the new one comes last, so that a sum never belongs to another file.
    """

    def check() -> None:
        _check_apart(dest, sources)
        _check_replaceable(dest, overwrite, "a file", Path.is_file)

    with _beside(dest, check) as (place, temporary):
        written = temporary / place.name
        yield written
        sums, kept = manifest.beside(place), temporary / "old"
        if not manifest.beside(written).exists():  # whoever wrote the file may have taken its sum on the way
            manifest.write_beside(written)
        _settle(temporary)
        check()
        if os.path.lexists(sums):
            os.rename(sums, kept)
        try:
            _put(written, place)
        except BaseException:
            if os.path.lexists(kept):
                os.rename(kept, sums)
            raise
        os.rename(manifest.beside(written), sums)
        sync(place.parent)


def restore(place: Path) -> None:
    """Bring back what a killed writer had renamed, where the destination has been missing since.

    Raises SourceError where that is not possible, DestinationError where somebody is writing.
    """
    place = Path(os.path.realpath(place))
    old = _named(place, "old")
    if os.path.lexists(place) or not os.path.lexists(old):
        return
    try:
        with _lock(place, place):
            _restore(place)
    except OSError as error:
        raise SourceError(
            "a port was interrupted while it replaced this checkpoint",
            where=str(place),
            found=f"the old one as {old}, which cannot be renamed: {error.strerror}",
            hint="rename it yourself",
        ) from None


def _restore(place: Path) -> None:
    old = _named(place, "old")
    if os.path.lexists(old) and not os.path.lexists(place):
        os.rename(old, place)


def _named(place: Path, kind: str) -> Path:
    """A name beside the destination, ours and of this destination alone."""
    mark = hashlib.sha256(os.fsencode(place.name)).hexdigest()[:8]
    return place.parent / f".{place.name[:50]}.{mark}.twinformers-{kind}"


@contextlib.contextmanager
def _beside(dest: Path, check: Callable[[], None]) -> Iterator[tuple[Path, Path]]:
    """The destination without links, and a new folder beside it; both are this writer's alone."""
    place = Path(os.path.realpath(dest))
    temporary, absent = _named(place, "new"), list[Path]()
    try:
        check()
        absent = [p for p in place.parents if not p.exists()]
        place.parent.mkdir(parents=True, exist_ok=True)
        with _lock(place, dest):
            _restore(place)
            for left in (temporary, _named(place, "old")):
                _remove(left)
            check()  # nobody else changes it from here on
            try:
                temporary.mkdir()
                yield place, temporary
            finally:
                # After an exchange the old one lies here. A library that failed may still be writing.
                for _ in range(20):
                    _remove(temporary, ignore_errors=True)
                    if not os.path.lexists(temporary):
                        break
                    time.sleep(0.05)
    except OSError as error:
        raise DestinationError(
            "the destination cannot be written",
            where=str(dest),
            found=error.strerror or str(error),
            hint="check permissions and free space; nothing was left behind",
        ) from error
    finally:
        for path in absent:
            with contextlib.suppress(OSError):  # it is no longer empty, or was never made
                path.rmdir()


@contextlib.contextmanager
def _lock(place: Path, dest: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(_named(place, "lock"), timeout=PATIENCE)
    try:
        lock.acquire()
    except Timeout:
        if not os.path.lexists(lock.lock_file):  # /proc, for one, says so again and again
            raise OSError(errno.EACCES, "no file can be made beside it") from None
        raise DestinationError(
            f"another port is writing to {dest}",
            where=str(dest),
            hint="wait until it is done, or name another destination",
        ) from None
    try:
        yield
    finally:
        # Removed while it is held: whoever waits for it sees that its file has no name left.
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()


def _put(new: Path, place: Path) -> None:
    """Let `new` take the place, for good; by an exchange, the old one then lies where `new` was."""
    old, existed = _named(place, "old"), os.path.lexists(place)
    exchanged = existed and _exchange(new, place)
    if existed and not exchanged:
        os.rename(place, old)
    try:
        if not exchanged:
            os.rename(new, place)
        sync(place.parent)
    except BaseException:
        if exchanged:
            _exchange(new, place)
        else:
            if not os.path.lexists(new):
                os.rename(place, new)
            _restore(place)
        raise
    _remove(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where the system knows no such step."""
    first, second = os.fsencode(one), os.fsencode(other)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            failed = libc.renamex_np(first, second, 2)  # RENAME_SWAP
        else:
            failed = libc.renameat2(-100, first, -100, second, 2)  # AT_FDCWD, RENAME_EXCHANGE
    except (AttributeError, OSError):  # another system, or a C library without it
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code))


def _settle(folder: Path) -> None:
    """Everything below with the modes that the umask gives, as the folder itself has, and on the disk."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    for path in [*folder.rglob("*"), folder]:
        # What other libraries write may be for its owner alone.
        path.chmod(mode if path.is_dir() else mode & 0o666)
    sync_all(folder)


def sync_all(folder: Path) -> None:
    """Return when everything below has reached the disk, which takes several files at a time best."""
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(sync, [*folder.rglob("*"), folder]))


def sync(path: Path) -> None:
    """Return when the content of a file or folder has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path, ignore_errors: bool = False) -> None:
    """Remove what has one of our names; a link is removed and not followed."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=ignore_errors)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        if not ignore_errors:
            raise


def _check_apart(dest: Path, sources: Sequence[str]) -> None:
    real = os.path.realpath(dest)
    for file in map(os.path.realpath, sources):
        if os.path.commonpath([real, file]) in (real, file):
            raise DestinationError(
                "the destination is the source, holds it or lies in it",
                where=str(dest),
                expected=f"a folder apart from {file}",
                hint="name another destination",
            )


def _check_replaceable(
    dest: Path, overwrite: bool, expected: str, replaceable: Callable[[Path], bool]
) -> None:
    """Raise DestinationError where something lies that must stay."""
    if not (dest.exists() or dest.is_symlink()):
        return
    if not overwrite:
        raise DestinationError(
            "the destination exists", where=str(dest), hint="name another one, or pass --overwrite"
        )
    if dest.is_symlink():
        raise DestinationError(
            "the destination is a symbolic link, so it is not overwritten",
            where=str(dest),
            expected=expected,
            found=f"a link to {os.readlink(dest)}",
            hint="name what it points to",
        )
    # --overwrite replaces a checkpoint; it is not a way to delete something else.
    if not replaceable(dest):
        raise DestinationError(
            "the destination is not a checkpoint, so it is not overwritten",
            where=str(dest),
            expected=expected,
            hint="name another destination, or remove this one yourself",
        )


def _is_checkpoint(folder: Path) -> bool:
    return folder.is_dir() and (not any(folder.iterdir()) or (folder / "config.json").is_file())
