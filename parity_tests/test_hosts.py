"""Two processes of four devices each: the results of one device, and no more in memory than their share."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_sharding import EVEN, LIMIT

import twinformers
from twinformers.checkpoints import manifest, opened, port
from twinformers.checkpoints.base import ASSETS
from twinformers.checkpoints.folders import INDEX
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.configs import preset

#: Large enough for its share to be seen in a process's memory.
BIG = preset("llama-tiny").replace(
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=4096,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=64,
    num_hidden_layers=6,
)


def both(folder, what, x64=True):
    """The answers of two processes that know each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": str(int(x64)),
        "XLA_FLAGS": flags,
    }
    command = [sys.executable, str(Path(__file__).with_name("hosts_run.py"))]
    processes = [
        subprocess.Popen(
            [*command, json.dumps([index, number, str(folder), what])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    try:
        outputs = [p.communicate(timeout=300) for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], "\n".join(error[-2000:] for _, error in outputs)
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def bits(folder):
    """Every tensor of a folder by its name, by the library that made the format: dtype, shape and bytes."""
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, x in load_file(file).items():
            assert name not in found
            found[name] = (x.dtype, x.shape, x.tobytes())
    return found


def same_folder(left, right, assets=True):
    """The same tensors to the last bit, and the same files beside them."""
    assert bits(left) == bits(right)
    for file in {p.name for f in (left, right) for p in f.glob("*.json")} - {
        INDEX,
        *(() if assets else ASSETS),
    }:
        assert (left / file).read_bytes() == (right / file).read_bytes(), file


@pytest.mark.parametrize("to", ["hf", "torch", "jax"])
def test_two_processes_match_one_device(to, tmp_path):
    port(PresetCheckpoint("test", preset("llama-tiny").replace(**EVEN)), tmp_path / "model", to=to)
    first, second = both(tmp_path / "model", "compare")
    for found in (first, second):
        assert found["logits"] <= LIMIT and found["update"] <= 1e-10
        assert "UsageError: embed.embedding: the processes do not hold one model" in found["alone"]
        assert "DestinationError" in found["exists"] and "the destination exists" in found["exists"]
        assert "DestinationError" in found["full"] and "No space left on device" in found["full"]
        assert "UsageError: to: unknown format" in found["bad"]
    assert first["sums"] == second["sums"] == manifest.check(tmp_path / "saved")
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["flax", "model", "saved", "scanned"]  # of what failed, nothing
    port(tmp_path / "model", tmp_path / "wide", to="hf", dtype="float64")
    port(tmp_path / "model", tmp_path / "torch", to="torch")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 3
    same_folder(tmp_path / "saved", tmp_path / "wide")
    manifest.check(tmp_path / "flax")
    port(tmp_path / "flax", tmp_path / "from flax", to="hf")
    same_folder(tmp_path / "from flax", tmp_path / "wide")
    same_folder(tmp_path / "scanned", tmp_path / "torch", assets=False)


@pytest.mark.parametrize(
    ("sizes", "to"),
    [
        ({"fsdp": 8}, "hf"),
        ({"tensor": 8}, "hf"),
        ({"data": 2, "fsdp": 2, "tensor": 2}, "hf"),
        ({"fsdp": 8}, "jax"),
        ({"tensor": 8}, "jax"),
    ],
)
def test_loading_takes_the_memory_of_a_share(sizes, to, tmp_path):
    """Rows, columns and both: what a process has in memory at the most is what it keeps, and a piece."""
    port(PresetCheckpoint("test", BIG), tmp_path / "model", to=to)
    copies = sizes.get("data", 1)
    for found in both(tmp_path / "model", sizes, x64=False):
        # On this mesh the rows of "data" are the processes: each of them has all of the weights.
        assert found["held"] == pytest.approx(found["all"] / (1 if copies > 1 else 2), rel=0.01)
        assert found["all"] > 350e6, "too small to be seen"
        print(sizes, found)
        share = 4 * BIG.vocab_size * BIG.hidden_size / (1 if copies > 1 else 2)  # of the largest tensor
        assert found["peak"] <= found["held"] + share + 35e6
        assert found["saving"] <= found["held"] + 170e6  # a tensor, the buffers of a file, what JAX compiles
    if to == "hf":
        same_folder(tmp_path / "saved", tmp_path / "model", assets=False)


def test_a_part_of_a_tensor_is_the_part_of_the_whole(tmp_path):
    """Also of an Orbax folder as Orbax itself saves it: in one database, compressed, in chunks."""
    from orbax.checkpoint import v1

    from twinformers.checkpoints import convert

    config = preset("llama-tiny")
    for to in ("hf", "jax"):
        port(PresetCheckpoint("test", config), tmp_path / to, to=to)
    shutil.copytree(tmp_path / "jax", tmp_path / "orbax")
    shutil.rmtree(tmp_path / "orbax" / "params")
    context = v1.Context()
    context.array.saving.storage_options.chunk_byte_size = 1000
    with opened(tmp_path / "jax") as checkpoint, context:
        v1.save(tmp_path / "orbax" / "params", dict(convert(checkpoint, "jax", "float32")))
    for to in ("hf", "jax", "orbax"):
        with opened(tmp_path / to) as checkpoint:
            for name, info in checkpoint.tensors.items():
                whole = np.array(checkpoint.read(name))
                cuts = [
                    tuple(slice(None) for _ in info.shape),
                    tuple(slice(n // 3, n - 1) for n in info.shape),
                    (slice(1, 2), *(slice(None) for _ in info.shape[1:])),
                    (*(slice(None) for _ in info.shape[1:]), slice(0, 3)),
                    tuple(slice(2, 2) for _ in info.shape),
                ]
                if to == "orbax" and name == "embed.embedding":
                    assert math.prod(checkpoint._array(name).chunk_layout.read_chunk.shape) < info.size
                for cut in cuts:
                    assert np.array_equal(checkpoint.read_part(name, cut), whole[cut]), (name, cut)


@pytest.mark.parametrize("source", ["preset:llama-tiny", "preset:transformer-tiny"])
def test_every_parameter_is_loaded_as_load_does(source):
    import jax
    from flax import nnx

    from twinformers.sharding.jax_side import make_mesh
    from twinformers.sharding.loading import load_sharded

    mesh = make_mesh(devices=jax.devices()[:1])
    models = twinformers.load(source, "jax"), load_sharded(source, mesh)
    left, right = (jax.tree.leaves(nnx.split(m)[1]) for m in models)
    assert len(left) == len(right) and all((a == b).all() for a, b in zip(left, right, strict=True))
