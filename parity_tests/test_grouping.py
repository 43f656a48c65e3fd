"""Pooling a checkpoint's key and value heads: against plain numpy, and as models of both frameworks."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from test_llama import LIMIT, difference, inputs

import twinformers
from twinformers.checkpoints import Checkpoint, TensorInfo, convert, grouped, grouping, open_checkpoint
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.cli.app import run
from twinformers.configs import preset
from twinformers.errors import UsageError, WeightsError
from twinformers.weight_maps import weight_map
from twinformers.weight_maps.base import Bias, Linear, WeightMap

MULTI = preset("llama-tiny").replace(num_key_value_heads=6)  # N = K = 6, H = 10, D = 48


class Memory(Checkpoint):
    """A checkpoint in memory, with the names and layouts of one side."""

    format = "memory"

    def __init__(self, config, side, arrays):
        super().__init__("memory", config)
        self.side, self.arrays = side, arrays

    @property
    def tensors(self):
        return {n: TensorInfo(a.shape, a.dtype.name, "memory") for n, a in self.arrays.items()}

    def read(self, name):
        return self.arrays[name]


def as_side(config, side, dtype="float32"):
    """The preset's random weights as another side stores them."""
    source, table = PresetCheckpoint("test", config), weight_map(config)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    arrays = {n: table.produce(n, side, source.read, "torch").astype(kind) for n in table.tensors(side)}
    return Memory(config, side, arrays)


