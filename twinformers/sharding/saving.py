"""Weights out of shards into one folder, of which every process writes files of its own.

The tensors are dealt out over the processes, which then go through them in rounds. What the processes hold of
a tensor is put together a block of rows at a time, by the one that it was dealt to, and written by it while
the others' are put together. So a process has in memory its share, one tensor and a block, whatever the mesh;
what it sends and receives are all of the weights, once.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinformers.checkpoints import manifest
from twinformers.checkpoints.atomic import new_folder, sync
from twinformers.checkpoints.base import Checkpoint, TensorInfo
from twinformers.checkpoints.dtypes import Ledger, check_dtype, numpy_dtype
from twinformers.checkpoints.orbax import write_array, write_outline
from twinformers.checkpoints.porting import Job, entries, write_company, written
from twinformers.checkpoints.safetensors_io import (
    Entry,
    file_names,
    in_files,
    write_index,
    write_safetensors,
)
from twinformers.checkpoints.sources import opened
from twinformers.configs import Config
from twinformers.errors import DestinationError, UsageError
from twinformers.sharding.groups import Group
from twinformers.weight_maps import weight_map

if TYPE_CHECKING:
    import numpy as np

#: So much of a tensor is put together at a time, or a single row.
BLOCK_BYTES = 4 << 20
FORMATS = ("hf", "torch", "jax")


@dataclass(frozen=True)
class Held:
    """One parameter of a model in shards: its whole shape, its dtype, and what this process gives of it.

    A part is where it belongs, a slice for each axis, and what fetches it. Of copies, one process gives one.
    """

    shape: tuple[int, ...]
    dtype: str
    parts: Sequence[tuple[tuple[slice, ...], Callable[[], np.ndarray]]]

    @property
    def count(self) -> int:
        """How many numbers this process gives."""
        ranges = [[s.indices(n) for s, n in zip(i, self.shape, strict=True)] for i, _ in self.parts]
        return sum(math.prod(last - first for first, last, _ in axes) for axes in ranges)


class Shards(Checkpoint):
    """A model in shards as a source of weights, which all processes read together."""

    format = "shards"

    def __init__(self, config: Config, side: str, held: Mapping[str, Held], group: Group):
        super().__init__("the model", config)
        self.side, self._held, self._group = side, held, group
        self.given: Mapping[str, bytes] = {}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(held.shape, held.dtype, "") for name, held in self._held.items()}

    @property
    def assets(self) -> Mapping[str, bytes]:
        return self.given

    @property
    def counts(self) -> list[int]:
        """How many numbers this process gives of each tensor."""
        return [held.count for held in self._held.values()]

    def read(self, name: str) -> np.ndarray:
        """A whole tensor in the process that calls this, while all others call `join`."""
        array = self.gather(name, self._group.index)
        assert array is not None
        return array

    def join(self, name: str, reader: int) -> None:
        """This process's part in another one's `read`."""
        self.gather(name, reader)

    def gather(self, name: str, reader: int) -> np.ndarray | None:
        import numpy as np

        held = self._held[name]
        dtype = numpy_dtype(held.dtype)
        parts = [(index, fetch()) for index, fetch in held.parts]
        out = np.empty(held.shape, dtype) if reader == self._group.index else None
        row = math.prod(held.shape[1:]) * dtype.itemsize
        few = max(1, BLOCK_BYTES // max(1, row))
        for first in range(0, held.shape[0], few):
            shape = (min(few, held.shape[0] - first), *held.shape[1:])
            block = np.zeros(-(-shape[0] * row // 4), np.int32)
            for index, part in parts:
                _lay(_as(block, dtype, shape), first, index, part)
            # One process has each number, and the others zeros: the sum of the bits is that number's.
            block = self._group.total(block, reader)
            if out is not None:
                out[first : first + shape[0]] = _as(block, dtype, shape)
        return out


def _as(block: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The first bytes of a block as an array, in the same memory."""
    import numpy as np

    return block.view(np.uint8)[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def _lay(rows: np.ndarray, first: int, index: tuple[slice, ...], part: np.ndarray) -> None:
    """Put what a part has of some rows, `first` being the number of the first one, where it belongs."""
    start = index[0].start or 0
    top, bottom = max(first, start), min(first + rows.shape[0], start + part.shape[0])
    if top < bottom:
        rows[top - first : bottom - first, *index[1:]] = part[top - start : bottom - start]


def deal(plan: Sequence[Entry], count: int) -> list[list[Entry]]:
    """The entries of each of `count` processes, about as many bytes each, in the order of the plan."""
    hands: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for number in sorted(range(len(plan)), key=lambda n: -plan[n].bytes):  # the largest first
        least = filled.index(min(filled))
        hands[least].append(number)
        filled[least] += plan[number].bytes
    return [[plan[number] for number in sorted(hand)] for hand in hands]


class Rounds:
    """All processes go through their hands together: in each round, everyone gets a tensor of its own.

    Whoever stops writing must `finish`: the others wait for its part of their tensors.
    """

    def __init__(self, shards: Shards, to: str, hands: Sequence[Sequence[Entry]], index: int):
        self._shards, self._hands, self._index = shards, hands, index
        self._names = weight_map(shards.config).tensors(to)
        self._number = 0

    def entries(self, own: Iterable[Entry]) -> list[Entry]:
        """This process's entries, each produced by the next round: they are to be written in their order."""
        return [replace(entry, produce=self.play) for entry in own]

    def play(self) -> Any:
        """One round. -> this process's tensor, or None if it has no more"""
        own = None
        for reader, hand in enumerate(self._hands):
            if self._number >= len(hand):
                continue
            entry = hand[self._number]
            if reader == self._index:
                own = entry.produce()
                continue
            for leaf in self._names.get(entry.name, ()):  # a table that is computed has none
                self._shards.join(leaf.name(self._shards.side), reader)
        self._number += 1
        return own

    def finish(self) -> None:
        """The rounds that are left, whose tensors nobody here wants."""
        while self._number < max(map(len, self._hands)):
            self.play()


def save(
    shards: Shards,
    group: Group,
    destination: str | Path,
    *,
    to: str,
    dtype: str,
    source: Any,
    overwrite: bool,
    shard_size: int,
) -> dict[str, str]:
    """What `save_sharded` of both frameworks does once it knows what each process holds."""
    if to not in FORMATS:
        raise UsageError("unknown format", where="to", expected=", ".join(FORMATS), found=repr(to))
    check_dtype(dtype, keep=True)
    if shard_size <= 0:
        raise UsageError("bad value", where="shard_size", expected="a positive number", found=str(shard_size))
    plan = entries(shards, to, dtype)
    _check_whole(shards, group)
    plan += written(shards, to, plan[0].dtype)
    hands = deal(plan, group.count)
    files = [file for hand in hands if hand for file in in_files(hand, shard_size)]
    # Orbax has a file for each array.
    named = {} if to == "jax" else dict(zip(file_names(len(files)), files, strict=True))
    dest, first = Path(os.path.expanduser(destination)), group.index == 0

    with contextlib.ExitStack() as place:

        def begin() -> str:
            if not first:
                return ""
            apart: list[str] = []
            if source is not None:
                with opened(source) as given:
                    shards.given, apart = dict(given.assets), given.files
            path = place.enter_context(new_folder(dest, overwrite=overwrite, sources=apart))
            write_company(Job(path, shards, to, plan, shard_size, Ledger(), lambda entry: None))
            write_index(path, named) if named else write_outline(path, plan)
            return str(path)

        path = Path(group.together(begin)[0])
        rounds = Rounds(shards, to, hands, group.index)
        sums = group.together(partial(_write, path, dest, named, hands[group.index], rounds))

        def end() -> dict[str, str]:
            if not first:
                return {}
            found = manifest.write(path, {name: value for part in sums for name, value in part.items()})
            place.close()  # all is whole, and takes its place
            return found

        return group.together(end)[0]


def _check_whole(shards: Shards, group: Group) -> None:
    """Raise UsageError where the processes do not hold each number once: nothing is made up."""
    totals = [sum(counts) for counts in zip(*group.tell(shards.counts), strict=True)]
    for (name, info), total in zip(shards.tensors.items(), totals, strict=True):
        if total != info.size:
            raise UsageError(
                "the processes do not hold one model",
                where=name,
                expected=f"{info.size} numbers in all of them together",
                found=str(total),
                hint="place the model on a mesh of all processes first",
            )


def _write(
    path: Path, dest: Path, named: Mapping[str, Sequence[Entry]], own: Sequence[Entry], rounds: Rounds
) -> dict[str, str]:
    """Write this process's files to `path`, which will be `dest`. -> their sums by name"""
    mine, ledger = {entry.name for entry in own}, Ledger()
    sums: dict[str, str] = {}
    try:
        if not named:
            for entry in rounds.entries(own):
                found = write_array(path, entry, ledger)
                sums |= found
                for name in found:
                    sync(path / name)
        for name, file in named.items():
            if file[0].name in mine:
                sums[name] = write_safetensors(path / name, rounds.entries(file), {"format": "pt"}, ledger)
                sync(path / name)
    except Exception as error:
        rounds.finish()
        if not isinstance(error, OSError):
            raise
        raise DestinationError(
            "the destination cannot be written",
            where=str(dest),
            found=error.strerror or str(error),
            hint="check permissions and free space, and that all processes see this folder",
        ) from error
    rounds.finish()
    return sums
