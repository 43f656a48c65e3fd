"""Training on a mesh: one device's numbers, resumed bit for bit, refused where it must be."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from test_train_text import arrays, exact, same

from twinformers.configs import preset
from twinformers.training.text.checkpoints import Checkpoints
from twinformers.training.text.run import train_text

SCRIPT = Path(__file__).with_name("mesh_train_run.py")
#: Losses and weights of six updates in float64, whose sums are taken in another order.
LIMIT = 1e-10
#: The mesh, and another one on which the same run goes on.
MESHES = {
    "jax": ("tensor=2,fsdp=2,data=2", "fsdp=8"),
    "torch": ("fsdp=2", "tensor=2"),
    "jax hosts": ("fsdp=2,tensor=2", "fsdp=4"),
}
pytestmark = pytest.mark.usefixtures("own_logging")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Settings of a run of a second or two, of a model in which every rule cuts."""
    folder = tmp_path_factory.mktemp("texts")
    for n, name in enumerate(sorted(topics)[:6]):
        (folder / f"{n}.txt").write_text(topics[name], encoding="utf-8")
    even = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = preset("llama-tiny").replace(num_hidden_layers=1, head_dim=8, vocab_size=304, **even)
    file = folder / "config.json"
    file.write_text(json.dumps(config.to_hf()))
    return {
        "data": [str(folder)],
        "config": str(file),
        "dtype": "float64",
        "steps": 6,
        "batch_size": 8,
        "sequence": 24,
        "warmup": 2,
        "clip": 0.5,
        "eval_every": 2,
        "eval_share": 0.1,
        "eval_batches": 2,
        "save_every": 2,
    }


def launch(folder, jobs, *commands, processes=1, **environment):
    """What each process says of each job, and what they logged."""
    results, log = folder / "results", folder / "log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", **environment}
    with open(log, "wb") as file:
        started = [
            subprocess.Popen(
                [*command, str(SCRIPT), str(results), json.dumps(jobs)],
                stdout=file,
                stderr=file,
                env=environment | {"JAX_PROCESS_ID": str(index)},
            )
            for index, command in enumerate(commands)
        ]
        try:
            codes = [process.wait(timeout=300) for process in started]
        finally:
            for process in started:
                process.kill()
    said = log.read_text(errors="replace")
    assert codes == [0] * len(codes), said[-6000:]
    return [json.loads(Path(f"{results}.{n}").read_text()) for n in range(processes)], said


