"""Reading GGUF files (versions 2 and 3, little endian), whose header is checked before anything trusts it.

The gguf package knows the quantisations; its reader is not used, because it hangs on nested arrays and takes
corrupt counts at their word. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO

from twinformers.checkpoints.base import Checkpoint, TensorInfo
from twinformers.checkpoints.dtypes import numpy_dtype
from twinformers.checkpoints.files import open_file
from twinformers.errors import FormatError, MissingDependency, SourceError

if TYPE_CHECKING:
    import numpy as np

#: What a hostile header can cost: bytes, keys or tensors, elements of all arrays together. The largest
#: vocabularies have 262 thousand tokens with twice as many merges: 15 MiB and 1.3 million elements.
MAX_HEADER = 32 << 20
MAX_ENTRIES = 1 << 16
MAX_ELEMENTS = 3 << 19
MAX_DIMS = 4
#: Bytes of a key and of a tensor's name, by the format.
MAX_KEY, MAX_NAME = 65535, 64
#: Elements dequantised at a time, which bounds the temporaries.
CHUNK = 1 << 22

_STRING, _ARRAY = 8, 9
#: GGUF's value type to the struct code of a fixed-size value.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
#: The tensor types that are plain numbers, by the name numpy or ml_dtypes gives them.
_PLAIN = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
}


def gguf_package() -> ModuleType:
    """The gguf package. Raises MissingDependency naming the extra."""
    try:
        import gguf
    except ImportError as error:
        raise MissingDependency(
            "GGUF files need the package gguf", hint="pip install 'twinformers[gguf]'"
        ) from error
    return gguf


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in the file: `kind` is GGUF's number of its type, `row` the bytes of one row."""

    kind: int
    offset: int
    row: int


class _Header:
    """Reads values from the start of the file, never more than the file (or a header's limit) has left."""

    def __init__(self, file: BinaryIO, path: str):
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self.data = file.read(MAX_HEADER)
        self.at = 0
        self.elements = 0

    def fail(self, field: str, problem: str, expected: object = "", found: object = "") -> FormatError:
        where = f"{self.path}: {field[:200]}"
        return FormatError(problem, where=where, expected=str(expected), found=str(found)[:200])

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int, field: str) -> bytes:
        if count > self.left:
            problem = (
                "the header is too long" if self.size > MAX_HEADER else "the file ends before its header does"
            )
            raise self.fail(field, problem, f"{count} more bytes", self.left)
        self.at += count
        return self.data[self.at - count : self.at]

    def scalar(self, code: str, field: str) -> int | float | bool:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), field))[0]

    def integer(self, code: str, field: str) -> int:
        return int(self.scalar(code, field))

    def string(self, field: str, most: int = 1 << 64) -> str:
        if (length := self.integer("Q", field)) > most:
            raise self.fail(field, "a name is too long", f"at most {most} bytes", length)
        try:
            return self.take(length, field).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(field, "a string is not valid UTF-8", found=error.reason) from None

    def strings(self, count: int, field: str) -> list[str]:
        """Several strings; a vocabulary is most of a header, so this is written for speed."""
        data, at, values = self.data, self.at, []
        unpack, end = struct.Struct("<Q").unpack_from, len(self.data)
        try:
            for _ in range(count):
                start = at + 8
                at = start + unpack(data, at)[0]
                if at > end:
                    break
                values.append(data[start:at].decode("utf-8"))
        except (struct.error, UnicodeDecodeError):
            pass
        if len(values) < count:  # the slow way says what is wrong with the string that stopped this
            self.at = start - 8
            self.string(field)
        self.at = at
        return values

    def count(self, code: str, each: int, field: str, most: int = MAX_HEADER) -> int:
        """A number of things, at most so many, of which each takes at least `each` bytes."""
        n = self.integer(code, field)
        if n * each > self.left:
            raise self.fail(field, "a count is larger than the file", f"at most {self.left // each}", n)
        if n > most:
            raise self.fail(field, "a count is larger than any model's", f"at most {most}", n)
        return n

    def value(self, kind: int, field: str) -> object:
        if kind == _STRING:
            return self.string(field)
        if kind == _ARRAY:
            kind = self.integer("I", field)
            if kind == _ARRAY:
                raise self.fail(field, "nested arrays are not supported")
            each = 8 if kind == _STRING else struct.calcsize(f"<{self.code(kind, field)}")
            n = self.count("Q", each, field, MAX_ELEMENTS - self.elements)
            self.elements += n
            if kind == _STRING:
                return self.strings(n, field)
            return list(struct.unpack(f"<{n}{self.code(kind, field)}", self.take(n * each, field)))
        return self.scalar(self.code(kind, field), field)

    def code(self, kind: int, field: str) -> str:
        if kind not in _SCALARS:
            raise self.fail(field, "unknown type of a value", "0 to 12", kind)
        return _SCALARS[kind]


def _metadata(header: _Header, count: int) -> dict[str, object]:
    metadata: dict[str, object] = {}
    for i in range(count):
        key = header.string(f"key {i}", MAX_KEY)
        if key in metadata:
            raise header.fail(key, "the key appears twice")
        metadata[key] = header.value(header.integer("I", key), key)
    return metadata


