"""Flax's msgpack files: read as flax.serialization reads them, and as transformers 4 ran them.

The files in fixtures/ were written by transformers 4.46.3 itself, with the logits of its Flax models.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict

import twinformers
from twinformers.checkpoints import convert, open_checkpoint
from twinformers.checkpoints.msgpack import MAX_DEPTH, MAX_HEADER, msgpack_spans
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.checkpoints.spans import SpanFiles
from twinformers.configs import config_from_hf, preset
from twinformers.errors import FormatError, TwinformersError, WeightsError
from twinformers.weight_maps import weight_map

LIMIT = 1e-12
FIXTURES = Path(__file__).parent / "fixtures"
LLAMA, MARIAN = FIXTURES / "flax_llama", FIXTURES / "flax_marian"
FILE, INDEX = "flax_model.msgpack", "flax_model.msgpack.index.json"


def read(path):
    files = SpanFiles([Path(path)], msgpack_spans)
    try:
        return {name: files.read(name) for name in files.tensors}
    finally:
        files.close()


def same(found, expected):
    """Names, shapes, dtypes and every bit."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].shape == array.shape and found[name].dtype == array.dtype, name
        assert found[name].tobytes() == np.asarray(array).tobytes(), name
    return True


def refuse(path, match, where=""):
    """Reading ends in a FormatError, at once; other work on the machine does not count."""
    start = time.process_time()
    with pytest.raises(FormatError, match=match) as caught:
        read(path)
    assert time.process_time() - start < 2
    assert str(path) in caught.value.where and where in caught.value.where
    assert len(str(caught.value)) < 2000


# What transformers' Flax models computed


def difference(found, expected):
    expected = np.array(expected)
    assert found.dtype == expected.dtype == np.float64 and np.isfinite(found).all()
    return np.abs(found - expected).max() / np.abs(expected).max()


def arrays(framework, device, *values):
    put = jax.device_put if framework == "jax" else lambda x, d: torch.tensor(x, device=d)
    return [put(np.array(v, np.int32), device) for v in values]


@pytest.fixture(params=["jax", "torch"])
def side(request, jax_device, torch_device):
    """A framework, its device, and its numbers to numpy's; float64 is on."""
    with jax.enable_x64(True), torch.inference_mode():
        device = jax_device if request.param == "jax" else torch_device
        yield request.param, device, lambda x: np.asarray(x.cpu() if request.param == "torch" else x)


@pytest.mark.parametrize("folder", [LLAMA, LLAMA / "sharded"], ids=["single", "sharded"])
def test_llama_logits_match_flax_llama(folder, side):
    framework, device, numpy = side
    case = json.loads((LLAMA / "logits.json").read_text())
    model = twinformers.load(folder, framework, "float64", device)
    tokens, positions = arrays(framework, device, case["input_ids"], case["position_ids"])
    assert difference(numpy(model(tokens, positions)[0]), case["logits"]) <= LIMIT


def test_marian_logits_match_flax_marian(side):
    framework, device, numpy = side
    case = json.loads((MARIAN / "logits.json").read_text())
    model = twinformers.load(MARIAN, framework, "float64", device)
    mask, tokens = np.array(case["attention_mask"]), np.array(case["decoder_input_ids"])
    assert mask.min() == 0  # the source is padded
    inputs = case["input_ids"], np.where(mask, np.arange(mask.shape[1]), -1)
    outputs = tokens, np.arange(tokens.shape[1])[None]
    logits = model(*arrays(framework, device, *inputs, *outputs))[0]
    assert difference(numpy(logits), case["logits"]) <= LIMIT


def test_sharded_and_single_hold_the_same():
    with open_checkpoint(LLAMA) as single, open_checkpoint(LLAMA / "sharded") as sharded:
        assert (single.format, single.side) == (sharded.format, sharded.side) == ("flax", "flax")
        assert same(
            {n: sharded.read(n) for n in sharded.tensors}, {n: single.read(n) for n in single.tensors}
        )
        assert len({info.file for info in sharded.tensors.values()}) == 3


@pytest.mark.parametrize("folder", [LLAMA, MARIAN])
def test_port_to_every_format_keeps_the_bits(folder, tmp_path):
    for to in ("hf", "torch", "jax"):
        twinformers.port(folder, tmp_path / to, to=to)
        with open_checkpoint(folder) as original, open_checkpoint(tmp_path / to) as ported:
            assert same(dict(convert(ported, "flax")), {n: original.read(n) for n in original.tensors})


