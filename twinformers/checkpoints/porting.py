"""Moving a checkpoint from any format into any other, through the weight map, never half-written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinformers.checkpoints.base import Checkpoint
from twinformers.checkpoints.dtypes import cast, check_dtype, stored_dtype
from twinformers.checkpoints.folders import MARKER, TOKEN_IDS, VERSION
from twinformers.checkpoints.safetensors_io import Entry, write_shards
from twinformers.checkpoints.sources import opened
from twinformers.errors import DestinationError, UsageError, WeightsError
from twinformers.weight_maps import weight_map

if TYPE_CHECKING:
    import numpy as np

TARGETS = ("hf", "torch", "jax")
SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True)
class PortResult:
    """What `port` did. `bytes` counts the tensors' data, `dtypes` how many tensors have which dtype."""

    source: str
    source_format: str
    destination: str
    format: str
    architecture: str
    parameters: int
    tensors: int
    bytes: int
    dtypes: dict[str, int]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def entries(checkpoint: Checkpoint, side: str, dtype: str) -> list[Entry]:
    """The tensors as another side stores them, each produced when asked for.

    The headers are compared with the weight map first: WeightsError for whatever is missing, left over or
    of a wrong shape.
    """
    table = weight_map(checkpoint.config)
    table.check(checkpoint.side, checkpoint.tensors, checkpoint.source)
    _check_tied(checkpoint)

    def produce(name: str, target: str) -> np.ndarray:
        return cast(leaves[name].move(checkpoint.read(name), checkpoint.side, side), target, name)

    leaves = table.leaves(checkpoint.side)
    return [
        Entry(
            leaf.name(side),
            leaf.shape(side),
            target := stored_dtype(dtype, checkpoint.tensors[name].dtype),
            partial(produce, name, target),
        )
        for name, leaf in leaves.items()
    ]


def _check_tied(checkpoint: Checkpoint) -> None:
    import numpy as np

    for name, to in weight_map(checkpoint.config).tied(checkpoint.side).items():
        if name in checkpoint.tensors and not np.array_equal(checkpoint.read(name), checkpoint.read(to)):
            raise WeightsError(
                "the configuration ties two tensors that differ",
                where=f"{checkpoint.tensors[name].file}: {name}",
                expected=f"the values of {to}, or tie_word_embeddings false",
                found="other values",
            )


def convert(checkpoint: Checkpoint, side: str, dtype: str = "keep") -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by its name on `side` ("hf", "torch", "jax"), one at a time, in that side's layout."""
    check_dtype(dtype, keep=True)
    for entry in entries(checkpoint, side, dtype):
        yield entry.name, entry.produce()


def port(
    source: str | Path | Checkpoint,
    destination: str | Path,
    *,
    to: str,
    dtype: str = "keep",
    overwrite: bool = False,
    shard_size: int = SHARD_SIZE,
    on_tensor: Callable[[Entry, int, int], None] | None = None,
) -> PortResult:
    """Write `source` as a folder in the format `to` ("hf", "torch" or "jax").

    `dtype` "keep" leaves every tensor as it is stored; a quantised one becomes float32. `on_tensor` is told
    each tensor written, its number and how many there are. The destination appears whole or not at all.
    Raises TwinformersError's subclasses for a bad source, an existing destination or a full disk.
    """
    if to not in TARGETS:
        raise UsageError(
            "unknown format", where="to", expected=f"one of {', '.join(TARGETS)}", found=repr(to)
        )
    check_dtype(dtype, keep=True)
    if shard_size <= 0:
        raise UsageError("bad value", where="shard_size", expected="a positive number", found=str(shard_size))
    start = time.perf_counter()
    dest = Path(destination).expanduser()
    with opened(source) as checkpoint, _new_folder(dest, checkpoint, overwrite) as folder:
        plan = entries(checkpoint, to, dtype)
        done = 0

        def told(entry: Entry) -> None:
            nonlocal done
            done += 1
            if on_tensor:
                on_tensor(entry, done, len(plan))

        if to == "jax":
            from twinformers.checkpoints.orbax import write_orbax

            write_orbax(folder, plan, told)
        else:
            # transformers looks for this very entry before it trusts a file to hold PyTorch's layout.
            write_shards(folder, plan, shard_size, {"format": "pt"}, told)
        _write_company(folder, checkpoint, to, plan)
        dtypes: dict[str, int] = {}
        for e in plan:
            dtypes[e.dtype] = dtypes.get(e.dtype, 0) + 1
        result = PortResult(
            source=checkpoint.source,
            source_format=checkpoint.format,
            destination=str(destination),
            format=to,
            architecture=checkpoint.config.architecture,
            parameters=weight_map(checkpoint.config).parameters,
            tensors=len(plan),
            bytes=sum(e.bytes for e in plan),
            dtypes=dtypes,
            seconds=0.0,
        )
    return PortResult(**{**vars(result), "seconds": time.perf_counter() - start})


def _write_company(folder: Path, checkpoint: Checkpoint, to: str, plan: list[Entry]) -> None:
    """config.json, tokenizer and generation settings; the marker for the twins' own folders."""
    assets = checkpoint.assets
    for name, content in assets.items():
        (folder / name).write_bytes(content)
    config = checkpoint.config.to_hf()
    generation = json.loads(assets.get("generation_config.json", b"{}"))
    config |= {k: generation[k] for k in TOKEN_IDS if generation.get(k) is not None}
    config["dtype"] = max(plan, key=lambda e: e.bytes).dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if to != "hf":
        marker = {"format": to, "version": VERSION, "architecture": checkpoint.config.architecture}
        (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n")


@contextlib.contextmanager
def _new_folder(dest: Path, checkpoint: Checkpoint, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `dest` that takes its place if the block ends well, and vanishes if not."""
    for file in checkpoint.files:
        if dest.resolve() == Path(file).resolve() or dest.resolve() in Path(file).resolve().parents:
            raise DestinationError(
                "the destination holds the source", where=str(dest), hint="name another destination"
            )
    if dest.exists() or dest.is_symlink():
        if not overwrite:
            raise DestinationError(
                "the destination exists", where=str(dest), hint="name another one, or pass --overwrite"
            )
        # --overwrite replaces a checkpoint; it is not a way to delete a folder of something else.
        if not dest.is_dir() or (any(dest.iterdir()) and not (dest / "config.json").is_file()):
            raise DestinationError(
                "the destination is not a checkpoint, so it is not overwritten",
                where=str(dest),
                expected="a folder with a config.json",
                hint="name another destination, or remove this one yourself",
            )
    temporary = dest.parent / f".{dest.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                _sync(path)
        _sync(temporary)
        if dest.exists():
            old = dest.parent / f".{dest.name}.{uuid.uuid4().hex[:8]}.old"
            dest.rename(old)
            temporary.rename(dest)
            shutil.rmtree(old)
        else:
            temporary.rename(dest)
        _sync(dest.parent)
    except OSError as error:
        raise DestinationError(
            "the destination cannot be written",
            where=str(dest),
            found=error.strerror or str(error),
            hint="check permissions and free space; nothing was left behind",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
