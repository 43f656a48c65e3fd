"""Configurations: transformers' own reading of every spelling, published sizes, and refusals by name."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from twinformers.checkpoints import TensorInfo
from twinformers.configs import RopeScaling, config_from_gguf, config_from_hf, preset, presets
from twinformers.configs.base import MAX_LAYERS, NEUTRAL_FIELDS
from twinformers.configs.llama import PRESETS, LlamaConfig
from twinformers.errors import ConfigError
from twinformers.parity.reference import float64_throughout
from twinformers.weight_maps import weight_map

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read(raw):
    """Our reading of what a file holds, through JSON as a file would be."""
    return config_from_hf(json.loads(json.dumps({"model_type": "llama", **raw})))


def read_by_transformers(raw, folder):
    """transformers' reading of the same file, in our fields."""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **raw}))
    return translated(transformers.AutoConfig.from_pretrained(folder)), frequencies(folder)


def translated(theirs):
    rope = theirs.rope_parameters
    known = RopeScaling.__dataclass_fields__
    values = {f.name: getattr(theirs, f.name, None) for f in dataclasses.fields(LlamaConfig)}
    values["rope_theta"] = rope["rope_theta"]
    scaled = rope["rope_type"] != "default"
    values["rope_scaling"] = RopeScaling(**{k: rope[k] for k in known if k in rope}) if scaled else None
    return values


def frequencies(folder):
    with float64_throughout():
        return LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(folder)).inv_freq.tolist()


def fields(config):
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


# Defaults, and the spellings of old and new files


def test_defaults_match_transformers():
    theirs = transformers.LlamaConfig()
    ours = fields(read({}))
    assert ours == translated(theirs)
    # Each default is one that transformers states: what it has under the same name, in this very class.
    stated = {*LlamaConfig.HF_DEFAULTS, "rope_theta", "rope_scaling"}
    assert stated == ours.keys()
    for name, implemented in LlamaConfig.HF_FIXED.items():
        assert getattr(theirs, name, implemented) == implemented


def test_no_field_that_transformers_writes_is_unknown(caplog):
    with caplog.at_level(logging.WARNING):
        read(transformers.LlamaConfig().to_dict())
    assert caplog.messages == []
    assert not NEUTRAL_FIELDS & {f.name for f in dataclasses.fields(LlamaConfig)}


SPELLINGS = {
    "empty": {},
    "nulls": {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None},
    "oldest": {"hidden_size": 96, "num_attention_heads": 6, "vocab_size": 100, "rms_norm_eps": 1e-5},
    "grouped heads": {"num_key_value_heads": 4, "head_dim": 66},
    "theta": {"rope_theta": 5e5},
    "integer theta": {"rope_theta": 500000},
    "type": {"rope_theta": 3e4, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "rope_type": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "both types": {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}},
    "no type": {"rope_scaling": {"factor": 2.0}},
    "theta inside": {"rope_theta": 9e3, "rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 3e3}},
    "llama3": {
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 1024},
    },
    "llama3 without its length": {
        "max_position_embeddings": 4096,
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
    },
    "llama3 without any length": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
    "rope_parameters scaled": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 7e4,
            **LLAMA3,
            "original_max_position_embeddings": 512,
        }
    },
    "rope_parameters without theta": {"rope_theta": 2e4, "rope_parameters": {"rope_type": "default"}},
    # A file edited by hand: transformers takes the old field, wherever it holds anything.
    "old over new": {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 7e4},
    },
    "whole rotation": {
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 1.0}
    },
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_reading_matches_transformers(name, tmp_path):
    ours = read(SPELLINGS[name])
    theirs, their_frequencies = read_by_transformers(SPELLINGS[name], tmp_path)
    assert fields(ours) == theirs
    assert ours.rotary_frequencies == pytest.approx(their_frequencies, rel=1e-12, abs=0)


def test_unknown_field_is_reported_by_name(caplog):
    with caplog.at_level(logging.WARNING):
        read({"sliding_taste": 3})
    assert caplog.messages == ["config.json: field 'sliding_taste' is not known here and has no effect"]


# Writing and reading back


def positive(low, high):
    return st.floats(low, high, allow_nan=False)


