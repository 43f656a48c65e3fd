"""Sharded equals unsharded: forward, backward, an update and cached decoding on eight simulated devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from twinformers.configs import preset
from twinformers.errors import UsageError
from twinformers.sharding import AXES, RULES, axes
from twinformers.weight_maps import weight_map

LIMIT = 1e-12
#: Data, fsdp, tensor.
MESHES = [(1, 8, 1), (1, 1, 8), (2, 2, 2)]
#: With tokens of a row on two devices, and on four.
SHARED = [(1, 2, 2, 2), (1, 2, 1, 4)]

#: Everything divides by eight, so that every rule cuts.
EVEN = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 8,
}


def sharded(sizes, changes, plant=False):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1", "XLA_FLAGS": flags}
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("sharded_run.py")),
            json.dumps([sizes, changes, plant]),
        ],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("sizes", MESHES, ids=lambda s: "x".join(map(str, s)))
def test_sharded_matches_one_device(sizes):
    found = sharded(sizes, EVEN)
    assert max(found["forward"], found["cache"]) <= LIMIT
    assert found["update"] <= 1e-10  # the limit of an update, as everywhere
    _, fsdp, tensor = sizes
    # What is not cut are the norms' scales, which are next to nothing.
    assert found["share"] == pytest.approx(1 / (fsdp * tensor), rel=0.05)
    assert found["share after"] == found["share"] and not found["moved"]  # an update moves nothing


@pytest.mark.parametrize("sizes", SHARED, ids=lambda s: "x".join(map(str, s)))
def test_tokens_of_a_row_on_several_devices_match_one(sizes):
    """Rows of 14 tokens are cut in two and stay whole for four; weights and moments are cut for all."""
    found = sharded(sizes, EVEN)
    assert max(found["forward"], found["cache"]) <= LIMIT and found["update"] <= 1e-10
    assert found["share"] == pytest.approx(1 / 8, rel=0.05)
    assert found["share after"] == found["share"] and not found["moved"]
    assert found["tokens"] == {2: 8 * 14 / 2 / 2, 4: 8 * 14 / 2}[sizes[3]]


@pytest.mark.parametrize("sizes", [(2, 1, 2, 2), (1, 2, 1, 4)], ids=lambda s: "x".join(map(str, s)))
def test_the_kernel_on_a_mesh_that_shares_out_tokens_matches_the_einsum(sizes):
    found = sharded(sizes, {**EVEN, "splash": True})
    assert found["forward"] <= 2e-5  # float32


def test_sizes_that_do_not_divide_stay_whole():
    found = sharded((2, 2, 2), {"tie_word_embeddings": True})
    assert max(found["forward"], found["cache"]) <= LIMIT and found["update"] <= 1e-10


@pytest.mark.parametrize("name", ["gpt2-tiny", "mistral-tiny"])
def test_other_decoders_match_one_device(name):
    """GPT-2 with dropout, biases and a table of positions; Mistral whose window is shorter than the rows."""
    own = {"gpt2-tiny": {"num_attention_heads": 8}, "mistral-tiny": EVEN}[name]
    found = sharded((2, 2, 2), {"preset": name, **{k: EVEN[k] for k in list(EVEN)[:3]}, **own})
    assert max(found["forward"], found["cache"]) <= LIMIT and found["update"] <= 1e-10
    assert found["share"] < 0.3 and not found["moved"]


def test_an_encoder_decoder_matches_one_device():
    even = {"d_model": 64, "encoder_attention_heads": 8, "decoder_attention_heads": 8}
    tables = {"source_vocab_size": 256, "target_vocab_size": 256}
    found = sharded((2, 2, 2), {"preset": "transformer-tiny", **even, **tables})
    assert max(found["forward"], found["cache"]) <= LIMIT and found["gradients"] <= 1e-10
    assert found["share"] < 0.3


def test_an_encoder_matches_one_device():
    even = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}
    found = sharded((2, 2, 2), {"preset": "bert-tiny", **even})
    assert found["forward"] <= LIMIT and found["gradients"] <= 1e-10
    assert found["share"] < 0.3


def test_a_weight_that_differs_is_seen():
    found = sharded((2, 2, 2), EVEN, plant=True)
    assert min(found["forward"], found["cache"]) > 1e-6


@pytest.mark.parametrize(
    "name",
    ["llama-tiny", "gpt2-xl", "mistral-tiny", "transformer-tiny", "bert-tiny", "llama3.2-1b", "llama2-70b"],
)
def test_every_parameter_has_a_rule(name):
    leaves = weight_map(preset(name)).leaves("jax")
    sizes = dict.fromkeys(AXES, 2)
    cut = {n: axes(n, leaf.shape("jax"), sizes) for n, leaf in leaves.items() if leaf.trains}
    assert all(len(c) == len(leaves[n].shape("jax")) for n, c in cut.items())
    if name.startswith("llama3") or name.startswith("llama2"):
        assert all(set(c) == {"fsdp", "tensor"} for c in cut.values() if len(c) == 2)


def test_what_no_rule_covers_is_refused():
    sizes = dict.fromkeys(AXES, 2)
    with pytest.raises(UsageError, match="no rule") as error:
        axes("layers.0.attn.r_proj.kernel", (4, 4), sizes)
    assert "layers.0.attn.r_proj.kernel" in str(error.value)
    with pytest.raises(UsageError, match="another number of axes"):
        axes("layers.0.attn.q_proj.kernel", (4, 4, 4), sizes)
    assert axes("layers.0.attn.q_proj.kernel", (4, 5), sizes) == ("fsdp", None)
    assert len(RULES) == len({pattern for pattern, _ in RULES})


def test_a_mesh_and_a_batch_that_do_not_fit_are_refused():
    import jax
    import numpy as np

    from twinformers.sharding.jax_side import make_mesh, shard_batch

    with pytest.raises(UsageError, match="does not fit"):
        make_mesh(data=3, devices=jax.devices()[:1])
    with pytest.raises(UsageError, match="does not fit"):
        make_mesh(data=-1, fsdp=-1, devices=jax.devices()[:1])
    mesh = make_mesh(devices=jax.devices()[:1])
    assert shard_batch(np.zeros((3, 2)), mesh).shape == (3, 2)