# The side "flax" of the weight maps


@pytest.mark.parametrize("source", ["preset:llama-tiny", str(MARIAN)])
def test_every_row_has_a_place_in_flax(source):
    table = weight_map(twinformers.load_config(source))
    hf, flax = table.leaves("hf"), table.leaves("flax")
    assert len(hf) == len(flax) and "flax" in table.sides
    assert not [name for name in flax if "." in name or "{" in name]


def without_flax():
    """The paper's layout and FSMT had no Flax class, and Marian's knew one table for both languages only."""
    yield preset("transformer-tiny")
    yield twinformers.load_config(MARIAN).replace(share_embeddings=False)
    yield config_from_hf({"model_type": "fsmt", "langs": ["en", "de"]})


@pytest.mark.parametrize("config", without_flax(), ids=["transformer", "marian-unshared", "fsmt"])
def test_what_had_no_flax_class_has_no_such_side(config):
    with pytest.raises(WeightsError, match="no such form") as caught:
        weight_map(config).tensors("flax")
    assert "flax" not in caught.value.expected


# Any tree that Flax can write


def tree(dtype="float32"):
    rng = np.random.default_rng(0)

    def array(*shape):
        return rng.normal(size=shape).astype(jnp.bfloat16 if dtype == "bfloat16" else dtype)

    return {
        "model": {
            "layers": {str(n): {"kernel": array(3, 5), "bias": array(5)} for n in range(17)},
            "a name of more than thirty-one letters, of which msgpack counts": {"é": array(2, 1, 3, 4)},
            "empty": {},
            "nothing": array(0, 4),
        },
        "scalar": array(),
        "wide": array(1, 70_000),
    }


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_tensors_match_flax(dtype, tmp_path):
    path = tmp_path / FILE
    path.write_bytes(serialization.msgpack_serialize(tree(dtype)))
    expected = flatten_dict(serialization.msgpack_restore(path.read_bytes()), sep="/")
    assert same(read(path), expected)


