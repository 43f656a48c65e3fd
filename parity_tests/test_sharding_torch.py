"""A PyTorch twin on a mesh equals itself on its own: two and four processes that talk through gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sharded_torch_run import SAVED
from test_hosts import BIG, same_folder

from twinformers.checkpoints import manifest, port
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.errors import UsageError

#: Data, fsdp, tensor; by the number of processes, since starting them takes the most time.
MESHES = {2: [(1, 2, 1), (1, 1, 2)], 4: [(2, 2, 1), (1, 2, 2)]}
#: Where both axes cut: what would take too long on each mesh.
MORE = (1, 2, 2)

LIMITS = {
    **dict.fromkeys(("forward", "cache", "odd forward", "odd cache", "gpt2 forward", "gpt2 cache"), 1e-12),
    **dict.fromkeys(("translate", "translate cached", "encode"), 1e-12),
    "order": 0,
    "whole blocks": 1,
    "loaded": 0,
    **dict.fromkeys(("update", "pieces", "odd update", "gpt2 update"), 1e-10),
    **dict.fromkeys(("translate gradients", "encode gradients"), 1e-10),
}
#: Sums in another order: float32 in a few units of its last place, bfloat16 within half of one for a loss.
NARROW = {"float32 forward": 1e-5, "float32 cache": 1e-5, "float32 update": 1e-4, "mixed": 2**-8}
ALSO = {"generated": 0, "dropout": 1e-12}

REFUSED = {
    "mesh": "does not fit",
    "negative": "does not fit",
    "batch": "cannot be shared out",
    "again": "one on a mesh",
    "quantized": "one with other parameters",
    "compiled": "compiled: the step cannot do this on a mesh",
    "dtype": "give compute_dtype to `shard`",
    "compute_dtype": "compute_dtype: unknown value",
    "alone": "UsageError: Llama: the model is on no mesh",
    "exists": "the destination exists",
    "full": "No space left on device",
}


def run(count, folder):
    """What the worst of so many processes found on each of their meshes, launched as documented."""
    script = Path(__file__).with_name("sharded_torch_run.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    done = subprocess.run(
        [*launch, str(script), json.dumps([(sizes, sizes == MORE) for sizes in MESHES[count]]), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return dict(zip(MESHES[count], json.loads((folder / "results.json").read_text()), strict=True))


def plain(folder):
    """The folder, or what becomes of an Orbax folder that is ported."""
    if folder.name != "flax":
        return folder
    other = folder.parent.parent / f"{folder.parent.name} {folder.name} ported"
    if not other.exists():
        port(folder, other, to="hf")
    return other


@pytest.mark.parametrize("count", MESHES)
def test_on_a_mesh_matches_on_its_own(count, tmp_path):
    if count == 2:
        port(PresetCheckpoint("test", BIG), tmp_path / "big", to="hf")
    results = run(count, tmp_path)
    for name, (config, to, dtype, _) in SAVED.items():
        port(PresetCheckpoint("test", config), tmp_path / name, to=to, dtype=dtype)
    for sizes, found in results.items():
        print(sizes, found)
        folder = tmp_path / "x".join(map(str, sizes))
        assert sorted(p.name for p in folder.iterdir()) == sorted(SAVED)  # nothing is left of what failed
        for name in SAVED:
            manifest.check(folder / name)
            same_folder(plain(folder / name), plain(tmp_path / name))
        if count == 2:
            assert 190e6 < found["held"] < 230e6 and found["peak"] <= found["held"] + 60e6
            assert found["saving"] <= found["held"] + 140e6  # a tensor, and the buffers of a file
            same_folder(tmp_path / "big again", tmp_path / "big", assets=False)
        limits = LIMITS | (NARROW | ALSO if sizes == MORE else {})
        assert {name: found[name] for name, most in limits.items() if not found[name] <= most} == {}, sizes
        # What "tensor" does not cut are the norms' scales, which are next to nothing.
        assert found["share"] == pytest.approx(1 / (sizes[1] * sizes[2]), rel=0.05)
        assert found["share after"] == found["share"]  # nothing stays gathered
        assert -found["planted"] > 1e-6, "a weight that differs was not seen"
        # Two a block, there and back (Shoeybi et al. 2019, section 3), and one at either end.
        sums = 2 * 3 + 1 if sizes[2] > 1 else 0
        assert (found["sums forward"], found["sums backward"]) == (sums, sums)
        if sizes == MORE:
            planted = {name: -x for name, x in found.items() if name.startswith("mistake")}
            assert len(planted) == 8 and min(planted.values()) > 1e-6, planted
            for name, message in REFUSED.items():
                assert message in found["refused"][name], name


def test_a_mesh_without_processes_is_refused(monkeypatch):
    from twinformers.sharding.torch_side import make_mesh

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UsageError, match="no processes have been launched") as error:
        make_mesh(fsdp=2)
    assert "torchrun" in str(error.value)
    with pytest.raises(UsageError, match="not the tokens of a row"):
        make_mesh(fsdp=2, sequence=2)
