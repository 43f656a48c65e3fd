"""What the verbs share: JSON alone on stdout, tables for people, progress when a terminal watches."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=2, allow_nan=False))


def console() -> Any:
    """rich's console on stdout; text is shown as it is, since names and paths may look like markup."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def progress(description: str, *, json: bool) -> Any:
    """A progress bar on stderr, shown only where a terminal watches."""
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True, disable=json or not sys.stderr.isatty())
    bar.add_task(description, total=None)
    return bar


def bytes_to(bar: Any) -> Callable[[int, int], None]:
    """Shows on a progress bar how far the reading of checksums is."""
    return lambda done, total: bar.update(bar.task_ids[0], completed=done, total=total)


def size(count: float) -> str:
    """Bytes for people: 538.1 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.1f} TB"