@pytest.mark.parametrize("size", [1, 8, 100, 4096])
def test_chunked_arrays_match_flax(size, tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", size)
    path = tmp_path / FILE
    content = {"w": np.arange(600, dtype=np.float32).reshape(20, 30), "x": {"b": np.ones(3)}}
    path.write_bytes(serialization.msgpack_serialize(content, in_place=False))
    assert (b"__msgpack_chunked_array__" in path.read_bytes()) == (size < 2400)
    assert same(read(path), flatten_dict(content, sep="/"))


def test_memory_is_bounded_by_the_tensor(tmp_path):
    path = tmp_path / FILE
    big = np.ones(1 << 24, np.float32)
    path.write_bytes(serialization.msgpack_serialize({"a": big, "b": np.ones(100_000, np.float32), "c": big}))
    tracemalloc.start()
    try:
        files = SpanFiles([path], msgpack_spans)
        files.read("b")
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
        tracemalloc.reset_peak()
        files.read("c")
        assert 64 << 20 <= tracemalloc.get_traced_memory()[1] < 66 << 20
    finally:
        tracemalloc.stop()
        files.close()


def test_neither_msgpack_nor_flax_is_needed():
    code = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("msgpack", "flax", "jax", "torch"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
from twinformers.checkpoints import open_checkpoint
with open_checkpoint({str(LLAMA)!r}) as c:
    print(c.read("model/norm/weight").tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    restored = serialization.msgpack_restore((LLAMA / FILE).read_bytes())
    assert json.loads(done.stdout) == restored["model"]["norm"]["weight"].tolist()


# Folders that are not whole


@pytest.fixture
def sharded(tmp_path):
    return Path(shutil.copytree(LLAMA / "sharded", tmp_path / "sharded"))


def change_index(folder, **changes):
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(content))


def test_missing_shard_is_refused(sharded):
    (sharded / "flax_model-00002-of-00003.msgpack").unlink()
    with pytest.raises(FormatError, match="does not exist") as caught:
        open_checkpoint(sharded)
    assert "flax_model-00002" in caught.value.where


@pytest.mark.parametrize("place", ["../x.msgpack", "/etc/passwd", "..", "", 3])
def test_index_that_leaves_the_folder_is_refused(place, sharded):
    change_index(sharded, **{"lm_head/kernel": place})
    with pytest.raises(FormatError, match="points out of its folder"):
        open_checkpoint(sharded)


def test_index_that_lies_is_refused(sharded):
    change_index(sharded, **{"lm_head/kernel": "flax_model-00002-of-00003.msgpack"})
    with pytest.raises(FormatError, match="index and the files disagree") as caught:
        open_checkpoint(sharded)
    assert "lm_head/kernel" in caught.value.where


def test_missing_and_extra_and_transposed_tensors_are_refused(tmp_path):
    folder = Path(shutil.copytree(LLAMA, tmp_path / "llama", ignore=shutil.ignore_patterns("sharded")))
    whole = flatten_dict(serialization.msgpack_restore((folder / FILE).read_bytes()), sep="/")
    norm, down = "model/norm/weight", "model/layers/1/mlp/down_proj/kernel"
    changes = {
        "missing": {k: v for k, v in whole.items() if k != norm},
        "left over": whole | {"model/layers/2/input_layernorm/weight": whole[norm]},
        "wrong shape": whole | {down: whole[down].T},
    }
    for match, content in changes.items():
        (folder / FILE).write_bytes(serialization.msgpack_serialize(unflatten_dict(content, sep="/")))
        with open_checkpoint(folder) as checkpoint, pytest.raises(WeightsError, match=match):
            dict(convert(checkpoint, "hf"))


# Hostile files, byte by byte


def text(value):
    return b"\xd9" + bytes([len(value)]) + value.encode()


def array(shape=b"\x91\x02", dtype="float32", data=bytes(8), length=None, size=None, kind=1):
    body = b"\x93" + shape + text(dtype) + b"\xc6" + struct.pack(">I", length or len(data)) + data
    return b"\xc9" + struct.pack(">IB", len(body) if size is None else size, kind) + body


def entry(value, name="w"):
    return b"\x81" + text(name) + value


L = "a" * 255
HOSTILE = {
    "empty file": (b"", "1 bytes"),
    "a list": (b"\x90", "a map or an array"),
    "a number": (b"\x05", "not a dictionary"),
    "bare array": (array(), "not a dictionary"),
    "2^32 entries": (b"\xdf\xff\xff\xff\xff", "entries"),
    "more entries than bytes": (b"\xde\x00\x09" + text("w") + array(), "entries|before the end"),
    "name longer than the file": (b"\x81\xdb\xff\xff\xff\xffabc", "before the end"),
    "name no text": (b"\x81\x05\x05", "a value of type"),
    "name no UTF-8": (b"\x81\xa2\xff\xfe" + array(), "UTF-8"),
    "name twice": (b"\x82" + 2 * (text("w") + array()), "appears twice"),
    "name twice by slashes": (
        b"\x82" + text("a/b") + array() + text("a") + entry(array(), "b"),
        "appears twice",
    ),
    "name very long": (
        entry(entry(entry(entry(array(), "a" * 255), "b" * 255), "c" * 255), "d" * 255),
        "long",
    ),
    "deep": (entry(b"", "w") * (MAX_DEPTH + 1), "maps within each other"),
    "very deep": (entry(b"", "w") * 100_000, "maps within each other"),
    "trailing bytes": (entry(array()) + b"\0", "end of the file"),
    "nothing": (entry(b"\xc0"), "a map or an array"),
    "float": (entry(b"\xcb" + bytes(8)), "a map or an array"),
    "text": (entry(text("x")), "a map or an array"),
    "true": (entry(b"\xc3"), "not a plain tensor"),
    "number for a tensor": (entry(b"\x07"), "not a plain tensor"),
    "complex number": (entry(array(kind=2)), "extension of type 1"),
    "numpy scalar": (entry(array(kind=3)), "extension of type 1"),
    "extension of 4 GB": (entry(array(size=0xFFFFFFFF)), "bytes of an array"),
    "extension too short": (entry(array(size=5)), "bytes of an array"),
    "data longer than the extension": (entry(array(length=9)), "bytes of an array"),
    "data of 4 GB": (entry(array(length=0xFFFFFFFF)), "bytes of an array"),
    "shape larger than the data": (entry(array(b"\x91\x03")), "float32"),
    "shape smaller than the data": (entry(array(b"\x91\x01")), "float32"),
    "enormous shape": (entry(array(b"\x92" + 2 * (b"\xcf" + b"\xff" * 8))), "float32"),
    "negative shape": (entry(array(b"\x92\xff\xfe")), "a value of type"),
    "rank 1000": (entry(array(b"\xdc\x03\xe8" + b"\x01" * 1000)), "rank 1000"),
    "rank 2^32": (entry(array(b"\xdd\xff\xff\xff\xff")), "rank"),
    "arrays in shapes": (entry(b"\xc7\x09\x01\x93\x91" * 50_000), "a value of type"),
    "integers": (entry(array(dtype="int32")), "not a plain tensor"),
    "float8": (entry(array(dtype="float8_e4m3fn")), "not a plain tensor"),
    "object": (entry(array(dtype="object")), "not a plain tensor"),
    "header too long": (
        b"\xdf" + struct.pack(">I", 40_000) + b"".join(text(f"{n:030}") + b"\x80" for n in range(40_000)),
        f"at most {MAX_HEADER}",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused(case, tmp_path):
    content, match = HOSTILE[case]
    (tmp_path / FILE).write_bytes(entry(array()))
    assert read(tmp_path / FILE)["w"].tolist() == [0, 0]
    (tmp_path / FILE).write_bytes(content)
    refuse(tmp_path / FILE, match)


def chunked(**changes):
    chunks = {"0": np.ones(3, np.float32), "1": np.ones(1, np.float32)}
    whole = {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 2}, "chunks": chunks}
    return serialization.msgpack_serialize({"a": {"w": whole | changes}})


CHUNKS = {
    "too few": {"chunks": {"0": np.ones(3, np.float32)}},
    "too many": {"shape": {"0": 3}},
    "none": {"chunks": {}},
    "not numbered": {"chunks": {"0": np.ones(3, np.float32), "2": np.ones(1, np.float32)}},
    "of two dtypes": {"chunks": {"0": np.ones(3, np.float32), "1": np.ones(1)}},
    "not flat": {"chunks": {"0": np.ones((3, 1), np.float32), "1": np.ones(1, np.float32)}},
    "no shape": {"shape": 3},
    "an array for a shape": {"shape": {"0": np.ones(4, np.float32)}},
}


@pytest.mark.parametrize("case", CHUNKS)
def test_chunks_that_do_not_fit_are_refused(case, tmp_path):
    (tmp_path / FILE).write_bytes(chunked())
    assert read(tmp_path / FILE)["a/w"].tolist() == [[1, 1], [1, 1]]
    (tmp_path / FILE).write_bytes(chunked(**CHUNKS[case]))
    refuse(tmp_path / FILE, "do not make it up", ": a/w")


def test_truncated_and_extended_files_are_refused(tmp_path):
    whole = serialization.msgpack_serialize({"a": {"w": np.ones((3, 4)), "b": np.ones(2)}, "c": np.ones(1)})
    path = tmp_path / FILE
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refuse(path, "not a readable Flax")
    path.write_bytes(whole + whole)
    refuse(path, "not a readable Flax")


def test_a_flipped_bit_gives_a_typed_error_or_other_values(tmp_path):
    whole, rng, path = (LLAMA / FILE).read_bytes(), random.Random(0), tmp_path / FILE
    headers = [n for n in range(len(whole)) if whole[n : n + 1].isalnum() or whole[n] > 0xC0]
    refused = 0
    for _ in range(1000):
        content = bytearray(whole)
        content[rng.choice(headers)] = rng.choice((0, 1, 127, 128, 0xDF, 255, rng.randrange(256)))
        path.write_bytes(content)
        start = time.process_time()
        try:
            read(path)
        except TwinformersError:
            refused += 1
        assert time.process_time() - start < 2
    assert 50 < refused < 1000


def test_a_transposed_kernel_is_told_from_a_weight():
    """The kernels lie [in, out]: read as weights, square matrices would pass unnoticed."""
    checkpoint = PresetCheckpoint("llama", preset("llama-tiny"), 0)
    flax, hf = (dict(convert(checkpoint, side)) for side in ("flax", "hf"))
    name = "model/layers/0/self_attn/o_proj/kernel"
    assert np.array_equal(flax[name].T, hf["model.layers.0.self_attn.o_proj.weight"])
