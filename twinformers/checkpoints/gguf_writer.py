"""Writing GGUF files that llama.cpp runs, through the gguf package, one tensor at a time."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from twinformers.checkpoints.base import Checkpoint
from twinformers.checkpoints.dtypes import Ledger, numpy_dtype
from twinformers.checkpoints.gguf import gguf_package
from twinformers.checkpoints.hashed_file import HashedFile
from twinformers.checkpoints.safetensors_io import Entry
from twinformers.errors import ConfigError, WeightsError

#: The tensor types that are written, and what llama.cpp calls a file that mostly has them.
TYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
}


def gguf_plan(plan: Sequence[Entry]) -> list[Entry]:
    """The entries as the file will hold them: what has one dimension (norms, rotary divisors) is float32.

    llama.cpp's kernels expect that, whatever the type of the matrices. Raises WeightsError for float64, in
    which they do not compute.
    """
    for e in plan:
        if e.dtype not in TYPES:
            raise WeightsError(
                "llama.cpp does not compute in this dtype",
                where=e.name,
                expected=f"one of {', '.join(TYPES)}",
                found=e.dtype,
                hint="ask for one of them: --dtype float32",
            )
    return [replace(e, dtype="float32") if len(e.shape) == 1 else e for e in plan]


def gguf_metadata(checkpoint: Checkpoint, plan: Sequence[Entry]) -> dict[str, Any]:
    """All keys of the file but those that say where the tensors lie.

    Raises ConfigError for an architecture or a value that GGUF does not know, FormatError for a tokenizer
    that it cannot express.
    """
    from twinformers.checkpoints.gguf_tokenizer_writer import tokenizer_metadata

    hyper = checkpoint.config.to_gguf()
    sizes: dict[str, int] = {}
    for e in plan:
        sizes[e.dtype] = sizes.get(e.dtype, 0) + e.bytes
    most = max(sizes, key=lambda name: sizes[name])
    vocab = hyper[f"{checkpoint.config.architecture}.vocab_size"]
    return {
        "general.type": "model",
        "general.name": Path(checkpoint.source).name.encode(errors="replace").decode(),
        "general.file_type": int(gguf_package().LlamaFileType[TYPES[most][1]]),
        **hyper,
        **tokenizer_metadata(checkpoint.assets, vocab, checkpoint.source),
    }


def write_gguf(
    path: Path,
    checkpoint: Checkpoint,
    plan: Sequence[Entry],
    ledger: Ledger,
    on_tensor: Callable[[Entry], None] = lambda entry: None,
) -> str:
    """Write one file out of a `gguf_plan`, holding one tensor in memory at a time, and give its SHA-256.

    Raises the errors of `gguf_metadata` before the file exists, MissingDependency without the gguf package.
    """
    gguf = gguf_package()
    metadata = gguf_metadata(checkpoint, plan)
    writer = gguf.GGUFWriter(None, checkpoint.config.architecture)
    for key, value in metadata.items():
        _add(writer, key, value, gguf.GGUFValueType)
    for e in plan:
        kind = gguf.GGMLQuantizationType[TYPES[e.dtype][0]]
        writer.add_tensor_info(e.name, e.shape, numpy_dtype(e.dtype), e.bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (head,) = writer.fout
        writer.write_padding(head, head.tell())
    finally:
        writer.close()
    with HashedFile(path, append=True) as file:
        for e in plan:
            file.write_arrays(ledger.pieces(e))
            writer.write_padding(file, e.bytes)
            on_tensor(e)
        return file.close()


def _add(writer: Any, key: str, value: Any, types: Any) -> None:
    """One key, in the type that llama.cpp asks for. Raises ConfigError for what fits in no such type."""
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    kind = types[kinds[type(value)]]
    try:
        if kind == types.UINT32:
            struct.pack("<I", value)
        elif kind == types.FLOAT32:
            struct.pack("<f", value)
    except (struct.error, OverflowError) as error:
        raise ConfigError(
            "GGUF cannot hold this value", where=key, expected=kind.name, found=f"{value!r:.200}: {error}"
        ) from None
    writer.add_key_value(key, value, kind)