def jax_devices(folder, count):
    """So many simulated devices; what one run compiles serves the others: half the time."""
    return {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


def eight_devices(folder, jobs):
    return launch(folder, jobs, [sys.executable], **jax_devices(folder, 8))


def two_hosts(folder, jobs):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    jobs = [{**job, "distributed": True} for job in jobs]
    return launch(folder, jobs, *[[sys.executable]] * 2, processes=2, **told, **jax_devices(folder, 2))


def two_processes(folder, jobs):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return launch(folder, jobs, torchrun, processes=2, GLOO_SOCKET_IFNAME="lo")


LAUNCH = {"jax": eight_devices, "torch": two_processes, "jax hosts": two_hosts}


@pytest.fixture(scope="module", params=LAUNCH)
def trained(request, quick, tmp_path_factory):
    """The folder of all runs, the framework, what the processes said by job, and their log."""
    kind, folder = request.param, tmp_path_factory.mktemp("runs")
    framework, (mesh, other) = kind.split()[0], MESHES[kind]
    options = {**quick, "framework": framework, "mesh": mesh}
    bad = {
        "unseen": {"destination": str(folder / "unseen-{rank}"), **options},
        "no data": {"destination": str(folder / "no"), **options, "data": ["/nowhere/at/all"]},
        "wrong size": {"destination": str(folder / "no"), **options, "mesh": "tensor=3"},
        "no mesh": {"destination": str(folder / "no"), **options, "mesh": None},
    }
    if kind == "jax":  # which has one process here
        bad = {name: bad[name] for name in ("no data", "wrong size")}
    jobs = {
        "whole": {"destination": str(folder / "whole"), **options},
        "part": {"destination": str(folder / "part"), **options, "stop": 3},
        "moved": {
            "destination": str(folder / "moved"),
            "copy": str(folder / "part"),
            "resume": True,
            "mesh": other,
        },
        "gone on": {"destination": str(folder / "part"), "resume": True},
        "narrow": {
            "destination": str(folder / "narrow"),
            **options,
            "dtype": "float32",
            "compute_dtype": "bfloat16",
        },
        **bad,
    }
    if kind == "jax hosts":  # what one process has shown already
        jobs = {name: job for name, job in jobs.items() if name not in ("moved", "narrow")}
    said, log = LAUNCH[kind](folder, list(jobs.values()))
    train_text(folder / "one", **{**quick, "data": tuple(quick["data"]), "framework": framework})
    return folder, kind, dict(zip(jobs, zip(*said, strict=True), strict=True)), log


def close(left, right, limit):
    """Metrics and weights of two runs, by the largest difference relative to the values."""
    for a, b in zip(exact(left), exact(right), strict=True):
        assert a.keys() == b.keys() and all(abs(a[n] - b[n]) <= limit * abs(b[n]) for n in a), (a, b)
    a, b = arrays(left), arrays(right)
    assert a.keys() == b.keys()
    for name in a:
        assert np.abs(a[name] - b[name]).max() <= limit * np.abs(b[name]).max(), name


def test_a_mesh_learns_what_one_device_learns(trained):
    folder, kind, said, _ = trained
    close(folder / "whole", folder / "one", LIMIT)
    for number, result in enumerate(said["whole"]):
        assert (result["steps"], result["process"], result["interrupted"]) == (6, number, False)
        assert result["loss"] == said["whole"][0]["loss"]
    settings = json.loads((folder / "whole" / "run.json").read_text())["settings"]
    sizes = {"jax": (2, 2, 2), "torch": (1, 2, 1), "jax hosts": (1, 2, 2)}[kind]
    assert settings["mesh"] == "data={},fsdp={},tensor={}".format(*sizes)
    assert len(exact(folder / "whole")) == 6 and not (folder / "whole" / ".seen").exists()


def test_an_interrupted_run_on_a_mesh_comes_to_the_same_bits(trained):
    folder, _, said, _ = trained
    for part, gone_on in zip(said["part"], said["gone on"], strict=True):
        assert part["interrupted"] and (part["steps"], gone_on["begun_at"]) == (3, 3)
    same(folder / "whole", folder / "part")
    assert Checkpoints(folder / "part" / "checkpoints", 2).steps() == [4, 6]


@pytest.mark.parametrize("trained", ["jax", "torch"], indirect=True)
def test_a_run_goes_on_on_another_mesh_and_says_so(trained):
    folder, _, said, log = trained
    assert said["moved"][0]["begun_at"] == 3
    close(folder / "moved", folder / "one", LIMIT)
    assert "begun with mesh = data=" in log and "the numbers may differ in their last digits" in log


@pytest.mark.parametrize("trained", ["jax", "torch"], indirect=True)
def test_products_in_bfloat16_on_a_mesh(trained):
    folder, _, _, _ = trained
    narrow, wide = exact(folder / "narrow"), exact(folder / "one")
    far = [abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(narrow, wide, strict=True)]
    assert max(far) < 2**-7 and min(far) > 1e-7, far
    assert {x.dtype.name for x in arrays(folder / "narrow").values()} == {"float32"}


def test_what_processes_cannot_do_together_is_refused_by_all(trained):
    folder, kind, said, _ = trained
    first, *others = said["no data"]
    assert first.startswith("SourceError: /nowhere/at/all")
    assert all("WorkerError: process 0: another process" in x and "SourceError" in x for x in others)
    assert all("UsageError: mesh: the mesh does not fit" in x for x in said["wrong size"])
    if kind != "jax":
        assert all("UsageError: mesh: several processes need a mesh" in x for x in said["no mesh"])
        first, second = said["unseen"]
        assert "WorkerError: process 1: another process of the run has failed" in first
        assert "DestinationError: process 1 of 2" in second and "filesystem that all hosts share" in second
    assert not (folder / "no").exists() and not (folder / "unseen-0").exists()
