"""One file of weights as a source: the model's configuration lies beside it, the names tell the layout."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from flax import serialization
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file

from twinformers import port
from twinformers.checkpoints import convert, open_checkpoint
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.cli.app import run as command
from twinformers.configs import preset
from twinformers.errors import FormatError, SourceError, TwinformersError, WeightsError

CONFIG = preset("llama-tiny")


@pytest.fixture(scope="module")
def sides():
    """The same tensors by the names and in the layout of each side."""
    checkpoint = PresetCheckpoint("preset", CONFIG, 0)
    return {side: dict(convert(checkpoint, side)) for side in ("hf", "meta", "torch", "jax", "flax", "gguf")}


def torch_save(tensors, path):
    torch.save({name: torch.from_numpy(array.copy()) for name, array in tensors.items()}, path)


def torch_save_wrapped(tensors, path):
    torch.save({"epoch": 1, "state_dict": {n: torch.from_numpy(a.copy()) for n, a in tensors.items()}}, path)


def safetensors_save(tensors, path):
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path)


def msgpack_save(tensors, path):
    path.write_bytes(serialization.msgpack_serialize(unflatten_dict(dict(tensors), sep="/")))


@pytest.fixture
def place(tmp_path):
    """A folder with the configuration and a tokenizer's file, and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    (tmp_path / "merges.txt").write_text("a b")
    return tmp_path


FILES = {
    "model.safetensors": (safetensors_save, ("hf", "meta", "torch", "jax", "gguf")),
    "weights.pt": (torch_save, ("hf", "meta", "torch", "jax", "gguf")),
    "consolidated.00.pth": (torch_save, ("meta",)),
    "epoch=3.pth": (torch_save_wrapped, ("torch", "hf")),
    "pytorch_model.bin": (torch_save, ("hf", "torch")),
    "flax_model.msgpack": (msgpack_save, ("flax",)),
    "other.msgpack": (msgpack_save, ("flax",)),
}


@pytest.mark.parametrize(("name", "side"), [(n, s) for n, (_, found) in FILES.items() for s in found])
def test_every_file_and_layout_gives_the_same_tensors(name, side, place, sides):
    FILES[name][0](sides[side], place / name)
    with open_checkpoint(place / name) as checkpoint:
        assert (checkpoint.format, checkpoint.side) == (side, side)
        assert checkpoint.config == CONFIG and checkpoint.assets["merges.txt"] == b"a b"
        assert checkpoint.files == [str(place / name)] and checkpoint.revision == ""
        found = dict(convert(checkpoint, "hf"))
    assert found.keys() == sides["hf"].keys()
    for key, array in sides["hf"].items():
        assert found[key].dtype == array.dtype and np.array_equal(found[key], array), key


def test_file_in_a_folder_of_ours(tmp_path, sides):
    port("preset:llama-tiny", tmp_path / "twin", to="torch")
    with open_checkpoint(tmp_path / "twin" / "model.safetensors") as checkpoint:
        assert checkpoint.side == "torch"
        assert np.array_equal(checkpoint.read("norm.weight"), sides["torch"]["norm.weight"])


def test_port_beside_the_file_is_allowed_and_onto_it_is_not(place, sides):
    torch_save(sides["hf"], place / "weights.pt")
    port(place / "weights.pt", place / "out", to="torch")
    with pytest.raises(TwinformersError, match="the destination is the source"):
        port(place / "weights.pt", place / "weights.pt", to="torch", overwrite=True)


@pytest.mark.parametrize("name", FILES)
def test_without_a_configuration_it_is_said_where_to_put_it(name, place, sides):
    write, (side, *_) = FILES[name]
    write(sides[side], place / name)
    (place / "config.json").unlink()
    with pytest.raises(SourceError, match=r"config\.json") as caught:
        open_checkpoint(place / name)
    assert caught.value.where == str(place / name) and str(place) in caught.value.expected


def test_metas_file_alone_is_told_to_be_opened_as_a_folder(place, sides):
    torch_save(sides["meta"], place / "consolidated.00.pth")
    (place / "config.json").rename(place / "params.json")
    with pytest.raises(SourceError, match="give the folder") as caught:
        open_checkpoint(place / "consolidated.00.pth")
    assert caught.value.found == "params.json"


def test_names_that_fit_nothing_name_what_was_tried(place, sides):
    torch_save({f"module.{n}": a for n, a in sides["hf"].items()}, place / "ddp.pt")
    with pytest.raises(WeightsError, match="in no layout that this model has") as caught:
        open_checkpoint(place / "ddp.pt")
    for side in sides:
        assert f"({side})" in caught.value.expected
    assert "module.model" in caught.value.found


def test_names_of_two_layouts_are_judged_by_the_larger_part(place, sides):
    mixed = {**sides["torch"], "model.norm.weight": sides["hf"]["model.norm.weight"]}
    torch_save(mixed, place / "mixed.pt")
    with open_checkpoint(place / "mixed.pt") as checkpoint:
        assert checkpoint.side == "torch"
        with pytest.raises(WeightsError, match="left over"):
            dict(convert(checkpoint, "hf"))


def test_a_shard_alone_is_not_a_model(place, sides):
    torch_save(dict(list(sides["hf"].items())[:5]), place / "pytorch_model-00001-of-00002.bin")
    with (
        open_checkpoint(place / "pytorch_model-00001-of-00002.bin") as checkpoint,
        pytest.raises(WeightsError, match="missing"),
    ):
        dict(convert(checkpoint, "hf"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin", ".msgpack"])
def test_what_is_no_file_is_refused(suffix, place):
    os.mkfifo(place / f"pipe{suffix}")
    with pytest.raises(FormatError, match="not a regular file"):
        open_checkpoint(place / f"pipe{suffix}")
    (place / f"empty{suffix}").write_bytes(b"")
    with pytest.raises(FormatError, match=r"not a (readable|safetensors)"):
        open_checkpoint(place / f"empty{suffix}")


@pytest.mark.parametrize("name", ["weights.txt", "weights", "weights.h5", "weights.PT"])
def test_other_files_are_refused_by_what_could_be(name, place):
    (place / name).write_bytes(b"x")
    with pytest.raises(SourceError, match="not a checkpoint") as caught:
        open_checkpoint(place / name)
    for suffix in (".gguf", ".safetensors", ".pt", ".pth", ".bin", ".msgpack"):
        assert suffix in caught.value.expected


def test_command_ports_a_file_and_refuses_a_bad_one(place, sides, capsys):
    torch_save(sides["hf"], place / "weights.pt")
    assert command(["port", str(place / "weights.pt"), str(place / "out"), "--to", "jax"]) == 0
    (place / "weights.pt").write_bytes((place / "weights.pt").read_bytes()[:-1])
    capsys.readouterr()
    assert command(["port", str(place / "weights.pt"), str(place / "again"), "--to", "jax"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "weights.pt" in said and "Traceback" not in said
    assert not (place / "again").exists()


def test_flax_folder_of_transformers_opens_as_a_file_too(tmp_path):
    fixture = Path(__file__).parent / "fixtures" / "flax_marian"
    shutil.copytree(fixture, tmp_path / "marian")
    with (
        open_checkpoint(tmp_path / "marian" / "flax_model.msgpack") as file,
        open_checkpoint(fixture) as folder,
    ):
        assert file.side == folder.side == "flax" and file.tensors.keys() == folder.tensors.keys()