@st.composite
def scalings(draw):
    kind = draw(st.sampled_from(["linear", "llama3"]))
    factor = draw(positive(1.0, 100.0))
    if kind == "linear":
        return RopeScaling(rope_type=kind, factor=factor)
    low = draw(positive(0.1, 10.0))
    return RopeScaling(
        rope_type=kind,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=low + draw(positive(0.1, 10.0)),
        original_max_position_embeddings=draw(st.integers(1, 10**6)),
    )


@st.composite
def configs(draw):
    small = st.integers(1, 12)
    kv, groups, width = draw(small), draw(small), draw(small)
    return LlamaConfig(
        vocab_size=draw(st.integers(1, 10**6)),
        hidden_size=kv * groups * width,
        intermediate_size=draw(st.integers(1, 10**6)),
        num_hidden_layers=draw(st.integers(1, 200)),
        num_attention_heads=kv * groups,
        num_key_value_heads=kv,
        head_dim=2 * draw(small),
        rms_norm_eps=draw(positive(1e-12, 1e-1)),
        rope_theta=draw(positive(1.5, 1e9)),
        rope_scaling=draw(st.none() | scalings()),
        max_position_embeddings=draw(st.integers(1, 10**7)),
        tie_word_embeddings=draw(st.booleans()),
    )


@settings(max_examples=150, deadline=None)
@given(configs())
def test_reading_inverts_writing(config):
    written = json.loads(json.dumps(config.to_hf(), allow_nan=False))
    assert config_from_hf(written) == config
    assert translated(transformers.LlamaConfig.from_dict(written)) == fields(config)
    # Files of before transformers 5 had no `rope_parameters`, and files of it need nothing else.
    without_new = {k: v for k, v in written.items() if k != "rope_parameters"}
    without_old = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling")}
    assert config_from_hf(without_new) == config_from_hf(without_old) == config


def test_whole_numbers_become_floats():
    """transformers refuses a whole number where it wants a float, so none may be written."""
    config = read({"rms_norm_eps": 1, "rope_theta": 500000, "rope_scaling": {"type": "linear", "factor": 2}})
    assert isinstance(config.rms_norm_eps, float) and isinstance(config.rope_theta, float)
    assert isinstance(config.rope_scaling.factor, float)
    assert translated(transformers.LlamaConfig.from_dict(config.to_hf())) == fields(config)


# Presets


#: Parameters as published with the weights: a tied head counts once.
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def test_every_released_preset_has_its_published_size():
    assert {
        name: weight_map(config).parameters
        for name, config in PRESETS.items()
        if name not in ("llama-10m", "llama-tiny")
    } == PUBLISHED


@pytest.mark.parametrize("name", presets())
def test_parameters_match_the_module(name):
    config = preset(name)
    module = importlib.import_module(f"torch_models.{config.architecture}")
    with torch.device("meta"):
        model = getattr(module, config.model_class)(config)
    table = weight_map(config)
    assert sum(p.numel() for p in model.parameters()) == table.parameters
    expected = {name: leaf.shape("torch") for name, leaf in table.leaves("torch").items()}
    assert {name: tuple(x.shape) for name, x in model.state_dict().items()} == expected


def test_no_two_dimensions_of_the_tiny_preset_agree():
    c = preset("llama-tiny")
    sizes = [
        c.vocab_size,
        c.hidden_size,
        c.intermediate_size,
        c.num_hidden_layers,
        c.num_attention_heads,
        c.num_key_value_heads,
        c.head_dim,
        c.num_attention_heads * c.head_dim,
        c.num_key_value_heads * c.head_dim,
        c.num_attention_heads // c.num_key_value_heads,
    ]
    # Three layers of three query heads per key-value head: the counts of layers and groups are no axes.
    assert len(set(sizes)) >= len(sizes) - 1


# Refusals


def scaled(**changes):
    full = {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 512}
    return {"rope_scaling": {**full, **changes}}


