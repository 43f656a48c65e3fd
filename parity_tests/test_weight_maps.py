"""Rows of the weight map, fused ones above all: cut and packed against plain numpy, bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from twinformers.checkpoints import Checkpoint, TensorInfo, convert, porting
from twinformers.errors import WeightsError
from twinformers.weight_maps.base import Bias, Linear, There, WeightMap

SIZES = {"D": 7, "N": 6, "K": 2, "G": 3, "H": 5}
NAMES = ("q_proj", "k_proj", "v_proj")


def table(weight_axes, bias_axes, heads=("N", "K", "K"), skip=()):
    """Queries, keys and values that the side "hf" stores in one matrix and one vector, in two layers."""
    rows = []
    for part, (name, letter) in enumerate(zip(NAMES, heads, strict=True)):
        weight: There = ("layer.{i}.qkv.weight", weight_axes, part)
        bias: There = ("layer.{i}.qkv.bias", bias_axes, part)
        # The twins know the groups of query heads where the file's layout needs them.
        axes = f"({letter.replace('N', 'K G') if 'G' in weight_axes else letter} H)"
        rows += [
            Linear(f"layers.{{i}}.{name}", f"{axes} D", hf=weight),
            Bias(f"layers.{{i}}.{name}", axes, hf=bias),
        ]
    rows = [row for n, row in enumerate(rows) if n not in skip]
    return WeightMap(rows=tuple(rows), sizes=SIZES, counts={"i": 2}, modules={})


def twin(heads=(6, 2, 2), dtype="float64"):
    """The three projections of two layers as the PyTorch twin holds them; every number is different."""
    result, start = {}, 0
    for layer in range(2):
        for name, n in zip(NAMES, heads, strict=True):
            for leaf, shape in (("weight", (n * 5, 7)), ("bias", (n * 5,))):
                count = int(np.prod(shape))
                numbers = np.arange(start, start + count).reshape(shape)
                result[f"layers.{layer}.{name}.{leaf}"] = (numbers / 8).astype(dtype)
                start += count
    return result


def below(q, k, v):
    """torch.nn.MultiheadAttention's way: one below the other."""
    return np.concatenate([q, k, v])


def beside(q, k, v):
    """GPT-2's way: [in, out], one beside the other; a vector is the same as below."""
    return np.concatenate([q, k, v]).T


def per_head(q, k, v):
    """GPT-NeoX's way: for each head its query, key and value."""
    return np.concatenate([x[5 * n : 5 * n + 5] for n in range(6) for x in (q, k, v)])


def per_group(q, k, v):
    """InternLM2's way: for each group its query heads, then its key and its value."""
    pieces = []
    for group in range(2):
        pieces += [
            q[15 * group : 15 * group + 15],
            k[5 * group : 5 * group + 5],
            v[5 * group : 5 * group + 5],
        ]
    return np.concatenate(pieces)


ALL = ("N", "N", "N")
LAYOUTS = {
    "below": (below, "([N H | K H | K H]) D", "([N H | K H | K H])", ("N", "K", "K"), (6, 2, 2)),
    "beside": (beside, "D ([N H | N H | N H])", "([N H | N H | N H])", ALL, (6, 6, 6)),
    "per-head": (per_head, "(N [1 | 1 | 1] H) D", "(N [1 | 1 | 1] H)", ALL, (6, 6, 6)),
    "per-group": (per_group, "(K [G | 1 | 1] H) D", "(K [G | 1 | 1] H)", ("N", "K", "K"), (6, 2, 2)),
}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_rows_match_plain_numpy_and_return_bit_identical(layout, dtype):
    fuse, weight_axes, bias_axes, letters, heads = LAYOUTS[layout]
    rows = table(weight_axes, bias_axes, letters)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    ours = twin(heads, kind)
    packed = {name: rows.produce(name, "hf", ours.__getitem__, "torch") for name in rows.tensors("hf")}
    assert sorted(packed) == sorted(f"layer.{i}.qkv.{leaf}" for i in range(2) for leaf in ("weight", "bias"))
    for layer in range(2):
        for leaf in ("weight", "bias"):
            expected = fuse(*(ours[f"layers.{layer}.{name}.{leaf}"] for name in NAMES))
            found = packed[f"layer.{layer}.qkv.{leaf}"]
            assert found.dtype == kind and np.array_equal(found, expected)
            assert rows.tensors("hf")[f"layer.{layer}.qkv.{leaf}"][0].shape("hf") == expected.shape
    back = {name: rows.produce(name, "torch", packed.__getitem__, "hf") for name in rows.tensors("torch")}
    assert back.keys() == ours.keys()
    for name, array in ours.items():
        assert back[name].dtype == kind and back[name].tobytes() == array.tobytes()
        # Into Flax without a stop at PyTorch: the kernel is the transposed matrix.
        flax = name.replace("weight", "kernel")
        assert np.array_equal(rows.produce(flax, "jax", packed.__getitem__, "hf"), array.T)


