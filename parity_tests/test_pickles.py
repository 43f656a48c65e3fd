"""PyTorch's files, compared with what torch itself reads; hostile ones, of which nothing is run.

All files are written by torch.save, or by zipfile and pickle where torch.save would not write such a thing.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import textwrap
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from twinformers.checkpoints import convert, open_checkpoint
from twinformers.checkpoints.pickles import MAX_DIRECTORY, MAX_PICKLE, pickle_spans
from twinformers.checkpoints.spans import SpanFiles
from twinformers.errors import FormatError, TwinformersError, WeightsError

LAYOUTS = {"zip": True, "before-1.6": False}
both = pytest.mark.parametrize("layout", LAYOUTS)


def save(state, path, layout="zip"):
    torch.save(state, path, _use_new_zipfile_serialization=LAYOUTS[layout])
    return path


def read(path):
    """Every tensor by name, as the reader gives it."""
    files = SpanFiles([Path(path)], pickle_spans)
    try:
        return {name: files.read(name) for name in files.tensors}
    finally:
        files.close()


def refuse(path, match, where="", kind=FormatError):
    """Reading ends in that error, at once; the error. Other work on the machine does not count."""
    start = time.process_time()
    with pytest.raises(kind, match=match) as caught:
        read(path)
    assert time.process_time() - start < 2
    assert str(path) in caught.value.where and where in caught.value.where
    assert len(str(caught.value)) < 2000
    return caught.value


def same(array, tensor):
    """Shape, dtype and every bit."""
    tensor = tensor.detach().contiguous()
    assert array.shape == tuple(tensor.shape) and str(tensor.dtype) == f"torch.{array.dtype.name}"
    assert array.flags.c_contiguous
    return array.tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


# What torch reads, this reads


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_match_torch(dtype, layout, tmp_path):
    g = torch.Generator().manual_seed(0)
    base = torch.randn(7, 11, 5, generator=g, dtype=torch.float64).to(dtype)
    shared = torch.randn(6, 4, generator=g, dtype=torch.float64).to(dtype)
    state = collections.OrderedDict(
        plain=base.clone(),
        view=base[2:5, 1:7],
        transposed=base.permute(2, 0, 1),
        strided=base[::2, ::3, 1::2],
        parameter=torch.nn.Parameter(base[0].clone()),
        one=base[0, 0, :1],
        scalar=base[3, 4, 2],
        empty=base[:0],
        first=shared,
        second=shared,
        third=shared.T,
        nan=torch.tensor([float("nan"), float("inf"), -0.0]).to(dtype),
    )
    state._metadata = {"": {"version": 1}}  # as torch.nn.Module.state_dict has it
    path = save(state, tmp_path / "x.pt", layout)
    expected = torch.load(path, weights_only=True)
    found = read(path)
    assert list(found) == list(expected)
    assert all(same(found[name], tensor) for name, tensor in expected.items())


@both
@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_state_dict_within_a_training_checkpoint(wrapper, layout, tmp_path):
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias]}])
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    content = {
        "epoch": 3,
        wrapper: model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "size": torch.Size([2, 3]),
        "history": [0.5, None, True, "text", 2**70, -1],
    }
    path = save(content, tmp_path / "x.pt", layout)
    found = read(path)
    assert found.keys() == model.state_dict().keys()
    assert all(same(found[name], tensor) for name, tensor in model.state_dict().items())


def test_torch_is_not_needed(tmp_path):
    expected = torch.randn(3, 4)
    save({"w": expected}, tmp_path / "x.pt")
    code = f"""
    import sys
    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "torch":
                raise ModuleNotFoundError(name)
    sys.meta_path.insert(0, Blocker())
    from pathlib import Path
    from twinformers.checkpoints.pickles import pickle_spans
    from twinformers.checkpoints.spans import SpanFiles
    print(SpanFiles([Path({str(tmp_path / "x.pt")!r})], pickle_spans).read("w").tolist())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert json.loads(done.stdout) == expected.tolist(), done.stderr


