"""A checksum for every file: `SHA256SUMS` in a folder, `NAME.sha256` beside a single file.

The format is that of `sha256sum`, so that `sha256sum -c SHA256SUMS` checks a folder with no tool of ours.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from twinformers.checkpoints.files import open_file, read_file
from twinformers.errors import FormatError, IntegrityError, SourceError

SUMS = "SHA256SUMS"
_LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *]([^\0\n]+)\n")
_CHUNK = 4 << 20

#: Told how many bytes have been read, and how many there are.
OnBytes = Callable[[int, int], None]


def write(folder: Path, known: Mapping[str, str]) -> dict[str, str]:
    """Write `SHA256SUMS` for all files of the folder; those whose sums are `known` are not read."""
    names = _names(folder)
    with ThreadPoolExecutor(2) as threads:  # hashing leaves Python to the others
        found = threads.map(lambda name: known.get(name) or sha256(folder / name), names)
        sums = dict(zip(names, found, strict=True))
    (folder / SUMS).write_bytes(_text(sums))
    return sums


def beside(file: Path) -> Path:
    """Where the sum of a single file is kept."""
    return file.with_name(file.name + ".sha256")


def write_beside(file: Path, known: str = "") -> None:
    """Write `NAME.sha256`; a file whose sum is `known` is not read."""
    beside(file).write_bytes(_text({file.name: known or sha256(file)}))


def read(place: Path) -> dict[str, str]:
    """The sums that belong to a folder or a single file, by name.

    Raises SourceError where there are none, IntegrityError where they are malformed or name something else.
    """
    single = not place.is_dir()
    path = beside(place) if single else place / SUMS
    if not os.path.lexists(path):
        command = f"sha256sum {place.name} > {path.name}" if single else "port the folder"
        raise SourceError(
            "there are no checksums to check",
            where=str(place),
            expected=str(path),
            hint=f"{command}; what was written by `twinformers port` has them",
        )
    text = os.fsdecode(read_file(path, path.parent))
    sums: dict[str, str] = {}
    # Nothing but a line feed ends a line, and the last line has one too: no flipped bit is to pass.
    for number, line in enumerate(re.findall(r"[^\n]*\n|[^\n]+\Z", text) or [""], 1):
        match = _LINE.fullmatch(line)
        name = (_unescaped(match[3]) if match[1] else match[3]) if match else ""
        inside = name == place.name if single else _inside(name)
        if not match or not inside or name in sums:
            raise IntegrityError(
                "the checksums are damaged",
                where=f"{path}: line {number}",
                expected=f"a sum and the name of {'the file' if single else 'another file of this folder'}",
                found=repr(line)[:200],
                hint="fetch or port the checkpoint again",
            )
        sums[name] = match[2]
    return sums


def check(place: Path, on_bytes: OnBytes = lambda done, total: None) -> dict[str, str]:
    """Read every file of a folder, or a single file, and compare the sums; they are returned.

    Raises IntegrityError naming the first file that is changed, missing or added, and the errors of `read`.
    """
    sums = read(place)
    folder = place if place.is_dir() else place.parent
    present = _names(folder) if place.is_dir() else [place.name]
    for name in sorted(sums.keys() ^ set(present)):
        listed = name in sums
        raise IntegrityError(
            "a file is missing" if listed else "a file was added",
            where=str(folder / name),
            expected=f"a file with the sum {sums[name]}" if listed else f"a line in {SUMS}",
            found="none",
            hint="fetch or port the checkpoint again" if listed else "remove it, or write the sums again",
        )
    total = sum(os.stat(folder / name).st_size for name in sums)
    done = 0

    def told(count: int) -> None:
        nonlocal done
        done += count
        on_bytes(done, total)

    for name, expected in sums.items():
        if (found := sha256(folder / name, folder, told)) != expected:
            raise IntegrityError(
                "the file is not the one that was written",
                where=str(folder / name),
                expected=f"the sum {expected}",
                found=found,
                hint="it was changed or is damaged; fetch or port the checkpoint again",
            )
    return sums


def _names(folder: Path) -> list[str]:
    """Every file below the folder but the sums, relative and sorted. Links are not followed into folders."""
    found = []
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        found += [Path(root, name).relative_to(folder).as_posix() for name in files + links]
    return sorted(name for name in found if name != SUMS)


def sha256(
    path: Path, folder: Path | None = None, on_bytes: Callable[[int], None] = lambda count: None
) -> str:
    """The sum of a file, in hexadecimal digits. Raises FormatError where it cannot be read."""
    result = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    with open_file(path, folder) as file:
        try:
            while count := file.readinto(buffer):  # type: ignore[attr-defined]
                result.update(memoryview(buffer)[:count])
                on_bytes(count)
        except OSError as error:
            raise FormatError("the file cannot be read", where=str(path), found=str(error)) from None
    return result.hexdigest()


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return str(path) == name and not path.is_absolute() and ".." not in path.parts and name not in (".", SUMS)


def _text(sums: Mapping[str, str]) -> bytes:
    lines = []
    for name, digest in sorted(sums.items()):
        escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        lines.append(f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n")
    return os.fsencode("".join(lines))


def _unescaped(name: str) -> str:
    return re.sub(r"\\(.)", lambda match: {"n": "\n", "r": "\r"}.get(match[1], match[1]), name)
