"""The processes that train together: what they tell each other, and the folder that all of them must see.

Each runs the same program. The first one alone prepares data, writes the metrics and names checkpoints; the
others wait for it. A framework's side brings its own `Processes`, since it launches and connects them.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twinformers.errors import DestinationError, UsageError, WorkerError, first_line
from twinformers.training.text.settings import write_whole

#: A number of this launch, which the first process writes into the run's folder and the others look for.
SEEN = ".seen"
#: Seconds in which a filesystem that hosts share shows one of them what another one has written.
PATIENCE = 10.0


class Processes:
    """One process on its own, and what a framework's side overrides where there are several.

    `mesh` is the framework's mesh of devices, None for one device. All processes call `gather` and `any` in
    the same order, from the main thread.
    """

    mesh: Any = None
    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.index == 0

    def gather(self, text: str) -> list[str]:
        """What each process says, in their order; all wait until all have spoken."""
        return [text]

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return flag

    def tell(self, text: str = "") -> str:
        """What the first process says, to all."""
        return self.gather(text if self.first else "")[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block that succeeds in all processes or in none: none waits for one that has failed.

        Raises WorkerError in those where it went well, if in another one it did not.
        """
        try:
            yield
        except Exception as error:
            self.gather(f"{type(error).__name__}: {first_line(error)}")
            raise
        for number, said in enumerate(self.gather("")):
            if said:
                raise WorkerError(
                    "another process of the run has failed", where=f"process {number}", found=said
                )

    def share(self, folder: Path) -> None:
        """Make sure that all processes see one folder. Raises DestinationError in those that do not."""
        if self.count == 1:
            return
        path = folder / SEEN
        with self.together():
            number = secrets.token_hex(16) if self.first else ""
            if self.first:
                write_whole(path, number.encode())
        number = self.tell(number)
        with self.together():
            if not self.first and not _appears(path, number):
                raise DestinationError(
                    "this process does not see what the first one has written",
                    where=f"process {self.index} of {self.count}: {folder}",
                    expected="a folder on a filesystem that all hosts share",
                    hint="name a folder of such a filesystem (NFS, Lustre, Filestore, ...)",
                )
        if self.first:
            path.unlink(missing_ok=True)


def _appears(path: Path, content: str) -> bool:
    until = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError):
            list(path.parent.iterdir())  # NFS looks again
            if path.read_bytes() == content.encode():
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.2)


@contextlib.contextmanager
def terminable(asked: threading.Event) -> Iterator[None]:
    """SIGTERM asks for the end as Ctrl-C does: torchrun hands that on, whatever it was sent itself."""
    if threading.current_thread() is not threading.main_thread():  # only there signals can be had
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield
    finally:
        if before is not None:  # by somebody who does not write Python
            signal.signal(signal.SIGTERM, before)


def check_alone(distributed: bool, mesh: str | None) -> None:
    """UsageError where several processes were launched and no mesh says how they share the work."""
    if distributed and mesh is None:
        raise UsageError(
            "several processes need a mesh",
            where="mesh",
            expected="how they share batch and weights, such as --mesh fsdp=8",
            found="none",
        )
