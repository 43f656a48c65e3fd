"""safetensors: headers through the library, tensors one at a time, and a writer that streams.

The library's writer wants every tensor in memory at once. The format is a length, a JSON header and the
data; since the weight map knows every shape in advance, the header can be written first and the tensors
as they come. What is written here is read back by the library in the tests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from twinformers.checkpoints.base import TensorInfo
from twinformers.checkpoints.dtypes import numpy_dtype
from twinformers.errors import FormatError

if TYPE_CHECKING:
    import numpy as np

#: The format's names for the float types that models are stored in.
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
CODES = {name: code for code, name in NAMES.items()}


class SafetensorsFiles:
    """Several safetensors files read as one: names across all of them are unique."""

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)
        self.tensors: dict[str, TensorInfo] = {}
        self._handles: dict[str, object] = {}
        for file in self.files:
            handle = self._open(file)
            for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                if name in self.tensors:
                    raise FormatError(
                        "a tensor occurs in two files",
                        where=f"{file}: {name}",
                        found=f"also in {self.tensors[name].file}",
                    )
                header = handle.get_slice(name)
                code = header.get_dtype()
                if code not in NAMES:
                    raise FormatError(
                        "unsupported dtype",
                        where=f"{file}: {name}",
                        expected=", ".join(NAMES),
                        found=code,
                        hint="port the checkpoint in float32, bfloat16 or float16",
                    )
                self.tensors[name] = TensorInfo(tuple(header.get_shape()), NAMES[code], str(file))

    def _open(self, file: Path):
        import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which the library asks for)
        from safetensors import SafetensorError, safe_open

        key = str(file)
        if key not in self._handles:
            try:
                # pread, not a memory map: a map counts the whole file as resident memory.
                self._handles[key] = safe_open(key, framework="numpy", backend="pread").__enter__()
            except FileNotFoundError:
                raise FormatError("the file does not exist", where=key) from None
            except (SafetensorError, OSError) as error:
                raise FormatError(
                    "not a readable safetensors file",
                    where=key,
                    found=str(error),
                    hint="the file is truncated or damaged; fetch it again",
                ) from None
        return self._handles[key]

    def read(self, name: str) -> np.ndarray:
        """One tensor; nothing else of its file is touched."""
        from safetensors import SafetensorError

        file = self.tensors[name].file
        try:
            return self._open(Path(file)).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise FormatError(
                "the tensor cannot be read",
                where=f"{file}: {name}",
                found=str(error),
                hint="the file changed while it was read, or its disk fails",
            ) from None

    def close(self) -> None:
        for handle in self._handles.values():
            handle.__exit__(None, None, None)  # type: ignore[attr-defined]
        self._handles.clear()


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its place in the header is known before it is produced."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    produce: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize


def write_safetensors(
    path: Path,
    entries: Iterable[Entry],
    metadata: Mapping[str, str],
    on_tensor: Callable[[Entry], None] = lambda entry: None,
) -> None:
    """Write one file, holding one tensor in memory at a time."""
    import numpy as np

    entries = list(entries)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
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
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for e in entries:
            array = np.ascontiguousarray(e.produce())
            if array.shape != e.shape or array.dtype != numpy_dtype(e.dtype):
                raise FormatError(
                    "a tensor is not what its header says",
                    where=f"{path}: {e.name}",
                    expected=f"{e.dtype} {list(e.shape)}",
                    found=f"{array.dtype} {list(array.shape)}",
                )
            # The view as bytes is free, and bfloat16 has no buffer protocol of its own.
            file.write(array.reshape(-1).view(np.uint8).data)
            on_tensor(e)


def write_shards(
    folder: Path,
    entries: Sequence[Entry],
    shard_size: int,
    metadata: Mapping[str, str],
    on_tensor: Callable[[Entry], None] = lambda entry: None,
) -> None:
    """`model.safetensors`, or numbered shards of at most `shard_size` bytes and their index."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for e in entries:
        if shards[-1] and filled + e.bytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(e)
        filled += e.bytes
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", entries, metadata, on_tensor)
        return
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, metadata, on_tensor)
    index = {
        "metadata": {"total_size": sum(e.bytes for e in entries)},
        "weight_map": {e.name: name for name, shard in zip(names, shards, strict=True) for e in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
