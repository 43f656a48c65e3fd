"""Porting in bounded memory, bit for bit; what casting loses; weights that are not finite."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from twinformers import port
from twinformers.checkpoints import layout, open_checkpoint
from twinformers.checkpoints.base import Checkpoint, TensorInfo
from twinformers.checkpoints.dtypes import Ledger, numpy_dtype
from twinformers.checkpoints.safetensors_io import Entry
from twinformers.cli.app import run
from twinformers.cli.port import parse_size
from twinformers.configs import preset
from twinformers.errors import UsageError, WeightsError
from twinformers.weight_maps import weight_map

TINY = "preset:llama-tiny"
WEIGHTS = "model.safetensors"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def bits(array):
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


# Layout


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (3, 5), (129, 513), (512, 128), (1031, 1027)])
def test_contiguous_matches_numpy(dtype, shape):
    generator = np.random.default_rng(0)
    raw = generator.integers(0, 256, size=(*shape, numpy_dtype(dtype).itemsize), dtype=np.uint8)
    array = raw.view(numpy_dtype(dtype))[..., 0]  # NaN with any payload among them
    for view in (array, array.T, array[::-1].T, array[:, ::2].T, array[::3], array[:, :1]):
        found = layout.contiguous(view)
        assert found.flags.c_contiguous and found.dtype == view.dtype
        assert np.array_equal(bits(found), bits(view))


@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0)])
def test_pieces_match_numpy(axes, monkeypatch):
    monkeypatch.setattr(layout, "PIECE_BYTES", 1000)
    array = np.arange(7 * 50 * 33, dtype=np.float32).reshape(7, 50, 33).transpose(axes)
    pieces = list(layout.pieces(array))
    assert len(pieces) > 5 and all(p.ndim == 1 and p.flags.c_contiguous for p in pieces)
    assert np.array_equal(np.concatenate(pieces), array.reshape(-1))
    vector = np.arange(999, dtype=np.float64)[::-1]
    assert np.array_equal(np.concatenate(list(layout.pieces(vector))), vector)
    assert np.concatenate(list(layout.pieces(np.float32(3).reshape(())))) == 3


def test_memory_is_used_again_only_when_nothing_looks_at_it():
    size = (layout.PIECE_BYTES // 4 + 1,)
    with layout.reusing():
        first = layout.empty(size, np.dtype("f4"))
        view = first[10:20].reshape(2, 5).T
        first[:] = 1
        place = first.ctypes.data
        del first
        second = layout.empty(size, np.dtype("f4"))
        assert second.ctypes.data != place and (view == 1).all()
        second[:] = 2
        assert (view == 1).all()
        del view
        third = layout.empty(size, np.dtype("f4"))
        assert third.ctypes.data == place


# Bit for bit


@pytest.fixture
def small_groups(monkeypatch):
    """The tiny model takes the ways of a large one: many groups and pieces, memory that is used again."""
    from twinformers.checkpoints import orbax

    monkeypatch.setattr(layout, "PIECE_BYTES", 2000)
    monkeypatch.setattr(orbax, "GROUP_BYTES", 30_000)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("there", ["hf", "torch", "jax"])
@pytest.mark.parametrize("back", ["hf", "torch", "jax"])
def test_round_trip_is_bit_identical(there, back, dtype, small_groups, tmp_path):
    port(TINY, tmp_path / "start", to="hf", dtype=dtype)
    port(tmp_path / "start", tmp_path / "there", to=there)
    port(tmp_path / "there", tmp_path / "back", to=back)
    result = port(tmp_path / "back", tmp_path / "end", to="hf")
    assert (tmp_path / "start" / WEIGHTS).read_bytes() == (tmp_path / "end" / WEIGHTS).read_bytes()
    assert result.losses == {} and result.dtypes == {dtype: result.tensors}


def test_orbax_holds_what_numpy_transposes(small_groups, tmp_path):
    """Against Orbax itself and plain numpy: no tensor has been overwritten by the next one."""
    from orbax.checkpoint import v1

    port(TINY, tmp_path / "hf", to="hf")
    port(tmp_path / "hf", tmp_path / "jax", to="jax")
    theirs = load_file(tmp_path / "hf" / WEIGHTS)
    tree = v1.metadata(tmp_path / "jax" / "params").metadata
    ours = v1.load(tmp_path / "jax" / "params", {k: np.empty(m.shape, m.dtype) for k, m in tree.items()})
    leaves = weight_map(preset("llama-tiny")).leaves("jax")
    assert ours.keys() == leaves.keys() and len(ours) == len(theirs)
    for name, leaf in leaves.items():
        expected = theirs[leaf.name("hf")]
        kernel = name.endswith("kernel")
        assert np.array_equal(np.asarray(ours[name]), expected.T if kernel else expected), name


# Memory

MEASURE = """
import json, sys
from twinformers.checkpoints import open_checkpoint, porting
source, destination, to = sys.argv[1:4]
if to == "jax":
    from orbax.checkpoint import v1
