"""What memory a process holds, and how much it held at its peak."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def resident(peak: bool) -> int:
    """Bytes of memory that this process holds, or at most held.

    Not `getrusage` on Linux: a child's maximum there begins with what its parent held when it started.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used * 1024
    name = "VmHWM:" if peak else "VmRSS:"
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(name))


def forget_peak() -> None:
    """Let the peak begin anew with what is held now, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
