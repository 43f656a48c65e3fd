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
from twinformers.checkpoints.dtypes import cast, check_dtype, stored_dtype, widest
from twinformers.checkpoints.files import json_object
from twinformers.checkpoints.folders import MARKER, TOKEN_IDS, VERSION
from twinformers.checkpoints.grouping import grouped
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

    def produce(name: str, kept: str) -> np.ndarray:
        return table.produce(name, side, lambda n: cast(checkpoint.read(n), kept, n), checkpoint.side)

    result = []
    for name, parts in table.tensors(side).items():
        stored = {checkpoint.tensors[leaf.name(checkpoint.side)].dtype for leaf in parts}
        kept = widest({stored_dtype(dtype, s) for s in stored})
        result.append(Entry(name, parts[0].shape(side), kept, partial(produce, name, kept)))
    return result


def written(checkpoint: Checkpoint, side: str, dtype: str) -> list[Entry]:
    """The tensors that hold no weight and that the side's reader misses all the same."""
    result = []
    for name, value in weight_map(checkpoint.config).written(side).items():
        array = value()
        result.append(Entry(name, array.shape, dtype, partial(cast, array, dtype, name)))
    return result


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
    kv_heads: int | None = None,
    overwrite: bool = False,
    shard_size: int = SHARD_SIZE,
    on_tensor: Callable[[Entry, int, int], None] | None = None,
) -> PortResult:
    """Write `source` as a folder in the format `to` ("hf", "torch" or "jax").

    `dtype` "keep" leaves every tensor as it is stored; a quantised one becomes float32. `kv_heads` pools the
    key and value heads to that many (see `checkpoints.grouping`). `on_tensor` is told each tensor written,
    its number and how many there are. The destination appears whole or not at all. Raises
    TwinformersError's subclasses for a bad source, an existing destination or a full disk.
    """
    if to not in TARGETS:
        raise UsageError(
            "unknown format", where="to", expected=f"one of {', '.join(TARGETS)}", found=repr(to)
        )
    check_dtype(dtype, keep=True)
    if shard_size <= 0:
        raise UsageError("bad value", where="shard_size", expected="a positive number", found=str(shard_size))
    start = time.perf_counter()
    dest = Path(os.path.expanduser(destination))
    with opened(source) as original, _new_folder(dest, original, overwrite) as folder:
        checkpoint = original if kv_heads is None else grouped(original, kv_heads)
        plan = entries(checkpoint, to, dtype)
        plan += written(checkpoint, to, plan[0].dtype)
        done = 0

        def told(entry: Entry) -> None:
            nonlocal done
            done += 1
            if on_tensor:
                on_tensor(entry, done, len(plan))

        _write_company(folder, checkpoint, to, plan)  # before the weights: it is quick, and may be refused
        if to == "jax":
            from twinformers.checkpoints.orbax import write_orbax

            write_orbax(folder, plan, told)
        else:
            # transformers looks for this very entry before it trusts a file to hold PyTorch's layout.
            write_shards(folder, plan, shard_size, {"format": "pt"}, told)
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
    name = "generation_config.json"
    generation = json_object(assets.get(name, b"{}"), f"{checkpoint.source}: {name}")
    config |= {k: generation[k] for k in TOKEN_IDS if generation.get(k) is not None}
    config["dtype"] = max(plan, key=lambda e: e.bytes).dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if to != "hf":
        marker = {"format": to, "version": VERSION, "architecture": checkpoint.config.architecture}
        (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n")


@contextlib.contextmanager
def _new_folder(dest: Path, checkpoint: Checkpoint, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `dest` that takes its place if the block ends well, and vanishes if not."""
    place, mark = Path(os.path.realpath(dest)), uuid.uuid4().hex[:8]
    temporary, old = (place.parent / f".{place.name[:50]}.{mark}.{kind}" for kind in ("tmp", "old"))
    absent: list[Path] = []
    try:
        _check_destination(dest, checkpoint, overwrite)
        absent = [p for p in place.parents if not p.exists()]
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        if place.exists():
            place.rename(old)
        try:
            temporary.rename(place)
            _sync(place.parent)
        except BaseException:
            if not temporary.exists():
                place.rename(temporary)
            if old.exists():
                old.rename(place)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise DestinationError(
            "the destination cannot be written",
            where=str(dest),
            found=error.strerror or str(error),
            hint="check permissions and free space; nothing was left behind",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for path in absent:
            with contextlib.suppress(OSError):  # it is no longer empty, or was never made
                path.rmdir()


def _check_destination(dest: Path, checkpoint: Checkpoint, overwrite: bool) -> None:
    real = os.path.realpath(dest)
    for file in map(os.path.realpath, checkpoint.files):
        if os.path.commonpath([real, file]) in (real, file):
            raise DestinationError(
                "the destination is the source, holds it or lies in it",
                where=str(dest),
                expected=f"a folder apart from {file}",
                hint="name another destination",
            )
    if not (dest.exists() or dest.is_symlink()):
        return
    if not overwrite:
        raise DestinationError(
            "the destination exists", where=str(dest), hint="name another one, or pass --overwrite"
        )
    if dest.is_symlink():
        raise DestinationError(
            "the destination is a symbolic link, so it is not overwritten",
            where=str(dest),
            expected="a folder with a config.json",
            found=f"a link to {os.readlink(dest)}",
            hint="name the folder that it points to",
        )
    # --overwrite replaces a checkpoint; it is not a way to delete a folder of something else.
    if not dest.is_dir() or (any(dest.iterdir()) and not (dest / "config.json").is_file()):
        raise DestinationError(
            "the destination is not a checkpoint, so it is not overwritten",
            where=str(dest),
            expected="a folder with a config.json",
            hint="name another destination, or remove this one yourself",
        )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