open_checkpoint(source).close()
porting.port("preset:llama-tiny", destination + "-warm", to=to)
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) << 10
before = status("VmRSS")
porting.port(source, destination, to=to, **json.loads(sys.argv[4]))
print(status("VmHWM") - before)
"""


class Constant(Checkpoint):
    """A model of zeros and one tensor that is larger than the others."""

    format, side = "constant", "hf"

    @property
    def tensors(self):
        leaves = weight_map(self.config).tensors("hf")
        return {n: TensorInfo(parts[0].shape("hf"), "bfloat16", "") for n, parts in leaves.items()}

    def read(self, name):
        return np.ones(self.tensors[name].shape, BFLOAT16)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """350 MB: twelve layers of 24 MB, and an embedding of 64 MB."""
    folder = tmp_path_factory.mktemp("large") / "hf"
    config = preset("llama-tiny").replace(
        vocab_size=32_768,
        hidden_size=1024,
        intermediate_size=2752,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=64,
        tie_word_embeddings=True,
    )
    result = port(Constant("constant", config), folder, to="hf", shard_size=100_000_000)
    assert result.bytes > 330_000_000
    return folder


LARGEST = 32_768 * 1024 * 2


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(
    ("to", "options", "most"),
    [
        ("torch", {}, 2.5 * LARGEST),
        ("torch", {"dtype": "float16"}, 2.5 * LARGEST),
        ("torch", {"dtype": "float32"}, 2.5 * 2 * LARGEST),
        # As docs/porting.md says: Orbax's own needs come on top.
        ("jax", {}, (16 << 20) + 2.5 * LARGEST),
    ],
    ids=["same", "narrower", "wider", "orbax"],
)
def test_peak_memory_is_bounded(to, options, most, large, tmp_path):
    assert _peak(large, tmp_path / "out", to, options) <= most


def test_peak_memory_is_measured(large, tmp_path):
    """The check above fails for a port that holds the model: all tensors in one list."""
    hoarding = MEASURE.replace(
        "before =",
        "read, kept = open_checkpoint(source).__class__.read, []\n"
        "def hoard(self, name):\n    kept.append(read(self, name))\n    return kept[-1]\n"
        "open_checkpoint(source).__class__.read = hoard\nbefore =",
    )
    assert hoarding != MEASURE
    assert _peak(large, tmp_path / "out", "torch", {}, hoarding) > 4 * LARGEST


def _peak(source, destination, to, options, script=MEASURE):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(source), str(destination), to, json.dumps(options)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


# What casting loses


def entry(array, dtype):
    return Entry("w", array.shape, dtype, lambda: array)


def relative(before, after):
    """The largest relative error, in Python's own numbers, of what neither overflowed nor vanished."""
    pairs = zip(before.astype(float).tolist(), after.astype(float).tolist(), strict=True)
    errors = [abs(b - a) / abs(b) for b, a in pairs if np.isfinite(b) and b and np.isfinite(a) and a]
    return max(errors, default=0.0)


NARROWING = [
    ("float64", "float32"),
    ("float64", "float16"),
    ("float64", "bfloat16"),
    ("float32", "float16"),
    ("float32", "bfloat16"),
    ("bfloat16", "float16"),
    ("float16", "bfloat16"),
]


@pytest.mark.parametrize(("before", "after"), NARROWING)
def test_losses_match_plain_arithmetic(before, after, monkeypatch):
    monkeypatch.setattr(layout, "PIECE_BYTES", 4000)
    generator = np.random.default_rng(0)
    values = generator.standard_normal(5000) * 2.0 ** generator.integers(-40, 40, 5000)
    with np.errstate(over="ignore"):
        array = values.astype(numpy_dtype(before))
        array[:4] = [0.0, np.inf, -np.inf, np.nan]
        expected = array.astype(numpy_dtype(after))
    ledger = Ledger()
    found = ledger.array(entry(array, after))
    assert np.array_equal(bits(found), bits(expected))
    loss = ledger.losses[after]
    # In float32 the quotient of two exact numbers is rounded once.
    assert loss.relative == pytest.approx(relative(array, expected), rel=1e-6)
    assert loss.overflows == sum(np.isinf(expected.astype(float)) & np.isfinite(array.astype(float)))
    assert loss.zeros == sum((expected == 0) & (array != 0))
    assert loss.tensor == "w"
    if after == "float16" and before != "float16":
        assert loss.overflows and loss.zeros


