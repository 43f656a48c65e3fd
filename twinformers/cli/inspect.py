"""`twinformers inspect`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twinformers.checkpoints import manifest, open_checkpoint
from twinformers.cli.output import bytes_to, console, print_json, progress
from twinformers.weight_maps import weight_map


def run(source: str, *, check: bool, json: bool) -> None:
    with progress("checking", json=json or not check) as bar:
        opening = open_checkpoint(source, check=check, on_bytes=bytes_to(bar))
    with opening as checkpoint:
        table = weight_map(checkpoint.config)
        table.check(checkpoint.side, checkpoint.tensors, checkpoint.source)
        dtypes: dict[str, int] = {}
        for info in checkpoint.tensors.values():
            dtypes[info.dtype] = dtypes.get(info.dtype, 0) + 1
        facts: dict[str, Any] = {
            "source": source,
            "format": checkpoint.format,
            "architecture": checkpoint.config.architecture,
            "parameters": table.parameters,
            "dtypes": dtypes,
            "config": checkpoint.config.to_dict(),
            "assets": sorted(checkpoint.assets),
            "tensors": [
                {"name": n, "shape": list(t.shape), "dtype": t.dtype} for n, t in checkpoint.tensors.items()
            ],
        }
        if check:  # or an error said what differs
            facts["checked"] = len(manifest.read(Path(checkpoint.files[0])))
    if json:
        print_json(facts)
        return
    from rich.table import Table

    out = console()
    summary = Table(show_header=False, box=None)
    summary.add_column(no_wrap=True)
    summary.add_column(overflow="fold")  # a long path is broken, never cut
    for key in ("source", "format", "architecture"):
        summary.add_row(key, str(facts[key]))
    summary.add_row("parameters", f"{facts['parameters']:,}")
    summary.add_row("dtypes", ", ".join(f"{n} x {d}" for d, n in dtypes.items()))
    for key, value in checkpoint.config.to_dict().items():
        summary.add_row(key, str(value))
    summary.add_row("files carried", ", ".join(sorted(checkpoint.assets)) or "none")
    if check:
        summary.add_row("checksums", f"all {facts['checked']} agree")
    out.print(summary)
    tensors = Table("tensor", "shape", "dtype")
    for name, info in checkpoint.tensors.items():
        tensors.add_row(name, str(list(info.shape)), info.dtype)
    out.print(tensors)
