"""`flax_model.msgpack`, as transformers 4 wrote it: read without msgpack, Flax or JAX.

The file is one nested map whose leaves are arrays; an array is an extension of type 1 that holds shape, name
of the dtype and bytes. Flax cuts arrays of more than 1 GB into flat chunks. Of the msgpack format
(github.com/msgpack/msgpack, spec.md) this takes what `flax.serialization` writes and refuses the rest.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from twinformers.checkpoints.dtypes import DTYPES, numpy_dtype
from twinformers.checkpoints.spans import Span, not_plain
from twinformers.errors import FormatError

#: Everything but the arrays' bytes; one takes about 50 bytes of it.
MAX_HEADER = 1 << 20
MAX_DEPTH = 32
MAX_NAME = 1000
CHUNKED = "__msgpack_chunked_array__"
NDARRAY = 1

#: The codes of the format: how many bytes hold the length (or the number itself), by kind.
STRINGS, BYTES = {0xD9: 1, 0xDA: 2, 0xDB: 4}, {0xC4: 1, 0xC5: 2, 0xC6: 4}
ARRAYS, MAPS = {0xDC: 2, 0xDD: 4}, {0xDE: 2, 0xDF: 4}
INTEGERS = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
EXTENSIONS, FIXED_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}, {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


def msgpack_spans(file: BinaryIO, where: str) -> dict[str, Span]:
    """The tensors of the file, their keys joined by "/".

    Raises FormatError for a file that is damaged or says more than it holds, for a name that appears twice,
    and for leaves that are no arrays.
    """
    buffered: Any = io.BufferedReader(file, 1 << 14)  # type: ignore[type-var]
    try:
        reader = _Reader(buffered, os.fstat(file.fileno()).st_size, where)
        tree = reader.value(0)
        if reader.left:
            raise reader.error("the end of the file", f"{reader.left} more bytes")
    finally:
        buffered.detach()  # closing it would close the file
    if not isinstance(tree, dict):
        raise FormatError("not a dictionary of tensors", where=where, expected="a map", found=_name(tree))
    result: dict[str, Span] = {}
    for name, span in _leaves(tree, (), where):
        if name in result:
            raise FormatError("a tensor appears twice", where=f"{where}: {name}")
        result[name] = span
    return result


class _Reader:
    """Reads values one after the other; arrays are passed over, and no count is believed."""

    def __init__(self, file: io.BufferedReader, size: int, where: str):
        self._file, self._size, self._where = file, size, where
        self._header = 0

    @property
    def left(self) -> int:
        return self._size - self._file.tell()

    def error(self, expected: str, found: str) -> FormatError:
        return FormatError(
            "not a readable Flax msgpack file",
            where=f"{self._where}: byte {self._file.tell()}",
            expected=expected,
            found=found,
            hint="the file is truncated or damaged, or of another kind; fetch it again",
        )

    def _take(self, count: int) -> bytes:
        self._header += count
        if count > self.left:
            raise self.error(f"{count} bytes", f"{self.left} bytes before the end")
        if self._header > MAX_HEADER:
            raise self.error(f"at most {MAX_HEADER} bytes beside the arrays", "more")
        return self._file.read(count)

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")

    def value(self, depth: int) -> Any:
        """A map as a dict, an array as its Span, a number or True."""
        code = self._number(1)
        if (number := self._length(code, INTEGERS, 0, 128)) is not None:
            return number
        if code == 0xC3:
            return True
        if code in EXTENSIONS or code in FIXED_EXTENSIONS:
            size = FIXED_EXTENSIONS.get(code) or self._number(EXTENSIONS[code])
            if (kind := self._number(1)) != NDARRAY:
                raise self.error("an array, which is an extension of type 1", f"type {kind}")
            return self._array(size)
        if (count := self._length(code, MAPS, 0x80, 16)) is None:
            raise self.error("a map or an array", f"a value of type 0x{code:02x}")
        if depth == MAX_DEPTH:
            raise self.error(f"at most {MAX_DEPTH} maps within each other", "more")
        if 2 * count > self.left:
            raise self.error(f"{count} entries", f"{self.left} bytes before the end")
        result: dict[str, Any] = {}
        for _ in range(count):
            key = self._text()
            if key in result:
                raise FormatError("a key appears twice", where=self._where, found=repr(key)[:200])
            result[key] = self.value(depth + 1)
        return result

    def _length(self, code: int, codes: dict[int, int], first: int, short: int) -> int | None:
        """The length or number in a value of this kind; `short` ones have a code each, from `first` on."""
        if first <= code < first + short:
            return code - first
        return self._number(codes[code]) if code in codes else None

    def _counted(self, codes: dict[int, int], first: int = 0, short: int = 0) -> int:
        """The same where no other kind may stand."""
        code = self._number(1)
        if (length := self._length(code, codes, first, short)) is None:
            kinds = ", ".join(f"0x{c:02x}" for c in codes)
            raise self.error(f"a value of type {kinds}", f"0x{code:02x}")
        return length

    def _text(self) -> str:
        try:
            return self._take(self._counted(STRINGS, 0xA0, 32)).decode()
        except UnicodeDecodeError as error:
            raise self.error("UTF-8", str(error)) from None

    def _array(self, size: int) -> Span:
        """Shape, dtype and bytes, which must fill the extension."""
        end = self._file.tell() + size
        parts, rank = self._counted(ARRAYS, 0x90, 16), self._counted(ARRAYS, 0x90, 16)
        if parts != 3 or rank > 32:  # numpy's limit was 32 for long
            raise self.error("shape, dtype and bytes of an array", f"{parts} values, rank {rank}")
        shape = tuple(self._counted(INTEGERS, 0, 128) for _ in range(rank))
        dtype, length = self._text(), self._counted(BYTES)
        begin = self._file.tell()
        if begin + length != end or end > self._size:
            raise self.error(f"{size} bytes of an array", f"bytes up to {begin + length} of {self._size}")
        if dtype in DTYPES and length != math.prod(shape) * numpy_dtype(dtype).itemsize:
            raise self.error(f"{dtype} {list(shape)}", f"{length} bytes")
        self._file.seek(end)
        return Span(dtype, shape, ((begin, length),))


def _leaves(tree: dict[str, Any], path: tuple[str, ...], where: str) -> Iterator[tuple[str, Span]]:
    for key, value in tree.items():
        name = "/".join((*path, key))
        if len(name) > MAX_NAME:  # many that begin with the same long key would fill the memory
            raise FormatError("a name is too long", where=where, found=f"{len(name)} letters")
        if isinstance(value, dict) and CHUNKED in value:
            yield name, _joined(value, f"{where}: {name}")
        elif isinstance(value, dict):
            yield from _leaves(value, (*path, key), where)
        elif isinstance(value, Span):
            yield name, value
        else:
            raise not_plain(f"{where}: {name}", _name(value))


def _joined(value: dict[str, Any], where: str) -> Span:
    """An array that was cut: `shape` and `chunks` are maps from "0", "1", ... to numbers and flat arrays."""
    shape, chunks = (_listed(value.get(key)) for key in ("shape", "chunks"))
    if not (
        chunks
        and all(type(n) is int for n in shape)
        and all(isinstance(c, Span) and c.dtype == chunks[0].dtype and len(c.shape) == 1 for c in chunks)
        and math.prod(shape) == sum(c.shape[0] for c in chunks)
    ):
        raise FormatError(
            "the chunks of an array do not make it up",
            where=where,
            expected="a shape, and flat arrays of one dtype with as many elements",
            found=", ".join(_name(c) for c in chunks[:4]) or "nothing",
            hint="the file is damaged; fetch it again",
        )
    return Span(chunks[0].dtype, tuple(shape), tuple(c.pieces[0] for c in chunks))


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, dict) or set(value) != {str(n) for n in range(len(value))}:
        return []
    return [value[str(n)] for n in range(len(value))]


def _name(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Span) else type(value).__name__
