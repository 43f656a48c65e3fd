"""Hostile and broken folders: each is refused by name, the source stays as it was, nothing is left behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from twinformers import port
from twinformers.checkpoints import atomic, convert, open_checkpoint
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.configs import preset
from twinformers.errors import (
    ConfigError,
    DestinationError,
    FormatError,
    SourceError,
    TwinformersError,
    UsageError,
    WeightsError,
)

TINY = preset("llama-tiny")
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
MARKER, GENERATION, SUMS = "twinformers.json", "generation_config.json", "SHA256SUMS"
EMBED, NORM, QUERY = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.1.self_attn.q_proj.weight",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One whole folder of each kind; tests work on copies."""
    root = tmp_path_factory.mktemp("whole")
    for to in ("hf", "torch", "jax"):
        port("preset:llama-tiny", root / to, to=to)
    port("preset:llama-tiny", root / "shards", to="hf", shard_size=60_000)
    port(PresetCheckpoint("tied", TINY.replace(tie_word_embeddings=True)), root / "tied", to="hf")
    return root


def listing(folder):
    """Every entry below a folder, with the hash of its content."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in sorted(folder.rglob("*"))
    }


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content[key] = value
    path.write_text(json.dumps(content))


def edit_tensors(path, change):
    """Rewrite a safetensors file by the library's own writer."""
    tensors = load_file(path)
    change(tensors)
    save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, path)


