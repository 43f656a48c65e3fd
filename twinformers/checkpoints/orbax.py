"""Our Flax folders: an Orbax checkpoint of a flat dictionary, one array per dotted name.

Tensors are loaded one group at a time with placeholders for the rest, and saved in parts one group at a time,
so that both need memory for groups and not for the model.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinformers.checkpoints import manifest
from twinformers.checkpoints.atomic import sync
from twinformers.checkpoints.base import TensorInfo
from twinformers.checkpoints.dtypes import DTYPES, Ledger, numpy_dtype
from twinformers.checkpoints.folders import FolderCheckpoint
from twinformers.checkpoints.layout import reusing
from twinformers.errors import FormatError, MissingDependency, first_line

if TYPE_CHECKING:
    import numpy as np

    from twinformers.checkpoints.safetensors_io import Entry

PARAMS = "params"
#: One call to Orbax costs milliseconds whatever it loads; groups of this size make that disappear.
GROUP_BYTES = 256 << 20
#: When writing, memory is needed for two of them.
WRITTEN_BYTES = 64 << 20


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


def write_orbax(
    folder: Path, entries: Sequence[Entry], ledger: Ledger, on_tensor: Callable[[Entry], None]
) -> dict[str, str]:
    """Write `params/` of a jax folder, a group of tensors at a time, and give the SHA-256 of the large files.

    While Orbax writes one group, the next is read, and what the one before has left is summed and sent to the
    disk; a group is WRITTEN_BYTES and the tensor that goes beyond. Sums are by the file's name in the folder.
    Peak memory is at most 2 * WRITTEN_BYTES and five times the largest tensor, whatever the model's size.
    Uncompressed and without OCDBT, which measured about 7 times faster.
    """
    ocp = _orbax()
    path = (folder / PARAMS).resolve()
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.use_compression = False
    context.memory.deepcopy_host_arrays = False  # a group is left alone once it is handed over
    group: dict[str, np.ndarray] = {}
    writing: Any = None
    names: list[str] = []
    sums: list[Future[dict[str, str]]] = []
    # What fails in Orbax's threads is raised here.
    with _quiet(logging.CRITICAL), context, reusing(2), ThreadPoolExecutor(1) as beside:
        try:
            for number, e in enumerate(entries, 1):
                group[e.name] = ledger.array(e)
                on_tensor(e)
                if number == len(entries) or sum(x.nbytes for x in group.values()) >= WRITTEN_BYTES:
                    with _saving():
                        if writing:
                            writing.result()
                            sums.append(beside.submit(_summed, folder, names))
                        names = list(group)
                        writing, group = ocp.partial.save_async(path, group), {}
        finally:
            if writing:  # also if something failed: nobody is to write into a folder that is being removed
                with _saving():
                    writing.result()
        known = {name: digest for future in sums for name, digest in future.result().items()}
        with _saving():
            ocp.partial.finalize(path)
    return known


def _summed(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """The sums of the arrays' data, in the folder where Orbax collects them before it gives it its name.

    Where another release collects them elsewhere, nothing is found: what has no sum is read at the end.
    """
    found = {}
    for name in names:
        for state in folder.glob(f"{PARAMS}.partial_save/*/state/{glob.escape(name)}"):
            for file in (state / "c").rglob("*"):
                if file.is_file():
                    found[f"{PARAMS}/state/{file.relative_to(state.parent).as_posix()}"] = manifest.sha256(
                        file
                    )
                    sync(file)
    return found


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