#: What the file holds, the field that the error names, and what it says was found.
REFUSED = {
    "activation": ({"hidden_act": "gelu"}, "hidden_act", "'gelu'"),
    "attention bias": ({"attention_bias": True}, "attention_bias", "True"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias", "True"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config", "'gptq'"),
    "quantised oddly": ({"quantization_config": 4}, "quantization_config", "4"),
    "interleaved": ({"rope_interleaved": True}, "rope_interleaved", "True"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "0.5"),
    "partial rotation inside": (
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
        "partial_rotary_factor",
        "0.25",
    ),
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 32}}, "rope_type", "'yarn'"),
    "dynamic": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type", "'dynamic'"),
    "type of a wrong type": (
        {"rope_scaling": {"type": ["linear"], "factor": 2.0}},
        "rope_type",
        "['linear']",
    ),
    "unknown part of a scaling": (scaled(attention_factor=2.0), "rope_scaling.attention_factor", "2.0"),
    "a scaling for each kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}},
        "rope_parameters.full_attention",
        "linear",
    ),
    "scaling is a text": ({"rope_scaling": "linear"}, "rope_scaling", "'linear'"),
    "parameters are a list": ({"rope_parameters": [1]}, "rope_parameters", "[1]"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor", "None"),
    "factor is a text": ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor", "'2'"),
    "factor is true": ({"rope_scaling": {"type": "linear", "factor": True}}, "rope_scaling.factor", "True"),
    "factor is huge": (scaled(factor=10**400), "rope_scaling.factor", "1000"),
    "factor is zero": (scaled(factor=0.0), "rope_scaling.factor", "0.0"),
    "half a position": (
        scaled(original_max_position_embeddings=0.5),
        "rope_scaling.original_max_position_embeddings",
        "0.5",
    ),
    "empty bands": (scaled(high_freq_factor=1.0), "rope_scaling", "1.0 and 1.0"),
    "no low band": (scaled(low_freq_factor=None), "rope_scaling.low_freq_factor", "None"),
    "text for a number": ({"hidden_size": "4096"}, "hidden_size", "'4096'"),
    "true for a number": ({"num_hidden_layers": True}, "num_hidden_layers", "True"),
    "float for a count": ({"vocab_size": 32000.0}, "vocab_size", "32000.0"),
    "list for a number": ({"num_attention_heads": [4]}, "num_attention_heads", "[4]"),
    "number for a truth": ({"tie_word_embeddings": 1}, "tie_word_embeddings", "1"),
    "negative": ({"intermediate_size": -1}, "intermediate_size", "-1"),
    "zero heads": ({"num_attention_heads": 0}, "num_attention_heads", "0"),
    "huge": ({"vocab_size": 2**62}, "vocab_size", str(2**62)),
    "more layers than memory": ({"num_hidden_layers": 10**9}, "num_hidden_layers", str(10**9)),
    "huge theta": ({"rope_theta": 10**400}, "rope_theta", "1000"),
    "tiny theta": ({"rope_theta": 5e-324}, "rope_theta", "5e-324"),
    "infinite": ({"rms_norm_eps": math.inf}, "rms_norm_eps", "inf"),
    "not a number": ({"rope_theta": math.nan}, "rope_theta", "nan"),
    "zero epsilon": ({"rms_norm_eps": 0.0}, "rms_norm_eps", "0.0"),
    "theta is a text": ({"rope_theta": "1e4"}, "rope_theta", "'1e4'"),
    "theta is true": ({"rope_parameters": {"rope_theta": True}}, "rope_theta", "True"),
    "uneven groups": ({"num_attention_heads": 32, "num_key_value_heads": 5}, "num_key_value_heads", "5"),
    "odd head": ({"head_dim": 33}, "head_dim", "33"),
    # transformers refuses it as well, so a folder with it could not be loaded there.
    "hidden size no multiple of the heads": (
        {"hidden_size": 50, "num_attention_heads": 4},
        "hidden_size",
        "50",
    ),
    "another architecture": ({"model_type": "mamba"}, "model_type", "'mamba'"),
    "no architecture": ({"model_type": None}, "model_type", "None"),
    "architecture is a list": ({"model_type": ["llama"]}, "model_type", "['llama']"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    raw, field, found = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        config_from_hf(json.loads(json.dumps({"model_type": "llama", **raw})), "some/config.json")
    error = caught.value
    assert error.where.startswith("some/config.json: ") and error.where.endswith(field)
    assert found in error.found
    assert (
        error.expected or error.hint or error.problem == "the configuration asks for what is not implemented"
    )
    assert len(str(error)) < 1000


@pytest.mark.parametrize("layers", [MAX_LAYERS, MAX_LAYERS + 1])
def test_the_deepest_model_is_bounded(layers):
    if layers <= MAX_LAYERS:
        assert read({"num_hidden_layers": layers}).num_hidden_layers == layers
    else:
        with pytest.raises(ConfigError, match="num_hidden_layers"):
            read({"num_hidden_layers": layers})


# GGUF's metadata


def gguf(divisors=None, **metadata):
    """Metadata and headers of a small file, with its rotary divisors if it has any."""
    given = {
        "general.architecture": "llama",
        "llama.embedding_length": 96,
        "llama.feed_forward_length": 64,
        "llama.block_count": 2,
        "llama.attention.head_count": 3,
        "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
        "llama.context_length": 128,
        **{f"llama.{key.replace('__', '.')}": value for key, value in metadata.items()},
    }
    tensors = {"token_embd.weight": TensorInfo((7, 96), "float32", "m.gguf")}
    if divisors is not None:
        tensors["rope_freqs.weight"] = TensorInfo(divisors.shape, "float32", "m.gguf")
    return config_from_gguf(given, tensors, lambda name: divisors, "m.gguf")


def divisors(factor):
    """What Llama 3's scaling divides each frequency by, from transformers' own angles."""
    theirs = {"rope_theta": 5e5, "hidden_size": 96, "num_attention_heads": 3}
    scaling = {"rope_type": "llama3", **LLAMA3, "factor": factor, "original_max_position_embeddings": 8192}
    plain, scaled = (
        LlamaRotaryEmbedding(transformers.LlamaConfig.from_dict({**theirs, "rope_scaling": s})).inv_freq
        for s in (None, scaling)
    )
    return (plain / scaled).numpy()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_divisors_of_llama3_are_recognised(factor):
    found = gguf(divisors(factor), rope__freq_base=5e5).rope_scaling
    expected = {"rope_type": "llama3", **LLAMA3, "factor": factor, "original_max_position_embeddings": 8192}
    assert found.to_dict() == expected


def test_metadata_is_kept_verbatim():
    config = gguf(rope__freq_base=5e5, rope__scaling__type="linear", rope__scaling__factor=4.0)
    assert (config.rms_norm_eps, config.rope_theta) == (9.999999747378752e-06, 5e5)
    assert config.rope_scaling == RopeScaling(rope_type="linear", factor=4.0)
    assert config.tie_word_embeddings and config.num_key_value_heads == 3 and config.head_dim == 32
    assert gguf(rope__scale_linear=2.0).rope_scaling == RopeScaling(rope_type="linear", factor=2.0)


DIVISORS = divisors(8.0)
GGUF_REFUSED = {
    "heads per layer": (None, {"attention__head_count": [3, 3]}, "num_attention_heads"),
    "no layers": (None, {"block_count": None}, "llama.block_count"),
    "experts": (None, {"expert_count": 8}, "llama.expert_count"),
    "yarn": (None, {"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0}, "rope_scaling.rope_type"),
    "half of each head turns": (None, {"rope__dimension_count": 16}, "llama.rope.dimension_count"),
    "zero theta": (DIVISORS, {"rope__freq_base": 0.0}, "rope_theta"),
    "infinite theta": (DIVISORS, {"rope__freq_base": math.inf}, "rope_theta"),
    "enormous head": (DIVISORS, {"attention__key_length": 2**38}, "rope_freqs.weight"),
    "one divisor changed": (np.append(DIVISORS[:-1], 7.9), {"rope__freq_base": 5e5}, "rope_freqs.weight"),
    "another theta": (DIVISORS, {"rope__freq_base": 4e5}, "rope_freqs.weight"),
    "too few divisors": (DIVISORS[1:], {"rope__freq_base": 5e5}, "rope_freqs.weight"),
    "no divisors": (DIVISORS[:0], {"rope__freq_base": 5e5}, "rope_freqs.weight"),
    "not a number": (np.append(np.nan, DIVISORS[1:]), {"rope__freq_base": 5e5}, "rope_freqs.weight"),
    "zero divisor": (np.append(DIVISORS[:-1], 0.0), {"rope__freq_base": 5e5}, "rope_freqs.weight"),
}


@pytest.mark.parametrize("name", GGUF_REFUSED)
def test_gguf_is_refused_by_name(name):
    given, metadata, field = GGUF_REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        gguf(given, **metadata)
    assert caught.value.where == f"m.gguf: {field}"
