"""PyTorch's files (.bin, .pt, .pth), read without PyTorch and without running what they say.

Such a file is a pickle, a program for a small stack machine, and the tensors' bytes. Here the program is
followed step by step on strings, numbers, lists and dictionaries; nothing that it names is imported or
called, and what it would have called is compared with the few functions that make tensors. So the tensors
are known before any of their bytes is read, and every size is checked against the file.

`torch.save` has had two layouts: a zip archive whose entries are stored uncompressed (since 1.6), and a
sequence of five pickles followed by the bytes of each storage.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

from twinformers.checkpoints.spans import Span, not_plain
from twinformers.errors import FormatError, TwinformersError

#: A tensor takes about 150 bytes of a pickle and 35 steps: files of 7,000 tensors pass, none takes seconds.
MAX_PICKLE, MAX_STEPS = 1 << 20, 250_000
#: The zip archive's list of entries, of about 100 bytes each.
MAX_DIRECTORY = 4 << 20
#: The first and the second pickle of the old layout.
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
#: How training scripts call the state dict among what else they save.
WRAPPERS = ("state_dict", "model")
#: torch's storage classes: what they hold, and the bytes of one element.
STORAGES = {
    "torch.DoubleStorage": ("float64", 8),
    "torch.FloatStorage": ("float32", 4),
    "torch.HalfStorage": ("float16", 2),
    "torch.BFloat16Storage": ("bfloat16", 2),
    "torch.LongStorage": ("int64", 8),
    "torch.IntStorage": ("int32", 4),
    "torch.ShortStorage": ("int16", 2),
    "torch.CharStorage": ("int8", 1),
    "torch.ByteStorage": ("uint8", 1),
    "torch.BoolStorage": ("bool", 1),
    "torch.ComplexDoubleStorage": ("complex128", 16),
    "torch.ComplexFloatStorage": ("complex64", 8),
    "torch.QInt8Storage": ("qint8", 1),
    "torch.QUInt8Storage": ("quint8", 1),
    "torch.QInt32Storage": ("qint32", 4),
    "torch.storage.UntypedStorage": ("bytes", 1),
}
#: What makes a dense tensor, and what wraps one.
TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
#: What else may be made beside the tensors; its value is of no interest.
HARMLESS = ("torch.Size", "torch.device", "torch.serialization._get_layout", "_codecs.encode")


class Global(NamedTuple):
    """A class or function by its name, and no more than that."""

    name: str


class Storage(NamedTuple):
    """The elements that views share."""

    key: str
    dtype: str
    numel: int
    itemsize: int


class View(NamedTuple):
    """A tensor as the pickle describes it, unchecked."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any


class Opaque(NamedTuple):
    """A value that is no tensor of ours, by what made it."""

    maker: str


def pickle_spans(file: BinaryIO, where: str) -> dict[str, Span]:
    """The tensors of a PyTorch file by name. Tensors may share their bytes.

    Raises FormatError for a file that is damaged, compressed or asks for code, for a storage or a view larger
    than its bytes, and for what is no dense tensor.
    """
    try:
        magic = file.read(4)
        file.seek(0)
        state, places = _zip(file, where) if magic == b"PK\x03\x04" else _sequence(file, where)
    except TwinformersError:
        raise
    except Exception as error:  # a damaged program can fail in any of its steps
        raise FormatError(
            "not a readable PyTorch file",
            where=where,
            expected="what torch.save writes by default",
            found=f"{type(error).__name__}: {error}"[:200],
            hint="the file is truncated or damaged, or of another kind; fetch it again",
        ) from None
    if not isinstance(state, dict):
        raise FormatError(
            "not a dictionary of tensors", where=where, expected="a state dict", found=_describe(state)
        )
    state = next((state[key] for key in WRAPPERS if isinstance(state.get(key), dict)), state)
    return {name: _span(f"{where}: {name}", name, value, places) for name, value in state.items()}


Places = Mapping[str, tuple[int, int]]