@both
def test_memory_is_bounded_by_the_tensor(layout, tmp_path):
    big, small = torch.ones(1 << 24), torch.ones(1000, 100)  # 64 MiB and 400 kB
    path = save({"a": big, "small": small, "z": big + 1, "part": big[5:105]}, tmp_path / "x.pt", layout)
    tracemalloc.start()
    try:
        files = SpanFiles([path], pickle_spans)
        for name in ("small", "part"):
            files.read(name)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        tracemalloc.reset_peak()
        files.read("z")
        assert 64 << 20 <= tracemalloc.get_traced_memory()[1] < 66 << 20
    finally:
        tracemalloc.stop()
        files.close()


# Folders of Hugging Face


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=29, hidden_size=24, intermediate_size=20, num_hidden_layers=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


@pytest.fixture
def folder(model, tmp_path):
    """A folder as transformers wrote them once: one file, or with `shards` an index and its files."""

    def make(shards=0, state=None, layout="zip"):
        path = tmp_path / "hf"
        path.mkdir()
        model.config.save_pretrained(path)
        state = dict(state or model.state_dict())
        if not shards:
            save(state, path / "pytorch_model.bin", layout)
            return path
        listed = {}
        for n in range(shards):
            name = f"pytorch_model-{n + 1:05d}-of-{shards:05d}.bin"
            part = dict(list(state.items())[n::shards])
            save({k: v.clone() for k, v in part.items()}, path / name, layout)
            listed |= dict.fromkeys(part, name)
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": listed}))
        return path

    return make


@both
@pytest.mark.parametrize("shards", [0, 3])
def test_legacy_folder_gives_the_models_own_tensors(shards, layout, folder, model):
    with open_checkpoint(folder(shards, layout=layout)) as checkpoint:
        assert checkpoint.format == checkpoint.side == "hf"
        found = dict(convert(checkpoint, "hf"))
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(same(found[name], tensor) for name, tensor in expected.items())


def test_safetensors_win_and_it_is_said(folder, model, caplog):
    from safetensors.torch import save_file

    path = folder(state={k: v * 0 for k, v in model.state_dict().items()})
    save_file({k: v.clone() for k, v in model.state_dict().items()}, path / "model.safetensors")
    with caplog.at_level(logging.INFO), open_checkpoint(path) as checkpoint:
        assert same(checkpoint.read("model.norm.weight"), model.state_dict()["model.norm.weight"])
    assert "model.safetensors" in caplog.text and "not pytorch_model.bin" in caplog.text


def lie(**changes):
    def change(path):
        index = path / "pytorch_model.bin.index.json"
        listed = json.loads(index.read_text())["weight_map"]
        index.write_text(json.dumps({"weight_map": {**listed, **changes}}))

    return change


def third(path):
    return path / "pytorch_model-00003-of-00003.bin"


def repeat(path):
    first = torch.load(path / "pytorch_model-00001-of-00003.bin", weights_only=True)
    last = torch.load(third(path), weights_only=True)
    torch.save({**last, **dict([first.popitem()])}, third(path))


def elsewhere(path):
    third(path).rename(path.parent / "secret.bin")
    third(path).symlink_to(path.parent / "secret.bin")


def pipe(path):
    third(path).unlink()
    os.mkfifo(third(path))


def directory(path):
    third(path).unlink()
    third(path).mkdir()


