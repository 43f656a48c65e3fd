"""The launch scripts, with stubs in the place of the launchers: what each of them is asked to do."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from twinformers.cli import train_text
from twinformers.cli.app import run

LAUNCH = Path(__file__).parent.parent / "scripts" / "launch"
#: Writes its arguments, one JSON list a line; `scontrol` answers as SLURM does.
STUB = f"""#!{sys.executable}
import json, os, sys
name = os.path.basename(sys.argv[0])
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
if name == "scontrol":
    print("node7\\nnode9")
if name == "nvidia-smi":
    print("GPU 0\\nGPU 1\\nGPU 2\\nGPU 3")
"""
TRAIN = ["twinformers", "train", "text"]
SLURM = {"SLURM_NTASKS": "16", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "77"} | {
    "SLURM_JOB_NODELIST": "node[7,9]"
}


def launched(folder, script, *arguments, gpus=True, **environment):
    """The last command that a script ends in, as a list."""
    names = ["srun", "torchrun", "gcloud", "scontrol", *(["nvidia-smi"] if gpus else [])]
    for name in names:
        stub = folder / name
        stub.write_text(STUB)
        stub.chmod(0o755)
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    base = {"PATH": f"{folder}:/usr/bin:/bin", "CALLS": str(calls)}
    command = ["bash", str(LAUNCH / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=base | environment, timeout=60)
    if done.returncode:
        return done.stderr
    return json.loads(calls.read_text().splitlines()[-1])


def options(command):
    """The options of `twinformers train text` in a command, each of which it has to know."""
    start = next(n for n in range(len(command)) if command[n : n + 3] == TRAIN)
    given = command[start + 3 :]
    known = {o for p in text_command().params for o in p.opts}
    assert {word for word in given if word.startswith("--")} <= known, given
    return given


def text_command():
    command = typer.Typer()
    command.command()(train_text.train_text)
    return typer.main.get_command(command)


def test_the_scripts_are_whole():
    names = {p.name for p in LAUNCH.iterdir()}
    assert names == {"slurm-jax.sbatch", "slurm-torch.sbatch", "torchrun.sh", "tpu-pod.sh"}
    for path in LAUNCH.iterdir():
        assert os.access(path, os.X_OK)
        subprocess.run(["bash", "-n", str(path)], check=True, timeout=60)


def test_slurm_starts_a_process_of_jax_for_each_gpu(tmp_path):
    found = launched(tmp_path, "slurm-jax.sbatch", OUT="/nfs/my run", MORE="--batch-size 64", **SLURM)
    assert found[:2] == ["srun", "--kill-on-bad-exit=1"]
    expected = ["--out", "/nfs/my run", "--distributed", "--data", "texts", "--preset", "llama-10m"]
    assert options(found) == [*expected, "--framework", "jax", "--mesh", "fsdp=16", "--batch-size", "64"]
    found = launched(tmp_path, "slurm-jax.sbatch", RESUME="--resume", **SLURM)
    assert options(found) == ["--out", "run", "--distributed", "--resume"]


def test_slurm_starts_a_torchrun_on_each_node(tmp_path):
    found = launched(tmp_path, "slurm-torch.sbatch", **SLURM)
    at = found.index("torchrun")
    assert found[:at] == ["srun", "--kill-on-bad-exit=1"]
    rendezvous = ["--rdzv-id", "77", "--rdzv-backend", "c10d", "--rdzv-endpoint", "node7:29500"]
    sizes = ["--nnodes", "2", "--nproc-per-node", "8"]
    assert found[at + 1 : found.index("twinformers")] == [*sizes, *rendezvous, "--no-python"]
    assert options(found)[-4:] == ["--framework", "torch", "--mesh", "fsdp=16"]
    assert options(launched(tmp_path, "slurm-torch.sbatch", RESUME="--resume", **SLURM))[-1] == "--resume"


def test_torchrun_on_one_host(tmp_path):
    found = launched(tmp_path, "torchrun.sh", "--data", "my texts", "--preset", "llama-10m")
    assert found[:5] == ["torchrun", "--standalone", "--nproc-per-node", "4", "--no-python"]
    expected = ["--out", "run", "--framework", "torch", "--mesh", "fsdp=4"]
    assert options(found) == [*expected, "--data", "my texts", "--preset", "llama-10m"]
    found = launched(tmp_path, "torchrun.sh", "--resume", PROCESSES="2", OUT="other")
    assert found[3] == "2" and options(found) == ["--out", "other", "--resume"]


def test_torchrun_on_a_host_without_gpus(tmp_path):
    if os.path.exists("/usr/bin/nvidia-smi"):
        (tmp_path / "nvidia-smi").symlink_to("/bin/false")
    found = launched(tmp_path, "torchrun.sh", "--data", "texts", "--preset", "llama-10m", gpus=False)
    assert found[3] == "2" and options(found)[-6:-4] == ["--mesh", "fsdp=2"]


def test_every_worker_of_a_tpu_gets_the_command(tmp_path):
    settings = {"TPU": "twin", "ZONE": "us-central1-a", "OUT": "/mnt/my run", "DATA": "/mnt/texts"}
    found = launched(tmp_path, "tpu-pod.sh", **settings, MESH="fsdp=16", MORE="--steps 5")
    place = ["compute", "tpus", "tpu-vm", "ssh", "twin", "--zone", "us-central1-a", "--worker=all"]
    assert found[:-1] == ["gcloud", *place, "--command"]
    given = options(shlex.split(found[-1]))
    assert given[:5] == ["--out", "/mnt/my run", "--distributed", "--data", "/mnt/texts"]
    assert given[-4:] == ["--mesh", "fsdp=16", "--steps", "5"]
    assert "all workers see" in launched(tmp_path, "tpu-pod.sh", TPU="twin", ZONE="here")


def test_launchers_do_not_run_without_slurm(tmp_path):
    for script in ("slurm-jax.sbatch", "slurm-torch.sbatch"):
        assert "SLURM_" in launched(tmp_path, script)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--mesh", "foo=2"], "the mesh cannot be read"),
        (["--mesh", "data=x"], "data, fsdp, tensor, sequence, each at most once"),
        (["--mesh", "data=2,data=2"], "the mesh cannot be read"),
        (["--mesh", "data=0"], "the mesh cannot be read"),
        (["--mesh", ""], "the mesh cannot be read"),
        (["--mesh", "data=" + "9" * 5000], "the mesh cannot be read"),
        (["--mesh", "fsdp=3"], r"batch_size: the rows cannot be shared out evenly over the mesh"),
        (["--mesh", "data=2,fsdp=2", "--accumulate", "4"], "data x fsdp x accumulate = 16"),
        (["--mesh", "tensor=3"], "the mesh does not fit the devices"),
        (["--mesh", "tensor=1", "--framework", "torch"], "torchrun --nproc-per-node"),
        (["--distributed", "--framework", "torch"], "several processes need a mesh"),
        (["--distributed"], "this process cannot join the others"),
    ],
)
def test_a_bad_mesh_is_refused_with_code_2(tmp_path, capfd, monkeypatch, given, message):
    for name in ("WORLD_SIZE", "SLURM_JOB_ID", "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    out = tmp_path / "run"
    assert run(["train", "text", "--out", str(out), "--data", ".", "--preset", "llama-tiny", *given]) == 2
    said = capfd.readouterr()
    assert message in said.err and "Traceback" not in said.err and not out.exists()