def test_a_fused_row_with_two_parts_exchanged_is_caught():
    fuse, _, bias_axes, letters, heads = LAYOUTS["per-head"]
    rows, ours = table("([N H | N H | N H]) D", bias_axes, letters), twin(heads)
    found = rows.produce("layer.0.qkv.weight", "hf", ours.__getitem__, "torch")
    expected = fuse(*(ours[f"layers.0.{name}.weight"] for name in NAMES))
    assert found.shape == expected.shape and not np.array_equal(found, expected)


def test_a_fused_tensor_whose_rows_leave_out_or_repeat_a_part_is_refused():
    with pytest.raises(WeightsError, match=r"qkv.weight.*not its parts") as error:
        table("([N H | K H | K H]) D", "([N H | K H | K H])", skip=(2,)).tensors("hf")
    assert error.value.expected == "parts [0, 1, 2]" and error.value.found == "[0, 2]"
    rows = WeightMap(
        rows=(Bias("a", "D", hf="same"), Bias("b", "D", hf="same")), sizes=SIZES, counts={}, modules={}
    )
    with pytest.raises(WeightsError, match="same"):
        rows.tensors("hf")


class Memory(Checkpoint):
    """A checkpoint in memory, counting what is read."""

    format = side = "hf"

    def __init__(self, side, arrays):
        super().__init__("memory", config=None)
        self.side, self.arrays, self.reads = side, arrays, []

    @property
    def tensors(self):
        return {n: TensorInfo(a.shape, a.dtype.name, "memory") for n, a in self.arrays.items()}

    def read(self, name):
        self.reads.append(name)
        return self.arrays[name]


@pytest.fixture
def rows(monkeypatch):
    rows = table("([N H | K H | K H]) D", "([N H | K H | K H])")
    monkeypatch.setattr(porting, "weight_map", lambda config: rows)
    return rows


def test_a_checkpoint_with_fused_tensors_converts_both_ways(rows):
    ours = Memory("torch", twin(dtype="float32"))
    packed = dict(convert(ours, "hf"))
    assert list(packed) == list(rows.tensors("hf")) and len(ours.reads) == len(set(ours.reads)) == 12
    back = dict(convert(Memory("hf", packed), "torch"))
    assert back.keys() == ours.arrays.keys()
    assert all(back[name].tobytes() == array.tobytes() for name, array in ours.arrays.items())


def test_parts_of_different_dtype_are_packed_in_one_that_holds_both(rows):
    arrays = twin(dtype="float32")
    names = [f"layers.0.{name}.weight" for name in NAMES]
    arrays[names[0]] = arrays[names[0]].astype("float16")
    arrays[names[1]] = arrays[names[1]].astype(ml_dtypes.bfloat16)
    arrays[names[2]] = arrays[names[2]].astype(ml_dtypes.bfloat16)
    packed = dict(convert(Memory("torch", arrays), "hf"))
    expected = np.concatenate([arrays[name].astype("float32") for name in names])
    assert packed["layer.0.qkv.weight"].dtype == "float32"
    assert np.array_equal(packed["layer.0.qkv.weight"], expected)
    half = dict(convert(Memory("torch", arrays), "hf", "float16"))["layer.0.qkv.weight"]
    assert half.dtype == "float16" and np.array_equal(half, expected.astype("float16"))


def test_headers_of_fused_tensors_are_checked(rows):
    packed = dict(convert(Memory("torch", twin()), "hf"))
    short = {**packed, "layer.1.qkv.weight": packed["layer.1.qkv.weight"][:-1]}
    with pytest.raises(WeightsError, match=r"layer.1.qkv.weight: wrong shape") as error:
        list(convert(Memory("hf", short), "torch"))
    assert error.value.expected == "[50, 7]" and error.value.found == "[49, 7]"
    with pytest.raises(WeightsError, match="missing") as error:
        list(convert(Memory("hf", {n: a for n, a in packed.items() if n != "layer.0.qkv.bias"}), "torch"))
    assert "layer.0.qkv.bias" in error.value.expected