FOLDERS = {
    "missing shard": (lambda p: third(p).unlink(), "does not exist"),
    "out of the folder": (lie(**{"model.norm.weight": "../secret.bin"}), "points out of its folder"),
    "another shard": (
        lie(**{"model.embed_tokens.weight": "pytorch_model-00002-of-00003.bin"}),
        "index and the files disagree",
    ),
    "tensor that is nowhere": (
        lie(**{"ghost": "pytorch_model-00002-of-00003.bin"}),
        "index and the files disagree",
    ),
    "tensor in two shards": (repeat, "occurs in two files"),
    "link out of the folder": (elsewhere, "link that leaves its folder"),
    "pipe": (pipe, "not a regular file"),
    "directory": (directory, "not a regular file"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folder_with_bad_shards_is_refused(case, folder):
    change, match = FOLDERS[case]
    path = folder(3)
    change(path)
    with pytest.raises(FormatError, match=match) as caught:
        open_checkpoint(path)
    assert "pytorch_model" in caught.value.where


def test_missing_tensor_is_not_made_up(folder, model):
    state = {k: v for k, v in model.state_dict().items() if k != "model.norm.weight"}
    with open_checkpoint(folder(state=state)) as checkpoint, pytest.raises(WeightsError, match="missing"):
        dict(convert(checkpoint, "hf"))


# Hostile files


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Made:
    """Is pickled as a call of `function`, whatever the arguments."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def tensor(storage=None, offset=0, shape=(4,), strides=(1,)):
    storage = torch.zeros(4)._typed_storage() if storage is None else storage
    return Made(
        torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, collections.OrderedDict()
    )


@both
def test_code_is_refused_and_not_run(layout, tmp_path):
    mark = tmp_path / "executed"
    path = save({"w": torch.ones(3), "x": Harm(mark)}, tmp_path / "x.pt", layout)
    error = refuse(path, "asks for code")
    assert error.found == "posix.system" and not mark.exists()
    torch.load(path, weights_only=False)  # it would have worked
    assert mark.exists()


CODE = {
    "object": lambda: argparse.Namespace(a=1),
    "numpy": lambda: np.float64(1.5),
    "allocation": lambda: Made(bytearray, 1 << 40),
    "storage": lambda: Made(torch.UntypedStorage, 1 << 40),
    "tensor class": lambda: Made(torch.FloatTensor, 1 << 20),
    "getattr": lambda: Made(getattr, "text", "upper"),
    "module": lambda: torch.nn.Linear(2, 2),
}


@both
@pytest.mark.parametrize("case", CODE)
def test_unknown_types_are_refused_by_name(case, layout, tmp_path):
    path = save({"w": torch.ones(3), "x": CODE[case]()}, tmp_path / "x.pt", layout)
    assert refuse(path, "asks for code").found


KINDS = {
    "complex64": (lambda: torch.ones(3, dtype=torch.complex64), r"complex64 \[3\]"),
    "int8": (lambda: torch.ones(3, dtype=torch.int8), r"int8 \[3\]"),
    "int64": (lambda: torch.ones(2, 3, dtype=torch.int64), r"int64 \[2, 3\]"),
    "bool": (lambda: torch.ones(3, dtype=torch.bool), r"bool \[3\]"),
    "uint16": (lambda: torch.ones(3, dtype=torch.uint16), "torch.uint16"),
    "float8": (lambda: torch.ones(3).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "qtensor"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse"),
    "sparse rows": (lambda: torch.eye(3).to_sparse_csr(), "sparse"),
    "without values": (lambda: torch.ones(3, device="meta"), "meta"),
    "text": (lambda: "text", "str"),
    "number": (lambda: 3, "int"),
    "another dictionary": (lambda: {"w": torch.ones(3)}, "dict"),
}


@both
@pytest.mark.parametrize("case", KINDS)
def test_what_is_no_plain_tensor_is_refused_by_name(case, layout, tmp_path):
    make, found = KINDS[case]
    path = save({"good": torch.ones(3), "bad.weight": make()}, tmp_path / "x.pt", layout)
    error = refuse(path, "not a plain tensor", ": bad.weight")
    assert error.hint and re.search(found, error.found)


LIES = {
    "longer": tensor(shape=(5,)),
    "wider": tensor(shape=(3, 3), strides=(3, 1)),
    "further": tensor(offset=1),
    "repeated": tensor(shape=(1 << 40,), strides=(0,)),
    "repeated a little": tensor(shape=(5,), strides=(0,)),
    "negative offset": tensor(offset=-1, shape=(3,)),
    "negative stride": tensor(strides=(-1,)),
    "negative shape": tensor(shape=(-4,)),
    "negative twice": tensor(shape=(-2, -2), strides=(2, 1)),
    "fraction": tensor(shape=(1.5,)),
    "text for a shape": tensor(shape="44"),
    "shape without strides": tensor(shape=(2, 2)),
    "rank 1000": tensor(shape=(1,) * 1000, strides=(1,) * 1000),
    "enormous": tensor(shape=(2**2000,)),
    "number for a storage": tensor(storage=4),
    "too few arguments": Made(torch._utils._rebuild_tensor_v2, 1),
}


@both
@pytest.mark.parametrize("case", LIES)
def test_lying_views_are_refused(case, layout, tmp_path):
    path = save({"bad.weight": LIES[case]}, tmp_path / "x.pt", layout)
    refuse(path, "not a plain tensor|not a readable")


def rezip(path, change, compression=zipfile.ZIP_STORED):
    """Write the archive anew, its entries changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    change(entries)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def replace(name, content):
    def change(entries):
        entries[next(n for n in entries if n.endswith(name))] = content

    return change


def cut(name, by):
    def change(entries):
        full = next(n for n in entries if n.endswith(name))
        entries[full] = entries[full][:by] if by < 0 else entries[full] + bytes(by)

    return change


def drop(name):
    return lambda entries: entries.pop(next(n for n in entries if n.endswith(name)))


def dictionary(*items, keys="BINUNICODE"):
    """A pickle of a dictionary, opcode by opcode."""
    return b"\x80\x02}(" + b"".join(items) + b"u."


def key(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


# 60 tuples, each of the one before twice: hashed as a key they would take for ever.
DOUBLING = b"N" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(60))
DEEP = b")" + b"\x85" * 200_000

ARCHIVES = {
    "storage shorter than it says": (cut("data/0", -4), "storage is not as large"),
    "storage longer than it says": (cut("data/0", 4), "storage is not as large"),
    "storage missing": (drop("data/0"), "no such storage"),
    "no pickle": (drop("data.pkl"), "not a readable"),
    "two pickles": (lambda e: e.update({"b/data.pkl": b""}), "not a readable"),
    "empty pickle": (replace("data.pkl", b""), "not a readable"),
    "pickle without end": (replace("data.pkl", b"\x80\x02}"), "not a readable"),
    "nothing on the stack": (replace("data.pkl", b"\x80\x02."), "not a readable"),
    "unknown opcode": (replace("data.pkl", b"\x80\x02\xff."), "not a readable"),
    "protocol 4": (replace("data.pkl", pickle.dumps({}, 4)), "not a readable"),
    "no dictionary": (replace("data.pkl", pickle.dumps([1], 2)), "not a dictionary"),
    "key twice": (
        replace("data.pkl", dictionary(key("a"), b"N", key("a"), b"N")),
        "a key appears twice",
    ),
    "number for a name": (replace("data.pkl", dictionary(b"K\x01", b"N")), "not a plain tensor"),
    "doubling key": (replace("data.pkl", dictionary(DOUBLING, b"N")), "not a readable"),
    "doubling value": (replace("data.pkl", dictionary(key("a"), DOUBLING)), "not a plain tensor"),
    "deep key": (replace("data.pkl", dictionary(DEEP, b"N")), "not a readable"),
    "deep value": (replace("data.pkl", dictionary(key("a"), DEEP)), "not a plain tensor"),
    "memory that was never written": (replace("data.pkl", b"\x80\x02j\xff\xff\xff\xff."), "not a readable"),
    "a million lists": (
        replace("data.pkl", b"\x80\x02" + b"]" * (MAX_PICKLE - 3) + b"."),
        "not a readable",
    ),
    "a million dictionaries": (
        replace("data.pkl", b"\x80\x02(" + b"}" * (MAX_PICKLE - 4) + b"."),
        "not a readable",
    ),
    "a million marks": (replace("data.pkl", b"\x80\x02" + b"(" * (MAX_PICKLE - 3) + b"."), "not a readable"),
    "too large a pickle": (replace("data.pkl", b"]" * (MAX_PICKLE + 1)), "pickle is too large"),
    "big-endian": (replace("byteorder", b"big"), "not little-endian"),
    "100,000 entries": (lambda e: e.update({f"x{n}": b"" for n in range(100_000)}), "not a readable"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_lying_archives_are_refused(case, tmp_path):
    change, match = ARCHIVES[case]
    path = save({"w": torch.ones(16)}, tmp_path / "x.pt")
    rezip(path, lambda e: None)
    assert list(read(path)) == ["w"]  # what zipfile writes is an archive like torch's
    rezip(path, change)
    refuse(path, match)


def test_compressed_entries_are_refused_before_they_are_expanded(tmp_path):
    path = save({"w": torch.zeros(1 << 22)}, tmp_path / "x.pt")
    rezip(path, lambda e: None, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    refuse(path, "is compressed")


def patch(path, marker, at, value):
    """Overwrite the field at a distance from each of some signatures."""
    content = bytearray(path.read_bytes())
    place = content.find(marker)
    assert place >= 0
    while place >= 0:
        content[place + at : place + at + len(value)] = value
        place = content.find(marker, place + 1)
    path.write_bytes(content)


DIRECTORIES = {
    "size beyond the file": (b"PK\x01\x02", 20, struct.pack("<II", 1 << 30, 1 << 30)),
    "sizes that differ": (b"PK\x01\x02", 20, struct.pack("<I", 7)),
    "offset beyond the file": (b"PK\x01\x02", 42, struct.pack("<I", 1 << 30)),
    "all at one place": (b"PK\x01\x02", 42, struct.pack("<I", 0)),
    "a list of 4 GB": (b"PK\x05\x06", 12, struct.pack("<I", 0xFFFFFFF0)),
    "another method": (b"PK\x01\x02", 10, struct.pack("<H", 99)),
    "a longer name": (b"PK\x03\x04", 26, struct.pack("<H", 65535)),
    "a comment": (b"PK\x05\x06", 20, struct.pack("<H", 9)),
}


@pytest.mark.parametrize("case", DIRECTORIES)
def test_lying_directories_are_refused(case, tmp_path):
    path = rezip(save({"w": torch.ones(16)}, tmp_path / "x.pt"), lambda e: None)
    patch(path, *DIRECTORIES[case])
    refuse(path, "archive|readable")


def test_long_directory_is_not_read(tmp_path):
    """The list of entries may lie anywhere and claim anything: no more than its limit is held."""
    path = tmp_path / "x.pt"
    size = MAX_DIRECTORY * 16
    with open(path, "wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(size)
        file.seek(size)
        file.write(struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, size - 4, 4, 0))
    tracemalloc.start()
    try:
        refuse(path, "not a readable")
        assert tracemalloc.get_traced_memory()[1] < 2 * MAX_DIRECTORY
    finally:
        tracemalloc.stop()


@both
def test_truncated_and_extended_files_are_refused(layout, tmp_path):
    path = save({"w": torch.ones(16), "v": torch.ones(3, 4)}, tmp_path / "x.pt", layout)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refuse(path, "PyTorch|fill the file")
    for tail in (b"\0", b"PK\x05\x06", bytes(1000)):
        path.write_bytes(whole + tail)
        refuse(path, "PyTorch|fill the file")


@pytest.mark.parametrize("count", [0, 3, 15, 17, 1 << 40, (1 << 64) - 1])
def test_old_layout_with_another_number_of_elements_is_refused(count, tmp_path):
    path = save({"w": torch.ones(16)}, tmp_path / "x.pt", "before-1.6")
    content = bytearray(path.read_bytes())
    assert struct.unpack_from("<q", content, len(content) - 72) == (16,)
    struct.pack_into("<Q", content, len(content) - 72, count)
    path.write_bytes(content)
    refuse(path, "fill the file|not a readable")


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"<!DOCTYPE html>", b"version https://git-lfs", b"{}"])
def test_files_of_another_kind_are_refused(content, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    refuse(tmp_path / "x.pt", "not a readable PyTorch file")


@both
def test_a_flipped_bit_gives_a_typed_error_or_other_values(layout, tmp_path):
    """2,000 mutations; none of them may crash, hang or raise another error."""
    state = {f"layers.{n}.weight": torch.randn(3, 4) for n in range(4)}
    path = save(state, tmp_path / "x.pt", layout)
    whole, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(1000):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            content[rng.randrange(len(content))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        path.write_bytes(content)
        start = time.process_time()
        try:
            assert all(a.nbytes <= len(whole) for a in read(path).values())
        except TwinformersError:
            refused += 1
        assert time.process_time() - start < 2
    assert 100 < refused < 1000


def test_closed_files_are_not_read(tmp_path):
    files = SpanFiles([save({"w": torch.ones(3)}, tmp_path / "x.pt")], pickle_spans)
    files.close()
    with pytest.raises(TwinformersError, match="closed"):
        files.read("w")


def test_file_that_shrinks_while_it_is_open_is_noticed(tmp_path):
    path = save({"w": torch.ones(1000)}, tmp_path / "x.pt")
    files = SpanFiles([path], pickle_spans)
    os.truncate(path, 1000)
    with pytest.raises(FormatError, match="ends within a tensor"):
        files.read("w")
    files.close()