def _zip(file: BinaryIO, where: str) -> tuple[Any, Places]:
    """The value of the archive's pickle, and where the storages' bytes lie: offset and size by key."""
    records = dict(_records(file, where))
    roots = [name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError(f"{len(roots)} pickles in the archive")

    def content(name: str) -> bytes:
        offset, size = records[roots[0] + name]
        if size > MAX_PICKLE:
            raise FormatError(
                "the pickle is too large",
                where=f"{where}: {name}",
                expected=f"at most {MAX_PICKLE} bytes beside the tensors",
                found=f"{size} bytes",
                hint="save the tensors in several files, or as safetensors",
            )
        file.seek(offset)
        return file.read(size)

    if roots[0] + "byteorder" in records and (order := content("byteorder")) != b"little":
        raise FormatError(
            "the numbers are not little-endian", where=where, expected="little", found=repr(order)[:50]
        )
    data = f"{roots[0]}data/"
    places = {name.removeprefix(data): place for name, place in records.items() if name.startswith(data)}
    return _run(io.BytesIO(content("data.pkl")), where, {}), places


def _records(file: BinaryIO, where: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """The archive's entries: name, offset and size of the bytes. Compressed ones are never expanded."""
    archive = zipfile.ZipFile(_Directory(file))  # type: ignore[arg-type]
    file.seek(-22, os.SEEK_END)
    tail = file.read(22)
    if tail[:4] != b"PK\x05\x06" or tail[20:] != b"\0\0":
        raise ValueError("something follows the end of the archive")
    seen: set[str] = set()
    free = 0
    for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise FormatError(
                "an entry of the archive is compressed",
                where=f"{where}: {entry.filename}",
                expected="entries stored as they are, as torch.save writes them",
                found=f"{entry.compress_size} bytes for {entry.file_size}",
            )
        file.seek(entry.header_offset)
        head = file.read(30)  # an entry has a header of its own, whose name and padding precede the bytes
        begin = entry.header_offset + 30 + int.from_bytes(head[26:28], "little")
        begin += int.from_bytes(head[28:30], "little")
        end = begin + entry.file_size
        if head[:4] != b"PK\x03\x04" or entry.header_offset < free or end > archive.start_dir:
            raise FormatError(
                "an entry of the archive lies outside of its place",
                where=f"{where}: {entry.filename}",
                expected=f"{entry.file_size} bytes between {free} and {archive.start_dir}",
                found=f"bytes {entry.header_offset} to {end}",
            )
        if entry.filename in seen:
            raise FormatError("an entry of the archive appears twice", where=f"{where}: {entry.filename}")
        seen.add(entry.filename)
        free = end
        yield entry.filename, (begin, entry.file_size)


class _Directory:
    """The file as zipfile may see it: it reads the list of entries whole, however long it claims to be."""

    def __init__(self, file: BinaryIO):
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY:
            raise ValueError(f"{size} bytes for the archive's list of entries")
        return self._read(size if size >= 0 else 1 << 17)  # the end of the archive, with its comment


def _sequence(file: BinaryIO, where: str) -> tuple[Any, Places]:
    """The same for the layout before torch 1.6: each storage's bytes follow their number of elements."""
    head = io.BytesIO(file.read(MAX_PICKLE))
    storages: dict[str, Storage] = {}
    if _run(head, where, {}) != MAGIC or _run(head, where, {}) != PROTOCOL:
        raise ValueError("neither a zip archive nor torch's own magic number")
    _, state, keys = (_run(head, where, storages) for _ in range(3))
    places: dict[str, tuple[int, int]] = {}
    at, size = head.tell(), os.fstat(file.fileno()).st_size
    for key in keys:
        file.seek(at)
        count = int.from_bytes(file.read(8), "little")
        places[key] = (at + 8, count * storages[key].itemsize)
        at += 8 + places[key][1]
    if at != size or len(places) != len(keys):
        raise FormatError(
            "the storages do not fill the file",
            where=where,
            expected=f"{at} bytes",
            found=f"{size} bytes",
            hint="the file is truncated or damaged; fetch it again",
        )
    return state, places


def _run(data: io.BytesIO, where: str, storages: dict[str, Storage]) -> Any:
    """What one pickle amounts to; the storages that it mentions are collected."""
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under each mark
    memo: dict[int, Any] = {}
    arg: Any
    for count, (step, arg, _) in enumerate(pickletools.genops(data)):
        if count == MAX_STEPS:
            raise ValueError(f"the pickle has more than {MAX_STEPS} steps")
        match step.name:
            case "PROTO" | "STOP":
                pass
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "SHORT_BINSTRING":
                stack.append(arg)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[step.name])
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_SET":
                stack.append(Opaque("set"))
            case "GLOBAL":
                stack.append(Global(arg.replace(" ", ".")))
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "MARK":
                below.append(stack)
                stack = []
            case "TUPLE":
                items, stack = stack, below.pop()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(step.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "APPEND" | "SETITEM":
                size = 1 if step.name == "APPEND" else 2
                items = stack[-size:]
                del stack[-size:]
                _fill(stack[-1], items, where)
            case "APPENDS" | "SETITEMS":
                items, stack = stack, below.pop()
                _fill(stack[-1], items, where)
            case "BINPERSID":
                storage = _storage(stack.pop(), where)
                stack.append(storages.setdefault(storage.key, storage))
                if stack[-1] != storage:
                    raise ValueError(f"storage {storage.key} is described in two ways")
            case "REDUCE":
                args = stack.pop()
                stack.append(_call(stack.pop(), args, where))
            case "NEWOBJ":
                stack.pop()
                raise _code(stack.pop(), where)
            case "BUILD":  # attributes, such as a state dict's versions
                stack.pop()
            case _:
                raise ValueError(f"the pickle has a {step.name}")
    return stack.pop()


def _fill(target: Any, items: list[Any], where: str) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A tuple of tuples of tuples could take for ever to hash.
            if not isinstance(key, str | int):
                raise ValueError(f"a key is a {type(key).__name__}")
            if key in target:
                raise FormatError("a key appears twice", where=where, found=repr(key)[:200])
            target[key] = value
    elif not isinstance(target, Opaque):
        raise ValueError(f"items for a {type(target).__name__}")


def _storage(reference: Any, where: str) -> Storage:
    """What a persistent id stands for: a storage, or of old the class of a module with its source."""
    if reference[0] != "storage":
        raise _code(reference[1], where)
    _, cls, key, _, numel, *view = reference  # its device is of no interest; a view is a thing of torch 0.3
    if not isinstance(key, str) or not isinstance(numel, int) or view not in ([], [None]):
        raise ValueError("a storage is not described as torch does")
    dtype, itemsize = STORAGES[cls.name]
    return Storage(key, dtype, numel, itemsize)


def _call(function: Any, args: tuple[Any, ...], where: str) -> Any:
    """What a call would return, if it is one of those that state dicts consist of; nothing is called."""
    name = function.name if isinstance(function, Global) else type(function).__name__
    if name == "collections.OrderedDict" and not args:
        return {}
    if name in TENSORS:
        return View(*args[:4])
    if name in PARAMETERS:
        return args[0]
    if name == "torch._utils._rebuild_tensor_v3":  # of a dtype without a storage class, such as float8
        return Opaque(args[6].name)
    if name in HARMLESS or name.startswith("torch._utils._rebuild_"):  # sparse, quantised, without values
        return Opaque(name)
    raise _code(function, where)


def _code(function: Any, where: str) -> FormatError:
    return FormatError(
        "the file asks for code to be run, which was refused",
        where=where,
        expected="tensors and nothing else",
        found=function.name[:200] if isinstance(function, Global) else _describe(function),
        hint="do not trust this file; its author can save a state dict alone, or safetensors",
    )


def _describe(value: Any) -> str:
    if isinstance(value, View) and isinstance(value.storage, Storage) and _naturals(value.shape):
        return f"{value.storage.dtype} {list(value.shape)}"[:200]
    return value.maker if isinstance(value, Opaque) else type(value).__name__


def _naturals(values: Any) -> bool:
    return isinstance(values, tuple) and all(isinstance(n, int) and n >= 0 for n in values)


def _span(where: str, name: Any, view: Any, places: Places) -> Span:
    """The place of a tensor in the file. Every number is checked: none of them has been used before."""
    if not (
        isinstance(name, str)
        and isinstance(view, View)
        and isinstance(view.storage, Storage)
        and _naturals(view.shape)
        and _naturals(view.strides)
        and _naturals((view.offset,))
        and len(view.shape) == len(view.strides) <= 32  # numpy's limit was 32 for long
    ):
        raise not_plain(where, _describe(view))
    storage, shape, strides = view.storage, view.shape, view.strides
    begin, size = places.get(storage.key, (0, -1))
    if size != storage.numel * storage.itemsize:
        raise FormatError(
            "a storage is not as large as its bytes",
            where=where,
            expected=f"{storage.numel} elements of {storage.dtype} as storage {storage.key}",
            found=f"{size} bytes" if size >= 0 else "no such storage in the file",
            hint="the file is damaged; fetch it again",
        )
    numel = math.prod(shape)
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if numel else 0
    # The second is for strides of zero, which would make much out of a few bytes.
    if view.offset + reach > storage.numel or numel > storage.numel:
        raise FormatError(
            "not a plain tensor, but a view larger than its storage",
            where=where,
            expected=f"at most {storage.numel} elements",
            found=f"shape {list(shape)}, strides {list(strides)}, offset {view.offset}"[:200],
            hint="the file is damaged, or the tensor was expanded: save it as tensor.contiguous()",
        )
    row_major = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    dense = all(n == 1 or s == r for n, s, r in zip(shape, strides, row_major, strict=True)) or not numel
    piece = (begin + view.offset * storage.itemsize, reach * storage.itemsize)
    return Span(storage.dtype, shape, (piece,), None if dense else strides)
