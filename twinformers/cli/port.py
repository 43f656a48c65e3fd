"""`twinformers port`"""

from __future__ import annotations

from pathlib import Path

from twinformers.checkpoints import port
from twinformers.cli.output import console, print_json, progress, size


def run(
    source: str, dest: Path, *, to: str, dtype: str, kv_heads: int | None, overwrite: bool, json: bool
) -> None:
    with progress(f"porting to {to}", json=json) as bar:
        result = port(
            source,
            dest,
            to=to,
            dtype=dtype,
            kv_heads=kv_heads,
            overwrite=overwrite,
            on_tensor=lambda entry, done, total: bar.update(bar.task_ids[0], completed=done, total=total),
        )
    if json:
        print_json(result.to_dict())
        return
    dtypes = ", ".join(f"{n} x {d}" for d, n in result.dtypes.items())
    console().print(
        f"{result.source_format} -> {result.format}: {result.tensors} tensors ({dtypes}), "
        f"{size(result.bytes)} in {result.seconds:.1f} s\n{result.destination}",
        soft_wrap=True,
    )
