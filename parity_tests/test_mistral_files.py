"""Mistral's files: what transformers reads in them, published sizes, ports, and refusals by name."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import transformers
from flax.serialization import msgpack_serialize
from flax.traverse_util import unflatten_dict

import twinformers
from twinformers.checkpoints import convert
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.configs import RopeScaling, config_from_hf, preset
from twinformers.configs.mistral import MistralConfig
from twinformers.errors import ConfigError, WeightsError
from twinformers.weight_maps import weight_map

TINY = preset("mistral-tiny")


def test_presets_have_the_published_sizes():
    sizes = {f"mistral-7b-v0.{n}": size for n, size in ((1, 7241732096), (2, 7241732096), (3, 7248023552))}
    assert {name: weight_map(preset(name)).parameters for name in sizes} == sizes
    windows = [preset(name).sliding_window for name in sizes]
    assert windows == [4096, None, None] and [preset(n).rope_theta for n in sizes] == [1e4, 1e6, 1e6]


SPELLINGS = {
    "empty": {},
    "no window": {"sliding_window": None},
    "window": {"sliding_window": 7},
    "nulls": {"head_dim": None, "num_attention_heads": 16},
    "theta": {"rope_theta": 1e6, "hidden_size": 5120, "head_dim": 128},
    "llama3 without its length": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    },
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_reading_matches_transformers_and_inverts_writing(name, tmp_path):
    raw = {"model_type": "mistral", **SPELLINGS[name]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours, other = config_from_hf(raw), transformers.AutoConfig.from_pretrained(tmp_path)
    rope = dict(other.rope_parameters)
    expected = {f.name: getattr(other, f.name, None) for f in dataclasses.fields(MistralConfig)}
    expected["rope_theta"], scaled = rope.pop("rope_theta"), rope["rope_type"]
    expected["rope_scaling"] = None if scaled == "default" else RopeScaling(**rope)
    assert {f.name: getattr(ours, f.name) for f in dataclasses.fields(ours)} == expected
    written = json.loads(json.dumps(ours.to_hf()))
    assert config_from_hf(written) == ours
    assert transformers.MistralConfig.from_dict(written).sliding_window == ours.sliding_window


def test_files_of_before_heads_were_grouped_have_as_many_of_both_kinds():
    """What transformers 4 read so; transformers 5 refuses it."""
    for given, heads in (({}, 32), ({"num_attention_heads": 16}, 16)):
        raw = {"model_type": "mistral", "num_key_value_heads": None, **given}
        assert config_from_hf(raw).num_key_value_heads == heads


@pytest.mark.parametrize("field", ["sliding_window", "num_key_value_heads", "head_dim", "attention_dropout"])
def test_what_cannot_be_is_refused_by_name(field):
    values = {"sliding_window": [0, -4, True, 2.5, "7"], "attention_dropout": [0.1]}
    for value in values.get(field, [3]):
        with pytest.raises(ConfigError, match=field):
            config_from_hf({**TINY.to_hf(), field: value})


def test_ports_are_bit_identical_and_gguf_is_refused(tmp_path):
    source = PresetCheckpoint("test", TINY)
    twinformers.port(source, tmp_path / "0", to="hf", dtype="bfloat16")
    for n, to in enumerate(["jax", "torch", "hf"]):
        twinformers.port(tmp_path / str(n), tmp_path / str(n + 1), to=to)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "3" / name).read_bytes() == (tmp_path / "0" / name).read_bytes()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "3", output_loading_info=True)
    assert not any(info[f"{which}_keys"] for which in ("missing", "unexpected", "mismatched"))
    assert type(model).__name__ == "MistralForCausalLM"
    with pytest.raises(WeightsError, match="has no such architecture"):
        twinformers.port(source, tmp_path / "m.gguf", to="gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_legacy_flax_files(tmp_path):
    """As transformers 4's FlaxMistralForCausalLM named and laid them out: kernels [in, out]."""
    source = PresetCheckpoint("test", TINY)
    arrays = dict(convert(source, "hf", "float32"))
    renamed = {}
    for name, x in arrays.items():
        path, leaf = name.rsplit(".", 1)
        leaf = "embedding" if "embed_tokens" in path else leaf if "norm" in path else "kernel"
        renamed[(*path.split("."), leaf)] = np.ascontiguousarray(x.T if leaf == "kernel" else x)
    (tmp_path / "flax").mkdir()
    (tmp_path / "flax/flax_model.msgpack").write_bytes(msgpack_serialize(unflatten_dict(renamed)))
    (tmp_path / "flax/config.json").write_text(json.dumps(TINY.to_hf()))
    twinformers.port(tmp_path / "flax", tmp_path / "hf", to="hf")
    twinformers.port(source, tmp_path / "straight", to="hf", dtype="float32")
    left, right = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("hf", "straight"))
    assert left == right