def _tensor(header: _Header, name: str, alignment: int, gguf: ModuleType) -> tuple[TensorInfo, _Stored]:
    dims = header.integer("I", name)
    if dims > MAX_DIMS:
        raise header.fail(name, "too many dimensions", f"at most {MAX_DIMS}", dims)
    shape = tuple(header.integer("Q", name) for _ in range(dims))[::-1]
    if 0 in shape:
        raise header.fail(name, "a dimension is zero", found=shape)
    kind, offset = header.integer("I", name), header.integer("Q", name)
    try:
        label = gguf.GGMLQuantizationType(kind).name
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise header.fail(name, "unknown tensor type", "one that the gguf package knows", kind) from None
    width = shape[-1] if shape else 1
    if width % block:
        raise header.fail(name, f"{label} stores whole blocks of a row", f"a multiple of {block}", width)
    if offset % alignment:
        raise header.fail(name, "the offset is not aligned", f"a multiple of {alignment}", offset)
    info = TensorInfo(shape, _PLAIN.get(label, label), header.path)
    return info, _Stored(kind, offset, width // block * block_bytes)


class GGUFCheckpoint(Checkpoint):
    """A single .gguf file. Quantised tensors are read as float32, the others in their own dtype.

    Raises FormatError where there is no such file, or where it is malformed, truncated or a part of a split
    model, MissingDependency without the gguf package, ConfigError where the model is not implemented.
    """

    format = "gguf"
    side = "gguf"

    def __init__(self, path: str | Path):
        from twinformers.configs import config_from_gguf

        self.path = str(path)
        gguf = gguf_package()
        # A raw file reads at most 2 GiB at a time.
        self._file = io.BufferedReader(open_file(self.path))  # type: ignore[type-var]
        try:
            self._open(gguf)
            config = config_from_gguf(self.metadata, self._tensors, self.read, where=self.path)
        except BaseException:
            self._file.close()
            raise
        super().__init__(self.path, config)

    def _open(self, gguf: ModuleType) -> None:
        header = _Header(self._file, self.path)
        if (magic := header.take(4, "magic")) != b"GGUF":
            raise header.fail("magic", "this is not a GGUF file", b"GGUF", magic)
        if (version := header.integer("I", "version")) not in (2, 3):
            found = "a big-endian file" if version & 0xFFFF == 0 else version
            raise header.fail("version", "unsupported GGUF version", "2 or 3, little endian", found)
        # The least that a tensor's description and a key with its value take.
        tensor_count = header.count("Q", 24, "tensor count", MAX_ENTRIES)
        self.metadata = _metadata(header, header.count("Q", 13, "key count", MAX_ENTRIES))
        if self.metadata.get("split.count", 0) not in (0, 1):
            raise FormatError(
                "the file is one part of a split model",
                where=f"{self.path}: split.count",
                expected="1",
                found=repr(self.metadata["split.count"])[:200],
                hint="join the parts first: llama-gguf-split --merge FIRST_PART JOINED",
            )
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise header.fail("general.alignment", "impossible alignment", "a multiple of 8", alignment)

        self._tensors: dict[str, TensorInfo] = {}
        self._stored: dict[str, _Stored] = {}
        for i in range(tensor_count):
            name = header.string(f"tensor {i}", MAX_NAME)
            if name in self._tensors:
                raise header.fail(name, "the tensor appears twice")
            self._tensors[name], self._stored[name] = _tensor(header, name, alignment, gguf)
        self._start = -(-header.at // alignment) * alignment
        end, previous = 0, ""
        for name, stored in sorted(self._stored.items(), key=lambda item: item[1].offset):
            if stored.offset < end:
                raise header.fail(name, f"the tensor overlaps {previous}", f"from {end}", stored.offset)
            end, previous = stored.offset + self._bytes(name), name
            if (last := self._start + end) > header.size:
                raise header.fail(name, "the tensor lies beyond the end of the file", header.size, last)

    def _bytes(self, name: str) -> int:
        return math.prod(self._tensors[name].shape[:-1]) * self._stored[name].row

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def files(self) -> list[str]:
        return [self.path]

    def close(self) -> None:
        self._file.close()

    def read(self, name: str) -> np.ndarray:
        import numpy as np

        info, stored = self._tensors[name], self._stored[name]
        if self._file.closed:
            raise SourceError("the checkpoint is closed", where=self.path)
        self._file.seek(self._start + stored.offset)
        if info.dtype in _PLAIN.values():
            out = np.empty(info.shape, numpy_dtype(info.dtype))
            self._fill(out.reshape(-1).view(np.uint8), name)
            return out

        gguf = gguf_package()
        quantisation = gguf.GGMLQuantizationType(stored.kind)
        width, rows = info.shape[-1], math.prod(info.shape[:-1])
        out = np.empty((rows, width), np.float32)
        step = max(1, CHUNK // width)
        for start in range(0, rows, step):
            raw = np.empty((min(step, rows - start), stored.row), np.uint8)
            self._fill(raw.reshape(-1), name)
            try:
                out[start : start + len(raw)] = gguf.quants.dequantize(raw, quantisation)
            except NotImplementedError as error:
                raise FormatError(
                    f"the gguf package cannot dequantise {info.dtype}", where=f"{self.path}: {name}"
                ) from error
        return out.reshape(info.shape)

    def _fill(self, buffer: np.ndarray, name: str) -> None:
        if self._file.readinto(buffer.data) != buffer.nbytes:
            raise FormatError("the file became shorter since it was opened", where=f"{self.path}: {name}")

    @cached_property
    def assets(self) -> Mapping[str, bytes]:  # type: ignore[override]
        """The tokenizer and the generation settings that the metadata describes, if it describes any."""
        from twinformers.checkpoints.gguf_tokenizer import tokenizer_assets

        return tokenizer_assets(self.metadata, self.path)
