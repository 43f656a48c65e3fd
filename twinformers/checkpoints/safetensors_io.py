"""safetensors: a reader that trusts no header, and a writer that streams.

The library's writer wants every tensor in memory at once. The format is a length, a JSON header and the
data; since the weight map knows every shape in advance, the header can be written first and the tensors
as they come. The library's reader takes the last of two keys of one name and parses headers of 100 MB, and
what it hands over has been copied once more than needed. Both directions are held against the library in
the tests. The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from twinformers.checkpoints.atomic import sync
from twinformers.checkpoints.base import TensorInfo
from twinformers.checkpoints.dtypes import Ledger, numpy_dtype
from twinformers.checkpoints.files import open_file, uncollected
from twinformers.checkpoints.hashed_file import HashedFile
from twinformers.checkpoints.rows import read_part, read_rows
from twinformers.errors import FormatError

if TYPE_CHECKING:
    import numpy as np

#: The format's names for the float types that models are stored in.
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
CODES = {name: code for code, name in NAMES.items()}
#: What else may lie beside the weights (positions, masks): it is listed and never read.
_INTEGERS = {"BOOL": ("bool", 1), "I16": ("int16", 2), "I32": ("int32", 4), "I64": ("int64", 8)}
#: What weights may have been quantised or changed to; nothing here computes with those.
_UNSUPPORTED = "I8 U8 U16 U32 U64 C64 F4 F6_E2M3 F6_E3M2 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ"
_TYPES = {"F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}
_TYPES |= _INTEGERS

#: A tensor takes about 110 bytes of a header. No file of a real model has more than some ten thousand.
MAX_HEADER = 8 << 20
MAX_RANK = 32
#: Files that are kept open at a time; a model may have hundreds.
MAX_OPEN = 16


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: counted from the start of its file."""

    path: Path
    start: int
    bytes: int


class SafetensorsFiles:
    """Several safetensors files read as one: names across all of them are unique.

    Headers are checked completely before anything is read: every byte of the data belongs to one tensor, and
    every tensor has as many as its shape and dtype say. Raises FormatError naming file and tensor.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)
        self.tensors: dict[str, TensorInfo] = {}
        self._stored: dict[str, _Stored] = {}
        self._opened: dict[Path, BinaryIO] = {}
        self._seen: dict[Path, tuple[int, ...]] = {}
        self._closed = False
        try:
            with uncollected():
                for file in self.files:
                    self._add(file)
        except BaseException:
            self.close()
            raise

    def _add(self, file: Path) -> None:
        header, start, size = _header(self._open(file), file)
        for name, (code, shape, begin, end) in header.items():
            where = f"{file}: {name[:200]}"
            if name in self.tensors:
                raise FormatError(
                    "a tensor occurs in two files", where=where, found=f"also in {self.tensors[name].file}"
                )
            if code not in _TYPES:
                known = code in _UNSUPPORTED.split()
                raise FormatError(
                    "unsupported dtype" if known else "unknown dtype",
                    where=where,
                    expected=", ".join(NAMES),
                    found=code[:200],
                    hint="the weights are quantised or of a type that no model computes with; port the "
                    "checkpoint in float32, bfloat16 or float16",
                )
            if (count := math.prod(shape) * _TYPES[code][1]) != end - begin:
                raise FormatError(
                    "the header contradicts itself about a tensor's size",
                    where=where,
                    expected=f"{count} bytes for {code} {list(shape)}",
                    found=f"{end - begin} bytes between the offsets",
                    hint="the file is damaged; fetch it again",
                )
            self.tensors[name] = TensorInfo(shape, _TYPES[code][0], str(file))
            self._stored[name] = _Stored(file, start + begin, count)
        _check_layout(header, size - start, file)

    def _open(self, file: Path) -> BinaryIO:
        """The file, opened now or earlier; the same one that its header was read from."""
        if (handle := self._opened.get(file)) is not None:
            return handle
        if self._closed:
            raise FormatError("the checkpoint is closed", where=str(file))
        handle = open_file(file, file.parent)
        state = os.fstat(handle.fileno())
        seen = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
        if self._seen.setdefault(file, seen) != seen:
            handle.close()
            raise FormatError("the file changed since it was opened", where=str(file), hint="start again")
        while len(self._opened) >= MAX_OPEN:
            self._opened.pop(next(iter(self._opened))).close()
        self._opened[file] = handle
        return handle

    def read(self, name: str) -> np.ndarray:
        """One tensor; nothing else of its file is touched. Raises FormatError where it holds no floats."""
        self._check_floats(name)
        return self._rows(name, 0, self.tensors[name].shape)

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, a slice of step 1 for each axis: besides it, a few rows are in memory at most.

        Rows that are not asked for are not read; of those that are, the whole is, for they lie together.
        """
        self._check_floats(name)
        info = self.tensors[name]
        return read_part(info.shape, numpy_dtype(info.dtype), index, partial(self._rows, name))

    def _check_floats(self, name: str) -> None:
        info = self.tensors[name]
        if info.dtype not in CODES:
            raise FormatError(
                "a weight is stored as whole numbers",
                where=f"{info.file}: {name}",
                expected=", ".join(CODES),
                found=info.dtype,
                hint="port the checkpoint in float32, bfloat16 or float16",
            )

    def _rows(self, name: str, first: int, shape: tuple[int, ...]) -> np.ndarray:
        """As many rows as a shape says, from row `first` on."""
        info, stored = self.tensors[name], self._stored[name]
        handle, where = self._open(stored.path).fileno(), f"{info.file}: {name}"
        return read_rows(handle, stored.start, first, shape, numpy_dtype(info.dtype), where)

    def close(self) -> None:
        self._closed = True
        for handle in self._opened.values():
            handle.close()
        self._opened.clear()


