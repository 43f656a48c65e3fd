"""The files that a run learns from: texts, one document each, or token ids."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from twinformers.errors import FormatError, SourceError, UsageError, first_line

if TYPE_CHECKING:
    import numpy as np

#: What is read out of a folder; a file that is named itself may be called anything.
TEXTS = (".txt", ".md", ".rst", ".py")
TOKENS = (".npy", ".bin")
#: Characters that are turned into tokens at a time: an encoding takes twenty times the text's memory.
PIECE = 1 << 20


def find_files(data: Sequence[str]) -> tuple[list[Path], bool]:
    """The files behind paths and folders, in a fixed order, and whether they hold token ids.

    Raises SourceError for a path that does not exist or holds nothing to learn from, UsageError for texts
    and token files together.
    """
    found: list[Path] = []
    for name in data:
        path = Path(os.path.expanduser(name))
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in TEXTS + TOKENS and p.is_file())
            if not inside:
                raise SourceError(
                    "the folder holds no data",
                    where=name,
                    expected=f"files that end in {', '.join(TEXTS)}, or in {' or '.join(TOKENS)}",
                )
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise SourceError("no such data", where=name, expected="a file or a folder")
    kinds = {path.suffix in TOKENS for path in found}
    if len(kinds) > 1:
        raise UsageError(
            "texts and token files cannot be mixed",
            where="data",
            expected=f"all of the files, or none, to end in {' or '.join(TOKENS)}",
            found=", ".join(str(p) for p in found[:5]),
        )
    return found, kinds == {True}


def documents(files: Sequence[Path]) -> Iterator[str]:
    """The text of each file that is not empty. Raises FormatError for what is no UTF-8."""
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(
                "not a text in UTF-8",
                where=str(path),
                found=f"{error.reason} at byte {error.start}",
                hint="token files are recognised by their names: .npy, .bin",
            ) from None
        except OSError as error:
            raise FormatError("the file cannot be read", where=str(path), found=str(error.strerror)) from None
        if text:
            yield text


def pieces(text: str) -> Iterator[str]:
    """A document in parts of moderate size, each up to the end of a line where there is one."""
    start = 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            line = text.rfind("\n", start, end) + 1
            end = line if line > start else end
        yield text[start:end]
        start = end


def token_array(path: Path, dtype: str | None) -> np.ndarray:
    """The token ids of a file, mapped and not read. [count]

    A .npy file says its type itself, a raw .bin file (little-endian) has that of `dtype`. Raises UsageError
    where that is not given, FormatError for a file that holds something else.
    """
    import numpy as np

    try:
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        elif dtype is None:
            raise UsageError(
                "a raw file does not say what its tokens are",
                where=str(path),
                expected="--token-dtype uint16 or uint32",
            )
        else:
            width = np.dtype(dtype).itemsize
            if path.stat().st_size % width:
                raise ValueError(f"{path.stat().st_size} bytes, no multiple of {width}")
            array = np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r")
    except (ValueError, OSError, EOFError) as error:
        raise FormatError("not a file of tokens", where=str(path), found=first_line(error)) from None
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise FormatError(
            "not a file of tokens",
            where=str(path),
            expected="integers along one axis",
            found=f"{array.dtype} {list(array.shape)}",
        )
    return array