def edit_header(path, change):
    """Rewrite the header of a safetensors file, true or not; the data stays."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def cut(path, size):
    content = path.read_bytes()
    path.write_bytes(content[:size])


def nested(depth):
    return '{"model_type": ' + "[" * depth + "]" * depth + "}"


def move_in_index(folder):
    """The index claims that the embedding is in the last shard; it is in the first."""
    listed = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map={**listed, EMBED: max(listed.values())})


def point_to(place):
    def change(folder):
        listed = json.loads((folder / INDEX).read_text())["weight_map"]
        edit_json(folder / INDEX, weight_map={**listed, EMBED: place})

    return change


def repeat_in_last_shard(folder):
    last = max(folder.glob("*.safetensors"))
    first = load_file(min(folder.glob("*.safetensors")))
    edit_tensors(last, lambda t: t.update({EMBED: first[EMBED]}))


def make_folder(path):
    path.unlink()
    path.mkdir()


def tied_head(change):
    return lambda t: t.update({"lm_head.weight": change(t[EMBED])})


def config(**changes):
    return lambda folder: edit_json(folder / CONFIG, **changes)


def index(**changes):
    return lambda folder: edit_json(folder / INDEX, **changes)


def marker(**changes):
    return lambda folder: edit_json(folder / MARKER, **changes)


def tensors(change):
    return lambda folder: edit_tensors(folder / WEIGHTS, change)


def header(change):
    return lambda folder: edit_header(folder / WEIGHTS, change)


def text(name, content):
    return lambda folder: (folder / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def shorter(size):
    return lambda folder: cut(folder / WEIGHTS, size)


#: Kind of folder, what is broken in it, then the error: type, `where` contains, message matches.
BROKEN = {
    # safetensors
    "data cut": ("hf", shorter(-10), FormatError, WEIGHTS, "truncated|incomplete"),
    "header cut": ("hf", shorter(100), FormatError, WEIGHTS, "safetensors"),
    "empty file": ("hf", shorter(0), FormatError, WEIGHTS, "safetensors"),
    "header too long": (
        "hf",
        text(WEIGHTS, (2**60).to_bytes(8, "little") + b"{}"),
        FormatError,
        WEIGHTS,
        "safetensors",
    ),
    "header no JSON": (
        "hf",
        text(WEIGHTS, (4).to_bytes(8, "little") + b"nope"),
        FormatError,
        WEIGHTS,
        "safetensors",
    ),
    "offsets lie": (
        "hf",
        header(lambda h: h[EMBED].update(data_offsets=[0, 8])),
        FormatError,
        WEIGHTS,
        "safetensors",
    ),
    "shape lies": (
        "hf",
        header(lambda h: h[EMBED].update(shape=[2**31, 2**31])),
        FormatError,
        WEIGHTS,
        "safetensors",
    ),
    "a folder for a file": (
        "hf",
        lambda f: make_folder(f / WEIGHTS),
        FormatError,
        WEIGHTS,
        "directory|folder",
    ),
    "no weights": (
        "hf",
        lambda f: (f / WEIGHTS).unlink(),
        SourceError,
        "hf",
        f"expected: {WEIGHTS}.*found: .*config",
    ),
    "two sets of weights": (
        "shards",
        lambda f: shutil.copy(min(f.glob("*.safetensors")), f / WEIGHTS),
        FormatError,
        WEIGHTS,
        "index",
    ),
    # what the tensors must be
    "tensor missing": (
        "hf",
        tensors(lambda t: t.pop(NORM)),
        WeightsError,
        "hf",
        f"missing.*expected: {NORM}.*found:    29 tensors",
    ),
    "tensor left over": (
        "hf",
        tensors(lambda t: t.update(extra=np.ones(3, np.float32))),
        WeightsError,
        f"{WEIGHTS}: extra",
        "left over.*expected: the 30 tensors.*found:    31 tensors",
    ),
    "tensor transposed": (
        "hf",
        tensors(lambda t: t.update({QUERY: t[QUERY].T})),
        WeightsError,
        f"{WEIGHTS}: {QUERY}",
        r"expected: \[60, 48\].*found:    \[48, 60\]",
    ),
    "another dtype": (
        "hf",
        tensors(lambda t: t.update({NORM: t[NORM].astype(np.int8)})),
        FormatError,
        f"{WEIGHTS}: {NORM}",
        "expected: F64, F32, F16, BF16.*found:    I8",
    ),
    "more layers": (
        "hf",
        config(num_hidden_layers=4),
        WeightsError,
        "hf",
        r"expected: model\.layers\.3\.input_layernorm",
    ),
    "fewer layers": (
        "hf",
        config(num_hidden_layers=2),
        WeightsError,
        f"{WEIGHTS}: model.layers.2.input_layernorm.weight, model",
        "left over",
    ),
    "another vocabulary": (
        "hf",
        config(vocab_size=252),
        WeightsError,
        f"{WEIGHTS}: {EMBED}",
        r"expected: \[252, 48\].*found:    \[251, 48\]",
    ),
    "tied head differs": (
        "tied",
        tensors(tied_head(lambda x: x + np.float32(1e-3))),
        WeightsError,
        f"{WEIGHTS}: lm_head.weight",
        f"expected: the values of {EMBED}.*found:    other values",
    ),
    "tied head of another shape": (
        "tied",
        tensors(tied_head(lambda x: x[:-1])),
        WeightsError,
        f"{WEIGHTS}: lm_head.weight",
        r"expected: \[251, 48\].*found:    \[250, 48\]",
    ),
    "untied head missing": (
        "tied",
        config(tie_word_embeddings=False),
        WeightsError,
        "tied",
        "expected: lm_head.weight",
    ),
    # shards
    "shard missing": (
        "shards",
        lambda f: max(f.glob("*.safetensors")).unlink(),
        FormatError,
        ".safetensors",
        "does not exist",
    ),
    "shard cut": (
        "shards",
        lambda f: cut(max(f.glob("*.safetensors")), -10),
        FormatError,
        ".safetensors",
        "safetensors",
    ),
    "in two shards": (
        "shards",
        repeat_in_last_shard,
        FormatError,
        f": {EMBED}",
        "two files.*found:    also in",
    ),
    "index disagrees": (
        "shards",
        move_in_index,
        FormatError,
        f"{INDEX}: {EMBED}",
        r"expected: in model-0000(\d)-of-0000\1\.safetensors.*found:    in model-00001-of",
    ),
    "index points upwards": (
        "shards",
        point_to("../secret.safetensors"),
        FormatError,
        f"{INDEX}: weight_map['{EMBED}']",
        r"expected: the plain name.*found:    '\.\./secret",
    ),
    "index points to the root": (
        "shards",
        point_to("/etc/passwd"),
        FormatError,
        INDEX,
        "found:    '/etc/passwd'",
    ),
    "index points below": ("shards", point_to("a/b.safetensors"), FormatError, INDEX, "plain name"),
    "index points to the parent": ("shards", point_to(".."), FormatError, INDEX, r"found:    '\.\.'"),
    "index points to nothing": ("shards", point_to(""), FormatError, INDEX, "plain name"),
    "index points to a number": ("shards", point_to(7), FormatError, INDEX, "found:    7"),
    "index points to a pickle": (
        "shards",
        point_to("pytorch_model.bin"),
        FormatError,
        ".bin",
        "does not exist",
    ),
    "index no JSON": ("shards", text(INDEX, "{"), FormatError, INDEX, "JSON"),
    "index a list": ("shards", text(INDEX, "[]"), FormatError, INDEX, "found:    list"),
    "index empty": ("shards", index(weight_map={}), FormatError, INDEX, "lists no"),
    "index without a map": ("shards", index(weight_map=[]), FormatError, INDEX, "lists no"),
    # config.json
    "config missing": ("hf", lambda f: (f / CONFIG).unlink(), SourceError, "hf", "expected: config.json"),
    "config a folder": ("hf", lambda f: make_folder(f / CONFIG), FormatError, CONFIG, "found:    a folder"),
    "config no JSON": ("hf", text(CONFIG, "model_type: llama"), FormatError, CONFIG, "JSON"),
    "config no UTF-8": ("hf", text(CONFIG, b'{"a": "\xff\xfe"}'), FormatError, CONFIG, "JSON"),
    "config a list": ("hf", text(CONFIG, "[1]"), FormatError, CONFIG, "found:    list"),
    "config of a wrong type": (
        "hf",
        config(hidden_size="48"),
        ConfigError,
        f"{CONFIG}: hidden_size",
        "expected: a positive integer.*found:    '48'",
    ),
    "config with a huge number": (
        "hf",
        config(num_hidden_layers=10**12),
        ConfigError,
        f"{CONFIG}: num_hidden_layers",
        "found:    1000000000000",
    ),
    "config with endless digits": (
        "hf",
        text(CONFIG, '{"vocab_size": 1' + "0" * 10_000 + "}"),
        FormatError,
        CONFIG,
        "JSON",
    ),
    "config nested deeply": ("hf", text(CONFIG, nested(100_000)), FormatError, CONFIG, "JSON"),
    "config of another architecture": (
        "hf",
        config(model_type="mamba"),
        ConfigError,
        f"{CONFIG}: model_type",
        "expected: one of .*llama.*found:    'mamba'",
    ),
    "another activation": (
        "hf",
        config(hidden_act="gelu"),
        ConfigError,
        f"{CONFIG}: hidden_act",
        "expected: 'silu'.*found:    'gelu'",
    ),
    "biases": (
        "hf",
        config(attention_bias=True),
        ConfigError,
        f"{CONFIG}: attention_bias",
        "expected: False.*found:    True",
    ),
    "another scaling": (
        "hf",
        config(rope_scaling={"type": "yarn", "factor": 4.0}),
        ConfigError,
        f"{CONFIG}: rope_scaling.rope_type",
        "expected: 'default' or one of 'linear', 'llama3'.*found:    'yarn'",
    ),
    # what travels along
    "generation settings no JSON": ("hf", text(GENERATION, "{"), FormatError, GENERATION, "JSON"),
    "generation settings a list": ("hf", text(GENERATION, "[]"), FormatError, GENERATION, "found:    list"),
    # the twins' own
    "another version": (
        "torch",
        marker(version=2),
        FormatError,
        MARKER,
        "expected: version 1, format torch or jax.*found:    version 2, format 'torch'",
    ),
    "another format": (
        "jax",
        marker(format="tensorflow"),
        FormatError,
        MARKER,
        "found:    version 1, format 'tensorflow'",
    ),
    "the other format": ("torch", marker(format="jax"), FormatError, "params", "Orbax"),
    "format of a wrong type": (
        "torch",
        marker(format=["torch"]),
        FormatError,
        MARKER,
        r"found:    version 1, format \['torch'\]",
    ),
    "another architecture in the marker": (
        "torch",
        marker(architecture="gpt2"),
        FormatError,
        MARKER,
        "expected: 'llama'.*found:    'gpt2'",
    ),
    "marker no JSON": ("jax", text(MARKER, ""), FormatError, MARKER, "JSON"),
    "marker missing": (
        "torch",
        lambda f: (f / MARKER).unlink(),
        WeightsError,
        "torch",
        f"missing.*expected: {EMBED}.*left over: embed.weight",
    ),
    "config missing in a torch folder": (
        "torch",
        lambda f: (f / CONFIG).unlink(),
        FormatError,
        CONFIG,
        "does not exist",
    ),
    "torch tensor missing": (
        "torch",
        tensors(lambda t: t.pop("norm.weight")),
        WeightsError,
        "torch",
        "expected: norm.weight.*found:    29 tensors",
    ),
    "Orbax folder missing": ("jax", lambda f: shutil.rmtree(f / "params"), FormatError, "params", "Orbax"),
    "Orbax folder empty": (
        "jax",
        lambda f: (shutil.rmtree(f / "params"), (f / "params").mkdir()),
        FormatError,
        "params",
        "Orbax",
    ),
    "Orbax data gone": (
        "jax",
        lambda f: [p.unlink() for p in (f / "params").rglob("*") if p.is_file() and "norm" in str(p)],
        FormatError,
        "params",
        "flat dictionary|Orbax",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folder_is_refused(name, folders, tmp_path):
    kind, change, error, where, message = BROKEN[name]
    source = tmp_path / kind
    shutil.copytree(folders / kind, source)
    change(source)
    before = listing(tmp_path)
    with pytest.raises(error) as caught:
        port(source, tmp_path / "new" / "deep", to="torch" if kind != "torch" else "jax")
    assert type(caught.value) is error
    assert where in caught.value.where
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)
    assert len(str(caught.value)) < 2000
    assert listing(tmp_path) == before


def test_every_depth_of_nesting_is_refused_by_type(folders, tmp_path):
    """Reading and printing give up at different depths; neither may end in a traceback."""
    shutil.copytree(folders / "hf", tmp_path / "hf")
    for depth in (1, 10, *range(100, 3000, 50)):
        (tmp_path / "hf" / CONFIG).write_text(nested(depth))
        with pytest.raises(TwinformersError):
            open_checkpoint(tmp_path / "hf")


@pytest.mark.parametrize("length", range(0, 400, 23))
def test_every_truncation_of_a_shard_is_refused(length, folders, tmp_path):
    shutil.copytree(folders / "hf", tmp_path / "hf")
    cut(tmp_path / "hf" / WEIGHTS, length)
    with pytest.raises(FormatError, match="safetensors"):
        open_checkpoint(tmp_path / "hf")


def test_file_that_shrinks_while_it_is_read(folders, tmp_path):
    shutil.copytree(folders / "hf", tmp_path / "hf")
    with open_checkpoint(tmp_path / "hf") as checkpoint:
        cut(tmp_path / "hf" / WEIGHTS, 5000)
        with pytest.raises(FormatError) as caught:
            list(convert(checkpoint, "torch"))
    assert WEIGHTS in caught.value.where


def test_unreadable_asset_is_named(folders, tmp_path, monkeypatch):
    shutil.copytree(folders / "hf", tmp_path / "hf")
    opened = os.open

    def fail(path, *options):
        if str(path).endswith(GENERATION):
            raise OSError(errno.EIO, "Input/output error")
        return opened(path, *options)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(FormatError, match="Input/output error") as caught:
        port(tmp_path / "hf", tmp_path / "out", to="torch")
    assert caught.value.where.endswith(GENERATION)


# What must be read although it is odd


def test_tied_head_that_agrees_is_accepted(folders, tmp_path):
    shutil.copytree(folders / "tied", tmp_path / "tied")
    edit_tensors(tmp_path / "tied" / WEIGHTS, tied_head(lambda x: x.copy()))
    port(tmp_path / "tied", tmp_path / "out", to="hf")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / WEIGHTS)


def test_old_buffers_are_passed_over(folders, tmp_path):
    shutil.copytree(folders / "hf", tmp_path / "hf")
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    edit_tensors(tmp_path / "hf" / WEIGHTS, lambda t: t.update({name: np.ones(5, np.float32)}))
    port(tmp_path / "hf", tmp_path / "out", to="hf")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (folders / "hf" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("shard_size", [1, 20_000, 60_000])
def test_shards_load_in_transformers(shard_size, tmp_path):
    import transformers

    result = port("preset:llama-tiny", tmp_path / "hf", to="hf", shard_size=shard_size)
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "hf" / WEIGHTS).exists()
    sizes = {s: sum(t.nbytes for t in load_file(s).values()) for s in shards}
    # A tensor larger than a shard has one to itself.
    assert all(size <= shard_size or len(load_file(s)) == 1 for s, size in sizes.items())
    assert sum(sizes.values()) == result.bytes
    assert json.loads((tmp_path / "hf" / INDEX).read_text())["metadata"]["total_size"] == result.bytes
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    port(tmp_path / "hf", tmp_path / "one", to="hf")
    whole = load_file(tmp_path / "one" / WEIGHTS)
    assert len(whole) == result.tensors
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, torch.from_numpy(whole[name]))


# Orbax


def orbax_tree():
    with open_checkpoint("preset:llama-tiny") as checkpoint:
        return dict(convert(checkpoint, "jax"))


def without_norm(tree):
    del tree["norm.scale"]


def with_extra(tree):
    tree["extra.kernel"] = np.ones((2, 3), np.float32)


def with_wrong_shape(tree):
    tree["norm.scale"] = np.ones(47, np.float32)


def with_integers(tree):
    tree["norm.scale"] = np.ones(48, np.int32)


def nest(tree):
    tree["norm"] = {"scale": tree.pop("norm.scale")}


ORBAX = {
    "missing": (without_norm, WeightsError, "jax", "expected: norm.scale.*found:    29 tensors"),
    "left over": (with_extra, WeightsError, "params: extra.kernel", "left over.*found:    31 tensors"),
    "shape": (with_wrong_shape, WeightsError, "params: norm.scale", r"expected: \[48\].*found:    \[47\]"),
    "dtype": (with_integers, FormatError, "params: norm.scale", "expected: float64.*found:    int32"),
    "nested": (nest, FormatError, "params: norm", "not a flat dictionary"),
}


@pytest.mark.parametrize("name", ORBAX)
def test_orbax_folder_is_refused(name, folders, tmp_path):
    from orbax.checkpoint import v1

    change, error, where, message = ORBAX[name]
    source = tmp_path / "jax"
    shutil.copytree(folders / "jax", source)
    shutil.rmtree(source / "params")
    tree = orbax_tree()
    change(tree)
    v1.save(source / "params", tree)
    before = listing(tmp_path)
    with pytest.raises(error) as caught:
        port(source, tmp_path / "out", to="hf")
    assert where in caught.value.where
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("lost", ["c", "c/0", "zarr.json"])
def test_lost_data_of_orbax_is_refused(lost, folders, tmp_path):
    """A store of chunks may take a missing one for zeros."""
    shutil.copytree(folders / "jax", tmp_path / "jax")
    place = tmp_path / "jax" / "params" / "state" / "norm.scale" / lost
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    before = listing(tmp_path)
    with pytest.raises(FormatError) as caught:
        port(tmp_path / "jax", tmp_path / "out", to="hf")
    assert caught.value.where.endswith("params")
    assert "norm.scale" in caught.value.found or lost == "zarr.json"  # of which Orbax tells its log alone
    assert listing(tmp_path) == before


@pytest.mark.parametrize("lost", ["c", "c/0", "zarr.json", "half"])
def test_a_part_of_lost_data_of_orbax_is_refused(lost, folders, tmp_path):
    shutil.copytree(folders / "jax", tmp_path / "jax")
    with open_checkpoint(tmp_path / "jax") as checkpoint:
        place = tmp_path / "jax" / "params" / "state" / "norm.scale"
        if lost == "half":
            (place / "c" / "0").write_bytes((place / "c" / "0").read_bytes()[:-8])
        else:
            shutil.rmtree(place / lost) if lost == "c" else (place / lost).unlink()
        with pytest.raises(FormatError) as caught:
            checkpoint.read_part("norm.scale", (slice(0, 4),))
    said = str(caught.value)
    assert "norm.scale" in said and str(tmp_path) in said


def test_orbax_saved_by_its_defaults_is_read(folders, tmp_path):
    """Compressed and in one file, as Orbax itself would save it: still the same numbers."""
    from orbax.checkpoint import v1

    source = tmp_path / "jax"
    shutil.copytree(folders / "jax", source)
    shutil.rmtree(source / "params")
    v1.save(source / "params", orbax_tree())
    port(source, tmp_path / "out", to="hf")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (folders / "hf" / WEIGHTS).read_bytes()


# Destinations


@pytest.fixture
def place(folders, tmp_path):
    """A source, an older checkpoint in the way, and some things that are none."""
    shutil.copytree(folders / "hf", tmp_path / "source")
    shutil.copytree(folders / "tied", tmp_path / "old")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "old")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    return tmp_path


#: The destination, whether --overwrite is given, and what the message says.
DESTINATIONS = {
    "exists": ("old", False, "exists.*overwrite"),
    "is a file": ("file", False, "exists"),
    "is a file, overwriting": ("file", True, "not a checkpoint"),
    "holds something else": ("photos", True, "not a checkpoint.*expected: a folder with a config.json"),
    "is a link": ("link", False, "exists"),
    "is a link, overwriting": ("link", True, "symbolic link"),
    "is a link to nothing": ("dangling", False, "exists"),
    "is a link to nothing, overwriting": ("dangling", True, "symbolic link"),
    "is the source": ("source", True, "source"),
    "is the source, spelled otherwise": ("photos/../source", True, "source"),
    "is in the source": ("source/out", False, "source"),
    "is deep in the source": ("source/a/b/out", True, "source"),
    "holds the source": (".", True, "source"),
    "is below a file": ("file/out", False, "cannot be written"),
    "has too long a name": ("x" * 300, False, "cannot be written|too long"),
    "has too long a path": ("/".join(["x" * 200] * 30), False, "cannot be written|too long"),
    "is in no file system": ("/proc/self/out", False, "cannot be written"),
}


@pytest.mark.parametrize("name", DESTINATIONS)
def test_destination_is_refused(name, place):
    destination, overwrite, message = DESTINATIONS[name]
    before = listing(place)
    with pytest.raises(DestinationError) as caught:
        port(place / "source", place / destination, to="torch", overwrite=overwrite)
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)
    assert caught.value.where
    assert listing(place) == before
    assert (place / "link").is_symlink() and (place / "dangling").is_symlink()


@pytest.mark.parametrize("kind", ["torch", "jax"])
@pytest.mark.parametrize("below", ["", "out", "params/out"])
def test_own_folder_is_never_its_destination(kind, below, folders, tmp_path):
    shutil.copytree(folders / kind, tmp_path / kind)
    before = listing(tmp_path)
    with pytest.raises(DestinationError, match="source"):
        port(tmp_path / kind, tmp_path / kind / below, to="hf", overwrite=True)
    assert listing(tmp_path) == before


def test_destination_beside_a_gguf_file_is_fine(tmp_path):
    """Only a folder is a source as a whole; a file may have its port beside it."""
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(FormatError):  # this one is no GGUF; what matters is that it was looked at
        port(tmp_path / "m.gguf", tmp_path / "out", to="hf")


def test_overwrite_replaces_a_checkpoint_whole(place):
    (place / "old" / "stale.json").write_text("{}")
    port(place / "source", place / "old", to="torch", overwrite=True)
    assert sorted(p.name for p in (place / "old").iterdir()) == [
        SUMS,
        CONFIG,
        GENERATION,
        WEIGHTS,
        MARKER,
    ]
    assert not [p for p in place.iterdir() if p.name.startswith(".")]


class Planted(Exception):
    """No error of ours: whatever happens in the middle."""


@pytest.mark.parametrize("to", ["hf", "torch", "jax"])
@pytest.mark.parametrize("error", [Planted, KeyboardInterrupt])
@pytest.mark.parametrize("destination", ["old", "new"])
def test_failure_in_the_middle_keeps_the_old_whole(to, error, destination, place):
    before = listing(place)

    def fail(entry, done, total):
        if done == total // 2:
            raise error

    with pytest.raises(error):
        port(place / "source", place / destination, to=to, overwrite=True, on_tensor=fail)
    assert listing(place) == before


@pytest.mark.parametrize("nth", range(1, 8))
def test_full_disk_keeps_the_old_whole(nth, place, monkeypatch):
    """Every step that reaches the disk fails once."""
    before, calls, sync = listing(place), [], os.fsync

    def fail(handle):
        calls.append(handle)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fail)
    try:
        port(place / "source", place / "old", to="torch", overwrite=True)
    except DestinationError as error:
        assert error.found == "No space left on device" and error.where == str(place / "old")
        assert listing(place) == before
    else:
        assert nth > len(calls) or listing(place / "old") != before


@pytest.mark.parametrize("nth", [1, 2])
def test_failing_rename_keeps_the_old_whole(nth, place, monkeypatch):
    """Where names cannot be exchanged in one step, there are two renames to fail."""
    before, calls, rename = listing(place), [], os.rename

    def fail(path, target):
        calls.append(path)
        if len(calls) == nth:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(DestinationError, match="Input/output error"):
        port(place / "source", place / "old", to="torch", overwrite=True)
    assert len(calls) >= nth
    assert listing(place) == before


def test_bad_options_are_refused_before_anything_is_done(place):
    before = listing(place)
    for options, field in (
        ({"to": "onnx"}, "to"),
        ({"to": "hf", "dtype": "int8"}, "dtype"),
        ({"to": "hf", "shard_size": 0}, "shard_size"),
    ):
        with pytest.raises(UsageError) as caught:
            port(place / "source", place / "out", **options)
        assert caught.value.where == field and caught.value.expected and caught.value.found
    assert listing(place) == before