#: A tensor of a header: dtype code, shape, begin and end in the data.
_Described = tuple[str, tuple[int, ...], int, int]


def _header(file: BinaryIO, path: Path) -> tuple[dict[str, _Described], int, int]:
    """The tensors that the header lists, where the data begins, and the file's size."""
    size = os.fstat(file.fileno()).st_size

    def fail(problem: str, expected: str, found: object, hint: str = "") -> FormatError:
        hint = hint or "the file is damaged or of another format; fetch it again"
        return FormatError(problem, where=str(path), expected=expected, found=str(found)[:300], hint=hint)

    length = int.from_bytes(os.pread(file.fileno(), 8, 0), "little") if size >= 8 else 0
    if length < 2:
        raise fail("not a safetensors file", "8 bytes of length and a header", f"{size} bytes in all")
    if length > MAX_HEADER:
        raise fail("the header is too long for a safetensors file", f"at most {MAX_HEADER} bytes", length)
    if 8 + length > size:
        raise fail("the file ends in its header: it is truncated", f"{8 + length} bytes or more", size)
    try:
        items = _JSON.decode(os.pread(file.fileno(), length, 8).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise fail("the header of the safetensors file is not JSON", "an object of tensors", error) from None
    if not isinstance(items, _Pairs):
        raise fail("the header of the safetensors file is no object", "tensors by name", type(items).__name__)
    result: dict[str, _Described] = {}
    for name, value in items:
        if name == METADATA:
            if not isinstance(value, _Pairs) or not all(isinstance(v, str) for _, v in value):
                raise fail(f"{METADATA} of the safetensors file is odd", "texts by name", value)
            continue
        if name in result:
            raise FormatError("a tensor occurs twice in the header", where=f"{path}: {name[:200]}")
        result[name] = _described(value, f"{path}: {name[:200]}")
    return result, 8 + length, size


class _Pairs(list):
    """An object of JSON with its keys in order, each as often as it occurs."""


_JSON = json.JSONDecoder(object_pairs_hook=_Pairs)
METADATA = "__metadata__"


def _described(value: Any, where: str) -> _Described:
    fields = dict(value) if isinstance(value, _Pairs) else {}
    if not isinstance(value, _Pairs) or {k for k, _ in value} != {"dtype", "shape", "data_offsets"}:
        raise FormatError(
            "a tensor is not described as safetensors does",
            where=where,
            expected="dtype, shape and data_offsets",
            found=", ".join(map(repr, fields))[:200] or type(value).__name__,
        )
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(code, str):
        raise FormatError("bad dtype", where=where, expected="a name", found=repr(code)[:200])
    # Products of whole numbers without a bound take time and memory without a bound.
    if not _is_counts(shape) or len(shape) > MAX_RANK:
        expected = f"at most {MAX_RANK} whole numbers, each from 0, below 2^63"
        raise FormatError("bad shape", where=where, expected=expected, found=repr(shape)[:200])
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        expected = "where the tensor begins and ends"
        raise FormatError("bad data_offsets", where=where, expected=expected, found=repr(offsets)[:200])
    return code, tuple(shape), *offsets


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_layout(header: Mapping[str, _Described], size: int, path: Path) -> None:
    """Every byte of the data belongs to one tensor. Raises FormatError naming the first that is off."""
    end, previous = 0, ""
    for name, (_, _, begin, stop) in sorted(header.items(), key=lambda item: item[1][2:]):
        if begin != end:
            problem = f"overlaps {previous[:200]}" if begin < end else "leaves a hole before it"
            raise FormatError(
                f"the tensor {problem}",
                where=f"{path}: {name[:200]}",
                expected=f"to begin at byte {end} of the data",
                found=str(begin),
                hint="the file is damaged, or hides something; fetch it again",
            )
        end, previous = stop, name
    if end != size:
        raise FormatError(
            "the file is truncated" if end > size else "the file holds more than its tensors",
            where=str(path),
            expected=f"{end} bytes of data",
            found=str(size),
            hint="fetch it again",
        )


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its place in the header is known before it is produced.

    `produce` gives it in its shape; the dtype and the layout in memory may still be those of where it comes
    from. That is what `source` says, by file and name.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    produce: Callable[[], np.ndarray]
    source: str = ""

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize


def write_safetensors(
    path: Path,
    entries: Iterable[Entry],
    metadata: Mapping[str, str],
    ledger: Ledger,
    on_tensor: Callable[[Entry], None] = lambda entry: None,
) -> str:
    """Write one file, holding at most one large tensor in memory, and give its SHA-256."""
    entries = list(entries)
    header: dict[str, object] = {METADATA: dict(metadata)}
    offset = 0
    for e in entries:
        header[e.name] = {
            "dtype": CODES[e.dtype],
            "shape": list(e.shape),
            "data_offsets": [offset, offset + e.bytes],
        }
        offset += e.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    with HashedFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for e in entries:
            file.write_arrays(ledger.pieces(e))
            on_tensor(e)
        return file.close()


def write_shards(
    folder: Path,
    entries: Sequence[Entry],
    shard_size: int,
    metadata: Mapping[str, str],
    ledger: Ledger,
    on_tensor: Callable[[Entry], None] = lambda entry: None,
) -> dict[str, str]:
    """`model.safetensors`, or numbered shards of at most `shard_size` bytes and their index.

    The SHA-256 of each file of tensors is given by its name.
    """
    shards = in_files(entries, shard_size)
    named = dict(zip(file_names(len(shards)), shards, strict=True))
    write_index(folder, named)
    sums = {}
    with ThreadPoolExecutor(1) as beside:
        reached = []
        for name, shard in named.items():
            sums[name] = write_safetensors(folder / name, shard, metadata, ledger, on_tensor)
            # It goes to the disk while the next one is written.
            reached.append(beside.submit(sync, folder / name))
        for done in reached:
            done.result()
    return sums


def in_files(entries: Sequence[Entry], shard_size: int) -> list[list[Entry]]:
    """The entries of each file: at most `shard_size` bytes, or a single tensor that is larger."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for e in entries:
        if shards[-1] and filled + e.bytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(e)
        filled += e.bytes
    return shards


def file_names(count: int) -> list[str]:
    """What that many files of one model are called."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


def write_index(folder: Path, named: Mapping[str, Sequence[Entry]]) -> None:
    """Say which of several files holds which tensor; a single one needs no index."""
    if len(named) == 1:
        return
    index = {
        "metadata": {"total_size": sum(e.bytes for shard in named.values() for e in shard)},
        "weight_map": {e.name: name for name, shard in named.items() for e in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