@pytest.mark.parametrize(
    ("before", "after"),
    [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float64"), ("float32", "float32")],
)
def test_wider_types_lose_nothing(before, after):
    array = np.random.default_rng(0).standard_normal(100).astype(numpy_dtype(before))
    ledger = Ledger()
    assert np.array_equal(ledger.array(entry(array, after)), array.astype(numpy_dtype(after)))
    assert ledger.losses == {}


def change(folder, name, values, dtype=np.float32):
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = tensors[name].astype(dtype)
    tensors[name].flat[: len(values)] = values
    save_file(tensors, folder / WEIGHTS)


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


def test_port_says_what_is_lost(tmp_path, capsys, caplog):
    port(TINY, tmp_path / "hf", to="hf")
    change(tmp_path / "hf", UP, [1e6, -1e30, 1e-30])
    with caplog.at_level(logging.WARNING):
        result = port(tmp_path / "hf", tmp_path / "out", to="jax", dtype="float16")
    loss = result.losses["float16"]
    assert (loss.overflows, loss.zeros) == (2, 1) and 4e-4 < loss.relative < 0.5
    assert [r.message for r in caplog.records if "infinite" in r.message] == [
        "layers.1.mlp.up_proj.kernel: 2 values are too large for float16 and became infinite"
    ]
    assert run(["port", str(tmp_path / "hf"), str(tmp_path / "cli"), "--to", "hf", "--dtype", "float16"]) == 0
    out = capsys.readouterr().out
    assert "lost to float16: largest relative error" in out and "2 values became infinite, 1 zero" in out
    arguments = ["port", str(tmp_path / "hf"), str(tmp_path / "json"), "--to", "hf", "--dtype", "float16"]
    assert run([*arguments, "--json"]) == 0
    losses = json.loads(capsys.readouterr().out)["losses"]
    assert losses["float16"].keys() == {"relative", "tensor", "overflows", "zeros"}


# Not finite


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_counts_of_what_is_not_finite_match_numpy(dtype, caplog):
    generator = np.random.default_rng(0)
    kind = numpy_dtype(dtype)
    raw = generator.integers(0, 256, size=200_000 * kind.itemsize, dtype=np.uint8).view(kind)
    raw[::1000] = np.inf
    raw[7::5000] = -np.inf
    with caplog.at_level(logging.WARNING):
        Ledger().array(entry(raw, dtype))
    with np.errstate(invalid="ignore"):
        nans, infinities = int(np.isnan(raw).sum()), int(np.isinf(raw).sum())
    assert nans and infinities
    assert [r.message for r in caplog.records] == [f"w: {nans} values are NaN, {infinities} infinite"]
    caplog.clear()
    largest = np.array([np.finfo(kind).max if dtype != "bfloat16" else ml_dtypes.finfo(kind).max], kind)
    Ledger(strict=True).array(entry(np.concatenate([largest, -largest, 0 * largest]), dtype))
    assert not caplog.records


@pytest.mark.parametrize("to", ["hf", "torch", "jax"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_strict_refuses_by_name(to, bad, tmp_path, caplog):
    port(TINY, tmp_path / "hf", to="hf")
    change(tmp_path / "hf", NORM, [1, bad])
    with pytest.raises(WeightsError, match="not finite") as caught:
        port(tmp_path / "hf", tmp_path / "out", to=to, strict=True)
    name = f"{tmp_path / 'hf' / 'model.safetensors'}: {NORM}"
    assert caught.value.where == name and "1" in caught.value.found
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]
    with caplog.at_level(logging.WARNING):
        port(tmp_path / "hf", tmp_path / "out", to=to)
    assert len([r for r in caplog.records if r.message.startswith(f"{name}: ")]) == 1


def test_strict_command(tmp_path, capsys):
    port(TINY, tmp_path / "hf", to="hf")
    arguments = [
        "port",
        str(tmp_path / "hf"),
        str(tmp_path / "out"),
        "--to",
        "torch",
        "--strict",
        "--overwrite",
    ]
    assert run(arguments) == 0
    change(tmp_path / "hf", NORM, [np.nan, np.nan])
    capsys.readouterr()
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and "norm.weight: a weight is not finite" in err and "2 NaN, 0 infinite" in err


# Shards


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("5GB", 5_000_000_000),
        ("500MB", 500_000_000),
        ("500 mb", 500_000_000),
        ("1.5kB", 1500),
        ("2GiB", 2 << 30),
        ("7", 7),
        ("7B", 7),
    ],
)
def test_sizes(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize(
    "text",
    ["", "0", "0GB", "-1", "-5GB", "GB", "5XB", "1e9", "nan", "inf", "0.5", "5 GB x", "9" * 5000, "٣GB"],
)
def test_bad_sizes_are_refused(text):
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert caught.value.where == "shard_size" and caught.value.found


def test_shard_size_of_the_command(tmp_path):
    assert run(["port", TINY, str(tmp_path / "out"), "--to", "hf", "--shard-size", "60kB"]) == 0
    sizes = {
        p.name: sum(t.nbytes for t in load_file(p).values()) for p in (tmp_path / "out").glob("*.safetensors")
    }
    assert len(sizes) > 3 and max(sizes.values()) <= 60_000
    with open_checkpoint(tmp_path / "out", check=True) as checkpoint:
        assert len(checkpoint.tensors) == 30
