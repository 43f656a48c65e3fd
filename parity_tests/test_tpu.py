"""The TPU compiler's answers: what fits and what does not, FLOPs, loops, collectives, and refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from twinformers.cli.app import run
from twinformers.configs import preset
from twinformers.errors import MissingDependency, UsageError
from twinformers.sharding.mesh import mesh_sizes
from twinformers.tpu import environment
from twinformers.tpu.generations import GENERATIONS, find_slice
from twinformers.tpu.hlo import read
from twinformers.tpu.planning import device_mesh, plan
from twinformers.tpu.searching import choices, search

if sys.platform != "linux":
    pytest.skip("libtpu is there for Linux alone", allow_module_level=True)

#: Small enough to be compiled in seconds.
SMALL = preset("llama-tiny").replace(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=64,
    num_hidden_layers=4,
)
SHAPES = {"v4": "2x2x1", "v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "tpu7x": "2x2x1"}


def asked(config=SMALL, topology="v5e:2x2", **options):
    given = {"mode": "train", "batch": 8, "sequence": 256, **options}
    return plan(config, topology, **given)


def test_a_training_step_is_counted_as_the_mathematics_has_it():
    p = asked(attention="einsum")
    assert p.fits and p.devices == p.chips == 4 and p.mesh == {"data": 1, "fsdp": 4, "tensor": 1}
    # The einsum multiplies all pairs of positions, of which causal attention needs half.
    assert p.flops_ratio == pytest.approx(1.0, abs=0.1)
    assert p.memory["optimizer"] == pytest.approx(2 * p.memory["parameters"], rel=0.01)
    assert p.memory["total"] >= p.memory["parameters"] + p.memory["optimizer"] + p.memory["temporaries"]
    assert p.collectives["all-gather"]["count"] >= 4 and p.collectives["all-gather"]["bytes"] > 0
    assert 0 < p.roofline_seconds < p.step_seconds and 0 < p.mfu < 1
    assert p.tokens_per_second_per_chip == pytest.approx(8 * 256 / p.step_seconds / 4)


def test_depth_is_counted_and_not_compiled():
    """Of a prompt's pass, by the kernel, whose operations the compiler does not know of."""
    shallow, deep = (asked(SMALL.replace(num_hidden_layers=n), mode="prefill") for n in (2, 8))
    assert deep.flops - shallow.flops == pytest.approx(deep.flops_needed - shallow.flops_needed, rel=0.15)
    assert deep.attention_counted is False and deep.flops_ratio < 1.05
    assert deep.step_seconds > 2 * shallow.step_seconds
    for kind, told in shallow.collectives.items():
        assert deep.collectives[kind]["count"] >= told["count"] > 0
    assert deep.collectives["all-reduce"]["count"] > 2 * shallow.collectives["all-reduce"]["count"]
    assert deep.memory["code"] < 1.5 * shallow.memory["code"]


def test_what_does_not_fit_is_an_answer_with_numbers():
    long = SMALL.replace(max_position_embeddings=2**21)
    p = asked(long, topology="v5e:1x1", mode="decode", batch=64, sequence=2**20, quick=True)
    assert not p.fits and p.step_seconds is None
    assert p.memory["total"] > p.memory_limit and "GiB" in p.reason
    assert p.memory["cache"] == pytest.approx(2 * 4 * 64 * 2**20 * 4 * 64 * 2, rel=0.01)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_compiles_decoding(generation):
    p = asked(topology=f"{generation}:{SHAPES[generation]}", mode="decode", quick=True)
    assert p.fits and p.memory["cache"] > 0 and p.step_seconds >= p.roofline_seconds
    heads = SMALL.num_key_value_heads
    assert p.mesh["tensor"] == min(heads, p.devices)
    whole = 2 * 4 * 8 * 257 * heads * SMALL.head_dim * 2
    assert p.memory["cache"] == pytest.approx(whole / p.devices, rel=0.01)


@pytest.mark.parametrize("name", ["transformer-tiny", "bert-tiny"])
def test_every_architecture_compiles(name):
    p = asked(preset(name), mode="prefill", attention="einsum", sequence=256)
    assert p.fits and p.flops is None


def test_tokens_of_a_row_may_be_shared_out():
    """Half of each device's tokens are another's: a block's kept input is half as large, weights are not."""
    few = {"batch": 2, "quick": True}
    whole = asked(mesh={"fsdp": 2, "data": 1, "tensor": 2}, **few)
    shared = asked(mesh={"fsdp": 2, "data": 1, "tensor": 1, "sequence": 2}, **few)
    assert whole.fits and shared.fits and shared.mesh["sequence"] == 2
    assert shared.memory["activations"] == whole.memory["activations"] / 2
    assert shared.memory["parameters"] == pytest.approx(whole.memory["parameters"], rel=0.05)
    assert shared.collectives["all-to-all"]["count"] > 0  # heads and tokens change places
    with pytest.raises(UsageError, match="chunk"):
        asked(mesh={"fsdp": 2, "sequence": 2}, chunk=128, **few)


def test_axes_of_a_mesh_may_share_a_side_of_the_machine():
    """Neither 8 is a product of whole sides of 4 x 4 x 4."""
    mesh = device_mesh(find_slice("v5p:4x4x4"), {"data": 1, "fsdp": 8, "tensor": 8})
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 8}
    assert len({d.id for d in mesh.devices.flat}) == 64


