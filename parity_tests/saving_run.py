"""What the processes of both frameworks' tests measure of loading and saving."""

from __future__ import annotations

import errno
from pathlib import Path

from twinformers.errors import TwinformersError
from twinformers.sharding import saving


def most():
    """Bytes that this process has had in memory at the most.

    Not from `getrusage`: there a process starts with what its parent had.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def refused(save, model, destination, full=False, **options):
    """The error of saving; with `full`, this process writes one tensor and finds the disk full."""
    write = saving.write_safetensors

    def failing(path, entries, *rest):
        write(path, entries[:1], *rest)
        raise OSError(errno.ENOSPC, "No space left on device")

    if full:
        saving.write_safetensors = failing
    try:
        return str(save(model, destination, **options))
    except TwinformersError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        saving.write_safetensors = write
