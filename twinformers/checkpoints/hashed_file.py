"""Writing a large file once: its sum is taken on the way, and it goes to the disk past the system's cache."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import numpy as np

#: Of each buffer; a multiple of any block size, as direct writing asks.
_BUFFER = 8 << 20
#: One is filled while the others are written and summed.
_BUFFERS = 3
_ALIGNED = 4096


class HashedFile:
    """A new file, or with `append` the end of one, and the SHA-256 of all of it.

    What is written is copied into buffers; of each full one, a thread takes the sum while another writes it.
    Where the file system allows (Linux, O_DIRECT), the disk reads the buffers themselves: nothing passes
    through the system's cache, which costs a fraction of the time, keeps what others have in the cache, and
    leaves little to wait for at the end. An OSError of a write is raised by a later call, at last by `close`.
    """

    #: Buffers that wait for the next file: many small ones would have the system clear new memory for each.
    _spare: ClassVar[list[mmap.mmap]] = []

    def __init__(self, path: Path, append: bool = False):
        self._file = os.open(path, os.O_RDWR | (0 if append else os.O_CREAT | os.O_TRUNC), 0o666)
        self._sum = hashlib.sha256()
        self._threads = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._busy: list[list[Future[None]]] = [[] for _ in range(_BUFFERS)]
        self._buffers = [self._buffer() for _ in range(_BUFFERS)]
        self._now = self._filled = self._offset = 0
        self._direct = False
        if append:
            while data := os.read(
                self._file, _BUFFER
            ):  # what is there is written once more: it has a sum too
                self.write(data)
        self._set_direct(True)

    def write(self, data: Any) -> None:
        """Append bytes; they may change afterwards."""
        view = memoryview(data).cast("B")
        while view:
            count = min(len(view), _BUFFER - self._filled)
            self._buffers[self._now][self._filled : self._filled + count] = view[:count]
            self._filled, view = self._filled + count, view[count:]
            if self._filled == _BUFFER:
                self._hand_over()

    def write_arrays(self, arrays: Iterable[np.ndarray]) -> None:
        """Append the bytes of contiguous arrays, holding no more than one."""
        import numpy as np

        for array in arrays:
            self.write(array.view(np.uint8).data)  # bfloat16 has no buffer protocol of its own

    def close(self) -> str:
        """The sum, in hexadecimal digits, once everything is written."""
        try:
            self._hand_over()
            for futures in self._busy:
                self._done(futures)
        finally:
            self._release()
        return self._sum.hexdigest()

    def _hand_over(self) -> None:
        data = memoryview(self._buffers[self._now])[: self._filled]
        summing, writing = self._threads
        self._busy[self._now] = [
            summing.submit(self._sum.update, data),
            writing.submit(self._put, data, self._offset),
        ]
        self._offset, self._filled = self._offset + self._filled, 0
        self._now = (self._now + 1) % _BUFFERS
        self._done(self._busy[self._now])

    @staticmethod
    def _done(futures: list[Future[None]]) -> None:
        wait(futures)
        for future in futures:
            future.result()
        futures.clear()

    def _put(self, data: memoryview, offset: int) -> None:
        """Write all of it; whatever cannot be written directly goes through the cache."""
        if self._direct and len(data) % _ALIGNED:
            whole = len(data) - len(data) % _ALIGNED
            self._put(data[:whole], offset)
            data, offset = data[whole:], offset + whole
            self._set_direct(False)
        while data:
            try:
                count = os.pwrite(self._file, data, offset)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self._set_direct(False)  # larger blocks than any that is known
                continue
            data, offset = data[count:], offset + count

    def _set_direct(self, wanted: bool) -> None:
        self._direct = False
        with contextlib.suppress(ImportError, AttributeError, OSError):  # another system, or file system
            import fcntl

            fcntl.fcntl(self._file, fcntl.F_SETFL, os.O_DIRECT if wanted else 0)
            self._direct = wanted

    def _release(self) -> None:
        if self._file < 0:
            return
        for thread in self._threads:
            thread.shutdown()
        os.close(self._file)
        self._file = -1
        self._spare.extend(self._buffers[: _BUFFERS - len(self._spare)])

    @classmethod
    def _buffer(cls) -> mmap.mmap:
        try:
            return cls._spare.pop()
        except IndexError:
            return mmap.mmap(-1, _BUFFER)

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._release()