def mean_of_neighbours(array, heads):
    """[6 * 10, ...] -> [heads * 10, ...]: plain loops, in float64, rounded once."""
    wide, pooled = array.astype(np.float64), []
    for head in range(heads):
        group = [wide[10 * old : 10 * old + 10] for old in range(6) if old // (6 // heads) == head]
        pooled.append(sum(group) / len(group))
    return np.concatenate(pooled).astype(array.dtype)


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("side", ["hf", "gguf", "meta", "torch", "jax"])
def test_pooled_weights_match_plain_numpy(side, dtype, heads):
    original = dict(convert(as_side(MULTI, "torch", dtype), "torch"))
    pooled = grouped(as_side(MULTI, side, dtype), heads)
    assert pooled.config == MULTI.replace(num_key_value_heads=heads)
    shapes = {name: info.shape for name, info in pooled.tensors.items()}
    assert shapes == {name: pooled.read(name).shape for name in pooled.tensors}
    found = dict(convert(pooled, "torch"))
    assert found.keys() == original.keys()
    for name, array in original.items():
        pool = "k_proj" in name or "v_proj" in name
        expected = mean_of_neighbours(array, heads) if pool else array
        assert found[name].dtype == array.dtype and found[name].shape == expected.shape
        # One sum in another order: half a unit in the last place of the stored dtype, if it falls on an edge.
        unit = float(ml_dtypes.finfo(array.dtype).eps) if pool else 0.0
        gap = np.abs(found[name].astype(np.float64) - expected.astype(np.float64))
        assert (gap <= unit * np.abs(expected.astype(np.float64))).all(), name
        assert np.count_nonzero(gap) <= array.size // 1000


@pytest.mark.parametrize("side", ["hf", "gguf", "jax"])
def test_as_many_heads_as_before_is_the_identity(side):
    before = as_side(MULTI, side)
    after = grouped(before, 6)
    assert after.config == MULTI
    for name, array in before.arrays.items():
        assert after.read(name).tobytes() == array.tobytes()


def logits(source, framework, tokens, positions, device):
    import jax
    import torch

    with jax.enable_x64(True), torch.inference_mode():
        model = twinformers.load(source, framework, "float64", device)
        put = jax.device_put if framework == "jax" else lambda x, d: torch.tensor(x, device=d)
        out, _ = model(put(tokens, device), put(positions, device))
        return out.cpu().numpy() if framework == "torch" else np.asarray(out)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_heads_equal_within_groups_give_the_same_outputs(framework, jax_device, torch_device, monkeypatch):
    source = as_side(MULTI, framework, "float64")
    # Not zero and not one pattern: heads 0 1 2 share one, heads 3 4 5 another.
    for name, array in source.arrays.items():
        if "k_proj" in name or "v_proj" in name:
            rows = array.T if framework == "jax" else array  # [K H, D]
            rows = rows.reshape(2, 3, 10, -1)[:, :1].repeat(3, axis=1).reshape(60, -1)
            source.arrays[name] = np.ascontiguousarray(rows.T if framework == "jax" else rows)
    device = {"jax": jax_device, "torch": torch_device}[framework]
    tokens, positions = inputs(MULTI)
    full = logits(source, framework, tokens, positions, device)
    found = logits(grouped(source, 2), framework, tokens, positions, device)
    assert difference(found, full, positions) <= LIMIT
    # Down to one head they are no longer equal, nor if heads far apart were pooled.
    assert (
        difference(logits(grouped(source, 1), framework, tokens, positions, device), full, positions) > 1e-3
    )
    monkeypatch.setattr(grouping, "NEIGHBOURS", "pooled K")
    assert (
        difference(logits(grouped(source, 2), framework, tokens, positions, device), full, positions) > 1e-3
    )


def test_a_fused_tensor_that_stores_queries_by_group_pools_keys_and_values_only(monkeypatch):
    def table(config):
        K = config.num_key_value_heads
        rows = []
        for part, (name, axes) in enumerate((("q", "(K G H)"), ("k", "(K H)"), ("v", "(K H)"))):
            rows.append(Linear(name, f"{axes} D", hf=("qkv.weight", "(K [G | 1 | 1] H) D", part)))
            rows.append(Bias(name, axes, hf=("qkv.bias", "(K [G | 1 | 1] H)", part)))
        return WeightMap(tuple(rows), {"K": K, "G": 6 // K, "H": 10, "D": 48}, {}, {})

    monkeypatch.setattr(grouping, "weight_map", table)
    rng = np.random.default_rng(0)
    ours = {
        f"{n}.{leaf}": rng.standard_normal(s)
        for n in "qkv"
        for leaf, s in (("weight", (60, 48)), ("bias", 60))
    }
    before, after = table(MULTI), table(MULTI.replace(num_key_value_heads=2))
    arrays = {name: before.produce(name, "hf", ours.__getitem__, "torch") for name in before.tensors("hf")}
    pooled = grouped(Memory(MULTI, "hf", arrays), 2)
    assert pooled.tensors["qkv.weight"].shape == (60 + 20 + 20, 48)
    for name, array in ours.items():
        expected = array if name.startswith("q") else mean_of_neighbours(array, 2)
        found = after.produce(name, "torch", pooled.read, "hf")
        assert np.abs(found - expected).max() <= 1e-15


@pytest.mark.parametrize("heads", [0, -2, 4, 5, 12])
def test_a_number_that_divides_nothing_is_refused(heads):
    with pytest.raises(UsageError, match="kv_heads") as error:
        grouped(PresetCheckpoint("test", MULTI), heads)
    assert error.value.expected == "a divisor of num_key_value_heads = 6" and error.value.found == str(heads)


def test_what_has_no_grouped_form_or_wrong_tensors_is_refused(monkeypatch):
    with pytest.raises(UsageError, match="no grouped-query form") as error:
        grouped(PresetCheckpoint("test", preset("transformer-tiny")), 1)
    assert error.value.found == "transformer"
    source = as_side(MULTI, "hf")
    name = "model.layers.1.self_attn.k_proj.weight"
    source.arrays[name] = source.arrays[name][:-10]
    with pytest.raises(WeightsError, match=name):
        grouped(source, 2)


def test_port_with_kv_heads_writes_a_checkpoint_that_transformers_loads(tmp_path, capsys):
    import torch
    import transformers

    twinformers.port(PresetCheckpoint("test", MULTI), tmp_path / "full", to="torch")
    arguments = ["port", str(tmp_path / "full"), str(tmp_path / "hf"), "--to", "hf"]
    assert run([*arguments, "--kv-heads", "4"]) == 2
    assert "divisor of num_key_value_heads = 6" in capsys.readouterr().err and not (tmp_path / "hf").exists()
    assert run([*arguments, "--kv-heads", "2", "--json"]) == 0
    table = weight_map(MULTI.replace(num_key_value_heads=2))
    assert json.loads(capsys.readouterr().out)["parameters"] == table.parameters
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_key_value_heads"] == 2
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens, positions = (x[:1] for x in inputs(MULTI))
    with torch.inference_mode():
        right = theirs(torch.tensor(tokens).long()).logits.double().numpy()
    with open_checkpoint(tmp_path / "full") as full:
        left = logits(grouped(full, 2), "torch", tokens, positions, "cpu")
    assert difference(left, right, positions) <= 1e-5  # transformers computes in float32
