"""Checkpoints of a run: written in the background, and there only when they are whole.

A checkpoint is a folder named by its update. It is written under another name, with a checksum for every
file, and takes its own name by a rename once all of it has reached the disk. So whatever has a name is whole,
at every moment at which the process may be killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from twinformers.checkpoints import manifest
from twinformers.checkpoints.atomic import sync, sync_all
from twinformers.errors import DestinationError, IntegrityError, SourceError, TwinformersError, first_line

#: Starts to write into a folder and returns what waits for the end of it. When it has returned, the run may
#: go on and change what is being written.
Writer = Callable[[Path], Callable[[], object]]


class Checkpoints:
    """The checkpoints in a folder, of which the last `keep` stay; one is written at a time.

    Several processes may write into one together. The `first` of them gives it its name, once its writer says
    that all have written; the others only write.
    """

    def __init__(self, folder: Path, keep: int, first: bool = True):
        self._folder, self._keep, self._first = folder, keep, first
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def steps(self) -> list[int]:
        """The updates after which there is a whole checkpoint, in order."""
        if not self._folder.is_dir():
            return []
        return sorted(int(p.name) for p in self._folder.iterdir() if p.name.isdecimal() and p.is_dir())

    def path(self, step: int) -> Path:
        return self._folder / f"{step:08d}"

    def clean(self) -> None:
        """Remove what a killed run was writing or removing."""
        for path in self._folder.glob(".*"):
            shutil.rmtree(path, ignore_errors=True)

    def check(self, step: int) -> Path:
        """The checkpoint's folder, every file of it read and compared. Raises IntegrityError."""
        path = self.path(step)
        try:
            manifest.check(path)
        except (IntegrityError, SourceError) as error:
            raise IntegrityError(
                f"the checkpoint is damaged: {error.problem}",
                where=error.where,
                expected=error.expected,
                found=error.found,
                hint=f"remove the folder {path}: --resume then goes on from the checkpoint before it",
            ) from None
        return path

    def save(self, step: int, write: Writer) -> None:
        """Begin a checkpoint, once the one before is done. Raises DestinationError where that failed."""
        self.wait()
        new = self._folder / f".{self.path(step).name}.new"
        with self._typed():
            if self._first:
                shutil.rmtree(new, ignore_errors=True)
                new.mkdir(parents=True, exist_ok=True)  # by another process meanwhile
            finish = write(new)
        self._pending = self._thread.submit(self._commit, finish, new, self.path(step))

    def wait(self) -> None:
        """Return when what was begun has its name. Raises DestinationError where it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._typed():
                pending.result()

    def close(self) -> None:
        """Let what is being written end; no error, since there is one already."""
        self._thread.shutdown(wait=True)

    def _commit(self, finish: Callable[[], object], new: Path, place: Path) -> None:
        finish()
        if not self._first:
            return
        manifest.write(new, {})
        sync_all(new)
        os.rename(new, place)
        sync(self._folder)
        for step in self.steps()[: -self._keep]:
            # Renamed first: half a checkpoint must not have a checkpoint's name.
            old = self._folder / f".{self.path(step).name}.old"
            os.rename(self.path(step), old)
            shutil.rmtree(old, ignore_errors=True)

    @contextlib.contextmanager
    def _typed(self) -> Iterator[None]:
        try:
            yield
        except TwinformersError:
            raise
        except Exception as error:  # TensorStore and PyTorch have their own for a full disk
            raise DestinationError(
                "the checkpoint cannot be written",
                where=str(self._folder),
                found=getattr(error, "strerror", None) or first_line(error),
                hint="check permissions and free space; the checkpoint before it is whole: --resume",
            ) from error
