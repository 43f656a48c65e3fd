"""Moving a checkpoint from any format into any other, through the weight map, never half-written."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinformers.checkpoints import manifest
from twinformers.checkpoints.atomic import new_file, new_folder
from twinformers.checkpoints.base import Checkpoint
from twinformers.checkpoints.dtypes import Ledger, Loss, cast, check_dtype, numpy_dtype, stored_dtype, widest
from twinformers.checkpoints.files import json_object
from twinformers.checkpoints.folders import MARKER, TOKEN_IDS, VERSION
from twinformers.checkpoints.grouping import grouped
from twinformers.checkpoints.layout import reusing
from twinformers.checkpoints.safetensors_io import Entry, write_shards
from twinformers.checkpoints.sources import opened
from twinformers.errors import DestinationError, UsageError, WeightsError
from twinformers.weight_maps import weight_map

if TYPE_CHECKING:
    import numpy as np

SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True)
class PortResult:
    """What `port` did. `bytes` counts the tensors' data, `dtypes` how many tensors have which dtype.

    `losses` says what each dtype could not hold that was asked for, `files` has the SHA-256 of each file that
    was written, by its name in the folder.
    """

    source: str
    source_format: str
    destination: str
    format: str
    architecture: str
    parameters: int
    tensors: int
    bytes: int
    dtypes: dict[str, int]
    losses: dict[str, Loss]
    files: dict[str, str]
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

    def produce(name: str, read: Callable[[str], np.ndarray]) -> np.ndarray:
        return table.produce(name, side, read, checkpoint.side)

    result = []
    for name, parts in table.tensors(side).items():
        stored = {checkpoint.tensors[leaf.name(checkpoint.side)].dtype for leaf in parts}
        kept = widest({stored_dtype(dtype, s) for s in stored})
        read = checkpoint.read
        if len(stored) > 1:  # the parts of one tensor must agree before they are joined
            common = numpy_dtype(widest({stored_dtype("keep", s) for s in stored}))
            read = partial(_read_as, checkpoint, common)
        origin = ", ".join(dict.fromkeys(leaf.name(checkpoint.side) for leaf in parts))
        where = f"{checkpoint.tensors[parts[0].name(checkpoint.side)].file or checkpoint.source}: {origin}"
        result.append(Entry(name, parts[0].shape(side), kept, partial(produce, name, read), where))
    return result


def _read_as(checkpoint: Checkpoint, dtype: np.dtype, name: str) -> np.ndarray:
    return checkpoint.read(name).astype(dtype)


def written(checkpoint: Checkpoint, side: str, dtype: str) -> list[Entry]:
    """The tensors that hold no weight and that the side's reader misses all the same."""
    import numpy as np

    result = []
    for name, value in weight_map(checkpoint.config).written(side).items():
        array = cast(value(), dtype, name)
        result.append(Entry(name, array.shape, dtype, partial(np.asarray, array)))
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
    ledger = Ledger()
    for entry in entries(checkpoint, side, dtype):
        yield entry.name, ledger.array(entry)