def test_a_search_recommends_what_fits_and_is_fastest():
    found = search(SMALL, "v5e:2x2", mode="decode", batch=8, sequence=256, tries=2)
    assert len(found.tried) == 2 and found.best is found.tried[0] and found.best.fits
    assert found.best.step_seconds == min(p.step_seconds for p in found.tried if p.fits)
    assert found.candidates == 3 == len(list(choices(SMALL, "decode", 8, 4)))
    meshes = [sizes for sizes, _ in choices(SMALL, "train", 8, 4)]
    assert len(meshes) == 6 * 3 and all(8 % (m["data"] * m["fsdp"]) == 0 for m in meshes)
    assert found.to_dict()["recommended"]["mesh"] == found.best.mesh
    with pytest.raises(UsageError, match="no mesh suits"):
        search(SMALL, "v5e:4x4", mode="train", batch=1, sequence=512)


HLO = """HloModule m

%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %g = bf16[32,128]{1,0} all-gather(%x), replica_groups=[1,4]<=[4], dimensions={0}
  %o = bf16[8,128]{1,0} custom-call(%x), custom_call_target="k", frontend_attributes={kernel={
"a": 1
}}, metadata={op_name="jit(step)"}, backend_config={"estimated_cycles":"9223372036854775807"}
  %f = bf16[8,128]{1,0} fusion(%g), kind=kOutput, calls=%fused, backend_config={"estimated_cycles":"100"}
  ROOT %t = (s32[], bf16[8,128]{1,0}) tuple(%i, %f)
}

%fused (q: bf16[32,128]) -> bf16[8,128] {
  ROOT %s = bf16[8,128]{1,0} slice(%q), backend_config={"estimated_cycles":"7"}
}

%offloaded (r: bf16[8,128]) -> bf16[8,128] {
  ROOT %e = bf16[8,128]{1,0} all-to-all(%r), replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

%condition (p: (s32[], bf16[8,128])) -> pred[] {
  %n = s32[]{:T(128)} constant(12)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: bf16[8,128]) -> bf16[2,128] {
  %w = (s32[], bf16[8,128]{1,0}) while(%z), condition=%condition, body=%body
  %k = bf16[8,128]{1,0:T(8)S(1)} custom-call(%a), custom_call_target="x", called_computations={%offloaded}
  %r = bf16[2,128]{1,0} reduce-scatter(%y), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %o = f32[4]{0} all-reduce-start(%r), replica_groups={{0,1,2,3}}, to_apply=%add
}
"""


def test_loops_are_counted_as_often_as_they_run():
    program = read(HLO)
    assert program.count == {"all-gather": 12, "reduce-scatter": 1, "all-reduce": 1, "all-to-all": 1}
    assert program.bytes == {
        "all-gather": 12 * 32 * 128 * 2,
        "reduce-scatter": 4 * 2 * 128 * 2,
        "all-reduce": 16,
        "all-to-all": 8 * 128 * 2,
    }
    assert program.cycles == 12 * 100  # a fusion's cycles are those of what it holds
    once = read(HLO.replace("constant(12)", "constant(1)"))
    assert once.cycles == 100 and once.count["all-gather"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topology": "v9:2x2"}, "unknown topology"),
        ({"topology": "v5e:3x5"}, "does not know this topology"),
        ({"mesh": {"fsdp": 3}}, "does not fit the slice"),
        ({"mesh": {"pipeline": 4}}, "unknown axis"),
        ({"batch": 3, "mesh": {"fsdp": 4}}, "batch cannot be shared out"),
        ({"mode": "serve"}, "unknown mode"),
        ({"batch": 0}, "bad value"),
        ({"attention": "flash"}, "unknown attention"),
        ({"remat": "some"}, "unknown value"),
        ({"sequence": 10**7}, "so many positions"),
        ({"config": preset("transformer-tiny")}, "only a language model"),
    ],
)
def test_what_cannot_be_asked_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        asked(**options)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(MissingDependency, match="libtpu") as error:
        find_slice("v5e:2x2")
    assert "twinformers[tpu]" in str(error.value)


def test_the_command_line(capsys):
    assert mesh_sizes("data=1, fsdp=64") == {"data": 1, "fsdp": 64, "tensor": 1}
    assert mesh_sizes("fsdp=4,sequence=1") == {"data": 1, "fsdp": 4, "tensor": 1}
    assert mesh_sizes("sequence=2") == {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 2}
    command = ["tpu", "preset:llama-tiny", "--topology", "v5e:2x2", "--batch", "4", "--sequence", "128"]
    command += ["--mode", "decode"]
    assert run([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"] and answer["model"] == "llama-tiny" and answer["flops"] > 0
    assert run(command) == 0 and "fits" in capsys.readouterr().out
    assert run([*command, "--mesh", "fsdp:4"]) == 2 and "the mesh cannot be read" in capsys.readouterr().err
    large = ["tpu", "preset:llama2-7b", "--topology", "v5e:1x1", "--batch", "64", "--mode", "decode"]
    assert run([*large, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert not answer["fits"] and "GiB" in answer["reason"]


@pytest.mark.parametrize("chip", [None, "accel0", "vfio/0", "vfio/vfio"])
@pytest.mark.parametrize("installed", [True, False])
def test_libtpu_is_told_only_where_it_is_and_no_chip_is(chip, installed, tmp_path, monkeypatch):
    for name in environment.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: installed or None)
    if chip:
        (tmp_path / chip).parent.mkdir(exist_ok=True)
        (tmp_path / chip).touch()
    environment.spare_the_search(tmp_path)
    # /dev/vfio/vfio is there on any machine that can hand devices on.
    told = installed and chip in (None, "vfio/vfio")
    assert os.environ.get("TPU_SKIP_MDS_QUERY") == ("1" if told else None)
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "mine"


def test_jax_is_silent_where_no_chip_is():
    """As a stranger's first program would be: whoever imports the package, not the command line alone."""
    clean = {n: v for n, v in os.environ.items() if n not in environment.ENVIRONMENT}
    code = "import twinformers, jax; print(jax.devices()[0].platform)"
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip()
