"""Our Flax folders: an Orbax checkpoint of a flat dictionary, one array per dotted name.

Tensors are loaded one group at a time with placeholders for the rest, and written one at a time, so that
memory is needed for a group and not for the model. Parts of them are read without the rest.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinformers.checkpoints.base import TensorInfo
from twinformers.checkpoints.dtypes import DTYPES, Ledger, numpy_dtype
from twinformers.checkpoints.files import open_file, read_json
from twinformers.checkpoints.folders import FolderCheckpoint
from twinformers.checkpoints.hashed_file import HashedFile
from twinformers.checkpoints.rows import read_part, read_rows
from twinformers.errors import FormatError, MissingDependency, first_line

if TYPE_CHECKING:
    import numpy as np

    from twinformers.checkpoints.safetensors_io import Entry

PARAMS = "params"
#: Where Orbax puts the arrays, a folder each.
STATE = "state"
#: One call to Orbax costs milliseconds whatever it loads; groups of this size make that disappear.
GROUP_BYTES = 256 << 20


def _orbax():
    import ml_dtypes  # noqa: F401  (numpy's bfloat16)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from orbax.checkpoint import v1
    except ImportError:
        raise MissingDependency(
            "Orbax checkpoints need the package orbax-checkpoint",
            hint="pip install 'twinformers[jax]'",
        ) from None
    return v1


@contextlib.contextmanager
def _quiet(level: int = logging.ERROR) -> Iterator[None]:
    """Orbax reports every step through absl; only what goes wrong concerns us, and most of that is raised."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