def port(
    source: str | Path | Checkpoint,
    destination: str | Path,
    *,
    to: str,
    dtype: str = "keep",
    kv_heads: int | None = None,
    overwrite: bool = False,
    shard_size: int = SHARD_SIZE,
    check: bool = False,
    strict: bool = False,
    on_tensor: Callable[[Entry, int, int], None] = lambda entry, done, total: None,
    on_bytes: manifest.OnBytes = lambda done, total: None,
) -> PortResult:
    """Write `source` in the format `to`: "hf", "torch" or "jax", which are folders, or "gguf", a file.

    `dtype` "keep" leaves every tensor as it is stored; a quantised one becomes float32. `kv_heads` pools the
    key and value heads to that many (see `checkpoints.grouping`). `check` compares the source with its
    checksums first and tells `on_bytes` how far it is. `strict` refuses NaN and infinite values. `on_tensor`
    is told each tensor written, its number and how many there are. The destination appears whole or not at
    all, with a checksum for each file. Raises TwinformersError's subclasses for a bad source, an existing
    destination or a full disk.
    """
    if to not in TARGETS:
        raise UsageError(
            "unknown format", where="to", expected=f"one of {', '.join(TARGETS)}", found=repr(to)
        )
    target = TARGETS[to]
    check_dtype(dtype, keep=True)
    if shard_size <= 0:
        raise UsageError("bad value", where="shard_size", expected="a positive number", found=str(shard_size))
    start = time.perf_counter()
    dest = Path(os.path.expanduser(destination))
    with (
        reusing(),
        opened(source, check=check, on_bytes=on_bytes) as original,
        target.place(dest, overwrite=overwrite, sources=original.files) as path,
    ):
        checkpoint = original if kv_heads is None else grouped(original, kv_heads)
        plan = entries(checkpoint, to, dtype)
        plan = target.entries(plan + written(checkpoint, to, plan[0].dtype))
        done = 0

        def told(entry: Entry) -> None:
            nonlocal done
            done += 1
            on_tensor(entry, done, len(plan))

        ledger = Ledger(strict)
        target.write(Job(path, checkpoint, to, plan, shard_size, ledger, told))
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
            losses=ledger.losses,
            files={},
            seconds=0.0,
        )
    return replace(result, files=manifest.read(dest), seconds=time.perf_counter() - start)


@dataclass(frozen=True)
class Job:
    """What a target is to write, where (a temporary path), who keeps account and who is told each tensor."""

    path: Path
    checkpoint: Checkpoint
    to: str
    entries: list[Entry]
    shard_size: int
    ledger: Ledger
    told: Callable[[Entry], None]


@dataclass(frozen=True)
class Target:
    """How a format is written: to a new folder or a new file, by what, and what it makes of the entries."""

    place: Callable[..., AbstractContextManager[Path]]
    write: Callable[[Job], None]
    entries: Callable[[list[Entry]], list[Entry]] = lambda plan: plan


def _safetensors(job: Job) -> None:
    write_company(job)  # before the weights: it is quick, and may be refused
    # transformers looks for this very entry before it trusts a file to hold PyTorch's layout.
    sums = write_shards(job.path, job.entries, job.shard_size, {"format": "pt"}, job.ledger, job.told)
    manifest.write(job.path, sums)


def _orbax(job: Job) -> None:
    from twinformers.checkpoints.orbax import write_orbax

    write_company(job)
    manifest.write(job.path, write_orbax(job.path, job.entries, job.ledger, job.told))


def _gguf(job: Job) -> None:
    from twinformers.checkpoints.gguf_writer import write_gguf

    digest = write_gguf(job.path, job.checkpoint, job.entries, job.ledger, job.told)
    manifest.write_beside(job.path, digest)


def _gguf_entries(plan: list[Entry]) -> list[Entry]:
    from twinformers.checkpoints.gguf_writer import gguf_plan

    return gguf_plan(plan)


def _gguf_file(dest: Path, **options: Any) -> AbstractContextManager[Path]:
    if dest.suffix != ".gguf":  # by which every reader knows such a file
        raise DestinationError(
            "not the name of a GGUF file", where=str(dest), expected="a name that ends in .gguf"
        )
    return new_file(dest, **options)


TARGETS: Mapping[str, Target] = {
    "hf": Target(new_folder, _safetensors),
    "torch": Target(new_folder, _safetensors),
    "jax": Target(new_folder, _orbax),
    "gguf": Target(_gguf_file, _gguf, _gguf_entries),
}


def write_company(job: Job) -> None:
    """config.json, tokenizer and generation settings; the marker for the twins' own folders."""
    folder, checkpoint = job.path, job.checkpoint
    assets = checkpoint.assets
    for name, content in assets.items():
        (folder / name).write_bytes(content)
    config = checkpoint.config.to_hf()
    name = "generation_config.json"
    generation = json_object(assets.get(name, b"{}"), f"{checkpoint.source}: {name}")
    config |= {k: generation[k] for k in TOKEN_IDS if generation.get(k) is not None}
    config["dtype"] = max(job.entries, key=lambda e: e.bytes).dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if job.to != "hf":
        marker = {"format": job.to, "version": VERSION, "architecture": checkpoint.config.architecture}
        (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n")
