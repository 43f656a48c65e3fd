"""`twinformers port`"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twinformers.checkpoints import port
from twinformers.cli.output import bytes_to, console, print_json, progress, size
from twinformers.errors import UsageError

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def run(source: str, dest: Path, *, to: str, shard_size: str, options: Mapping[str, Any], json: bool) -> None:
    with progress(f"porting to {to}", json=json) as bar:
        result = port(
            source,
            dest,
            to=to,
            shard_size=parse_size(shard_size),
            on_tensor=lambda entry, done, total: bar.update(bar.task_ids[0], completed=done, total=total),
            on_bytes=bytes_to(bar),
            **options,
        )
    if json:
        print_json(result.to_dict())
        return
    dtypes = ", ".join(f"{n} x {d}" for d, n in result.dtypes.items())
    lines = [
        f"{result.source_format} -> {result.format}: {result.tensors} tensors ({dtypes}), "
        f"{size(result.bytes)} in {result.seconds:.1f} s"
    ]
    for dtype, loss in result.losses.items():
        worst = f"{loss.relative:.1e} in {loss.tensor}" if loss.tensor else "none"
        lines.append(
            f"lost to {dtype}: largest relative error {worst}; "
            f"{loss.overflows} values became infinite, {loss.zeros} zero"
        )
    console().print("\n".join([*lines, result.destination]), soft_wrap=True)


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB" or "1000000". Raises UsageError for anything else, zero included."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([a-zA-Z]*)", text)
    count = int(float(match[1]) * UNITS.get(match[2].lower(), 0)) if match else 0
    if count < 1:
        raise UsageError(
            "bad value",
            where="shard_size",
            expected="a positive number of bytes, as in 5GB, 500MB or 1000000",
            found=repr(text)[:200],
        )
    return count