class OrbaxFolder(FolderCheckpoint):
    """A folder written by `port --to jax`."""

    format = side = "jax"

    def __init__(self, source: str, folder: Path):
        super().__init__(source, folder)
        self._path = (folder / PARAMS).resolve()
        self._held: dict[str, np.ndarray] = {}
        ocp = _orbax()
        try:
            with _quiet():
                tree = ocp.metadata(self._path).metadata
        except Exception as error:  # Orbax raises many types, from its own to tensorstore's
            raise FormatError(
                "not a readable Orbax checkpoint",
                where=str(self._path),
                found=first_line(error),
            ) from None
        if tree is None:  # Orbax says why to its log alone
            raise FormatError(
                "not a readable Orbax checkpoint",
                where=str(self._path),
                expected="the description of every array",
                found="some that are missing or damaged",
                hint="the folder is incomplete; copy or port it again",
            )
        odd = (
            [n for n, leaf in tree.items() if not hasattr(leaf, "shape")]
            if isinstance(tree, Mapping)
            else [""]
        )
        if odd:
            raise FormatError(
                "not a flat dictionary of arrays",
                where=f"{self._path}: {odd[0]}" if odd[0] else str(self._path),
                expected="an array under every name",
                hint="only folders written by `twinformers port --to jax` are read",
            )
        self._tensors = {
            k: TensorInfo(tuple(m.shape), str(m.dtype), str(self._path)) for k, m in tree.items()
        }
        for name, info in self._tensors.items():
            if info.dtype not in DTYPES:
                raise FormatError(
                    "unsupported dtype",
                    where=f"{self._path}: {name}",
                    expected=", ".join(DTYPES),
                    found=info.dtype,
                )

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str) -> np.ndarray:
        """One tensor; its neighbours in the table's order are loaded with it and handed out next."""
        if name not in self._held:
            from twinformers.weight_maps import weight_map

            order = [n for n in weight_map(self.config).leaves("jax") if n in self._tensors]
            group: list[str] = []
            size = 0
            for n in order[order.index(name) :] if name in order else [name]:
                info = self._tensors[n]
                size += info.size * numpy_dtype(info.dtype).itemsize
                if group and size > GROUP_BYTES:
                    break
                group.append(n)
            self._held = self._load(group)
        return self._held.pop(name)

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor. Of an array in one file without compression, as `port` writes it, besides the
        part a few rows are in memory; of others, the chunks that the part touches are read."""
        import numpy as np

        info = self._tensors[name]
        place = self._path / STATE / name
        try:
            with _quiet():
                array = self._array(name)
                if array.shape != info.shape or array.dtype.name != info.dtype:
                    raise ValueError(f"{array.dtype.name} {list(array.shape)} instead of the array described")
                if _plain(array):
                    return self._part(place.joinpath("c", *("0" for _ in info.shape)), name, index)
                return np.array(array[index].read().result())
        except FormatError:
            raise
        except Exception as error:  # TensorStore raises ValueError for whatever goes wrong
            raise FormatError(
                "the Orbax checkpoint cannot be read",
                where=f"{self._path}: {name}",
                found=first_line(error),
            ) from None

    def _array(self, name: str) -> Any:
        """The array in TensorStore; nothing but its description has been read."""
        import tensorstore

        how, place = read_json(self._path / STATE / "_METADATA", self.folder), f"{self._path / STATE}/"
        store: dict[str, Any] = {"driver": "file", "path": f"{place}{name}/"}
        if how.get("use_ocdbt"):  # Orbax's own way: all arrays in one database
            store = {"driver": "ocdbt", "base": {"driver": "file", "path": place}, "path": f"{name}/"}
        return tensorstore.open(
            {
                "driver": "zarr3" if how.get("use_zarr3") else "zarr",
                "kvstore": store,
                # Where zeros are stored like all else, what is missing is lost.
                "fill_missing_data_reads": not how.get("store_array_data_equal_to_fill_value"),
            }
        ).result()

    def _part(self, file: Path, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of what the only chunk of an array holds."""
        info, dtype = self._tensors[name], numpy_dtype(self._tensors[name].dtype)
        with open_file(file, self.folder) as chunk:
            if (size := os.fstat(chunk.fileno()).st_size) != info.size * dtype.itemsize:
                raise FormatError(
                    "the array's file has another size",
                    where=f"{file}: {name}",
                    expected=f"{info.size * dtype.itemsize} bytes",
                    found=f"{size} bytes",
                    hint="the folder is incomplete; copy or port it again",
                )
            rows = partial(read_rows, chunk.fileno(), 0, dtype=dtype, where=f"{file}: {name}")
            return read_part(info.shape, dtype, index, rows)

    def _load(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        import numpy as np

        ocp = _orbax()
        target = {
            # The target's dtype is the stored one: Orbax would cast silently to any other.
            n: np.empty(i.shape, numpy_dtype(i.dtype)) if n in names else ocp.PLACEHOLDER
            for n, i in self._tensors.items()
        }
        try:
            with _quiet():
                loaded = ocp.load(self._path, target)
        except Exception as error:
            raise FormatError(
                "the Orbax checkpoint cannot be read",
                where=str(self._path),
                found=first_line(error),
            ) from None
        return {n: np.asarray(loaded[n]) for n in names}


def _plain(array: Any) -> bool:
    """Whether an array's bytes lie in a file of their own, row after row, as they are."""
    spec = array.spec().to_json()
    described = spec["metadata"]
    return (
        spec["kvstore"]["driver"] == "file"
        and array.chunk_layout.read_chunk.shape == array.shape
        and described.get("chunk_key_encoding") == {"name": "default"}
        and described.get("codecs") == [{"name": "bytes", "configuration": {"endian": "little"}}]
    )


def write_orbax(
    folder: Path, entries: Sequence[Entry], ledger: Ledger, on_tensor: Callable[[Entry], None]
) -> dict[str, str]:
    """Write `params/` of a jax folder, a tensor at a time, and give the SHA-256 of the large files.

    Orbax lays the checkpoint down with a placeholder under every name; TensorStore then describes each array
    as a single chunk without compression, whose file is the array's bytes (zarr 3, "regular" grid and "bytes"
    codec). Those are written here: Orbax would send them through the system's cache, two to three times
    slower, and holds several tensors meanwhile. Peak memory is a constant and 2.5 times the largest tensor.
    """
    write_outline(folder, entries)
    sums: dict[str, str] = {}
    for e in entries:
        sums |= write_array(folder, e, ledger)
        on_tensor(e)
    return sums


def write_outline(folder: Path, entries: Sequence[Entry]) -> None:
    """`params/` without the bytes of its arrays. Of several processes of JAX's, one calls this on its own."""
    import jax

    path = (folder / PARAMS).resolve()
    names = {e.name: e.dtype for e in entries}
    if jax.process_count() > 1:  # Orbax would wait for the others: one that knows of no others does it
        code = (
            "import json, sys; from twinformers.checkpoints.orbax import lay_down;"
            "lay_down(*json.load(sys.stdin))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps([str(path), names]),
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise OSError(done.stderr.strip().rpartition("\n")[2][:300])
    else:
        lay_down(str(path), names)
    for e in entries:
        with _saving():
            _describe(path / STATE / e.name, e)


def lay_down(path: str, names: Mapping[str, str]) -> None:
    """A checkpoint of Orbax's with a placeholder of its dtype under every name."""
    import numpy as np

    ocp = _orbax()
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    with _quiet(logging.CRITICAL), context, _saving():
        ocp.save(path, {name: np.zeros((), numpy_dtype(dtype)) for name, dtype in names.items()})


def write_array(folder: Path, entry: Entry, ledger: Ledger) -> dict[str, str]:
    """The bytes of one array, which the outline describes. -> the SHA-256 of its file, by its path"""
    if not entry.bytes:
        return {}
    file = Path(PARAMS, STATE, entry.name, "c", *("0" for _ in entry.shape))
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    with HashedFile(folder / file) as chunk:
        chunk.write_arrays(ledger.pieces(entry))
        return {file.as_posix(): chunk.close()}


def _describe(place: Path, entry: Entry) -> None:
    """An array of the entry's shape and dtype where one was: a single chunk, which is yet to be written."""
    import tensorstore

    shutil.rmtree(place)
    tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{place}/"},
            "metadata": {
                "shape": entry.shape,
                "data_type": entry.dtype,
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": [max(1, n) for n in entry.shape]},
                },
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            },
        },
        create=True,
    ).result()


@contextlib.contextmanager
def _saving() -> Iterator[None]:
    """A full disk is an OSError to others; to TensorStore it is a ValueError.

    Once one of its writes has failed, the others call back into an event loop that is closed, when they like:
    that is not printed then and later.
    """
    printed = sys.unraisablehook
    sys.unraisablehook = lambda u: None if str(u.exc_value) == "Event loop is closed" else printed(u)
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(first_line(error)) from error
    else:
        sys.unraisablehook = printed
