"""The command `twinformers`: one file per verb, each imported only when it is called.

Exit codes: 0 done, 1 a check ran and failed, 2 bad input (one message, no traceback), 130 interrupted,
141 whoever read the output went away (`| head`).
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point of the console script."""
    from twinformers.allocator import keep_memory
    from twinformers.cli.app import run

    if sys.argv[1:2] == ["train"]:  # which takes and frees the same memory at every update
        keep_memory()
    code = run()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)
