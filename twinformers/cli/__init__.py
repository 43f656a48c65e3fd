"""The command `twinformers`: one file per verb, each imported only when it is called.

Exit codes: 0 done, 1 a check ran and failed, 2 bad input (one message, no traceback).
"""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the console script."""
    from twinformers.cli.app import run

    sys.exit(run())
