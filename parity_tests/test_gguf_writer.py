"""GGUF as an output: tensors and logits against transformers, bytes against the gguf package, tokenizers."""

from __future__ import annotations

import hashlib
import json
import logging
import unicodedata
import weakref
from dataclasses import replace

import gguf
import ml_dtypes
import numpy as np
import pytest
import test_gguf
import tokenizers
import torch
from test_gguf import TEXTS, random_texts, sentencepiece_metadata, train_byte_level
from tokenizers import normalizers

from twinformers.checkpoints.dtypes import Ledger
from twinformers.checkpoints.gguf import GGUFCheckpoint
from twinformers.checkpoints.gguf_tokenizer import tokenizer_assets
from twinformers.checkpoints.gguf_tokenizer_writer import tokenizer_metadata
from twinformers.checkpoints.gguf_writer import gguf_plan, write_gguf
from twinformers.checkpoints.porting import convert, entries, port, written
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.checkpoints.safetensors_io import Entry
from twinformers.checkpoints.sources import open_checkpoint
from twinformers.configs import RopeScaling, preset
from twinformers.errors import ConfigError, DestinationError, FormatError, TwinformersError, WeightsError

sentencepiece_model = test_gguf.sentencepiece_model
demo = test_gguf.demo

TINY = preset("llama-tiny").replace(rope_scaling=None)  # transformers reads no scaling from a GGUF


class Source(PresetCheckpoint):
    """Seeded weights of any configuration, with any tokenizer."""

    def __init__(self, config=TINY, assets=None):
        super().__init__("models/tiny", config, 0)
        self._assets = assets or {}

    @property
    def assets(self):
        return self._assets


def save(checkpoint, path, dtype="keep"):
    plan = entries(checkpoint, "gguf", dtype) + written(checkpoint, "gguf", "float32")
    write_gguf(path, checkpoint, gguf_plan(plan), Ledger())
    return path


# Tensors and hyper-parameters


def read_by_transformers(path):
    """The model by transformers' own reader, without `from_pretrained`, which wants accelerate."""
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.LlamaConfig(**load_gguf_checkpoint(path)["config"])
    model = transformers.LlamaForCausalLM(config)
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(tensors)
    return model.eval()


def test_logits_match_transformers(tmp_path):
    import transformers

    port(Source(), tmp_path / "hf", to="hf")
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    read = read_by_transformers(save(Source(), tmp_path / "m.gguf"))
    tokens = torch.randint(3, TINY.vocab_size, (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = original(tokens).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(read(tokens).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bytes_match_the_gguf_reader(dtype, tmp_path):
    numpy_type = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    source = Source()
    reader = gguf.GGUFReader(save(source, tmp_path / "m.gguf", dtype))
    expected = {e.name: e.produce() for e in entries(source, "gguf", "keep")}
    assert [t.name for t in reader.tensors] == list(expected)
    for tensor in reader.tensors:
        value = expected[tensor.name]
        one = value.ndim == 1
        kind = "F32" if one else {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
        assert tensor.tensor_type.name == kind
        assert tuple(tensor.shape) == value.shape[::-1]
        assert tensor.data.tobytes() == value.astype(np.float32 if one else numpy_type).tobytes()
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.name"] == "tiny"
    assert fields["general.file_type"] == {"float32": 0, "float16": 1, "bfloat16": 32}[dtype]
    assert fields["llama.context_length"] == TINY.max_position_embeddings
    assert fields["llama.rope.freq_base"] == TINY.rope_theta
    assert fields["llama.attention.head_count_kv"] == TINY.num_key_value_heads
    assert (
        fields["llama.attention.key_length"] == TINY.head_dim != TINY.hidden_size / TINY.num_attention_heads
    )


def test_norms_are_not_rounded_on_their_way_to_float32(tmp_path):
    source = Source()
    with GGUFCheckpoint(save(source, tmp_path / "m.gguf", "bfloat16")) as read:
        given = {e.name: e.produce() for e in entries(source, "gguf", "keep")}["output_norm.weight"]
        assert not np.array_equal(given, given.astype(ml_dtypes.bfloat16).astype(np.float32))
        np.testing.assert_array_equal(read.read("output_norm.weight"), given)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rotary_divisors_match_transformers(factor, tmp_path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = RopeScaling(
        rope_type="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=100,
    )
    config = TINY.replace(rope_scaling=scaling)
    raw = config.to_hf()
    theirs = LlamaConfig(**{k: v for k, v in raw.items() if k not in ("architectures", "rope_scaling")})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    plain = TINY.rope_theta ** -(np.arange(0, TINY.head_dim, 2) / TINY.head_dim)
    path = save(Source(config), tmp_path / "m.gguf", "float16")
    (tensor,) = (t for t in gguf.GGUFReader(path).tensors if t.name == "rope_freqs.weight")
    assert tensor.tensor_type.name == "F32"
    assert max(tensor.data) == factor > sorted(tensor.data)[1] > min(tensor.data) == 1.0
    np.testing.assert_allclose(tensor.data, plain / scaled.numpy(), rtol=1e-6)
    with GGUFCheckpoint(path) as read:
        assert read.config == config.replace(rms_norm_eps=read.config.rms_norm_eps)


def test_configurations_survive():
    for config in (
        TINY,
        TINY.replace(rope_scaling=RopeScaling(rope_type="linear", factor=2.5)),
        preset("llama2-7b"),
        preset("llama3.1-8b").replace(num_hidden_layers=1),
        preset("smollm2-135m"),
    ):
        tensors = {"token_embd.weight": np.empty((config.vocab_size, 1))}
        if not config.tie_word_embeddings:
            tensors["output.weight"] = tensors["token_embd.weight"]
        if config.rope_scaling and config.rope_scaling.rope_type == "llama3":
            tensors["rope_freqs.weight"] = np.array(config.rotary_divisors, np.float32)
        assert type(config).from_gguf(config.to_gguf(), tensors, tensors.get, "m.gguf") == config


def test_tensors_are_let_go(tmp_path):
    """Each array must be gone when the next one is made: the library could keep what it is given."""
    source, alive, most = Source(), weakref.WeakSet(), 0

    class Watched(np.ndarray):
        pass

    def watched(entry):
        def produce():
            nonlocal most
            most = max(most, len(alive))
            array = entry.produce().copy().view(Watched)
            alive.add(Held(array))
            return array

        return replace(entry, produce=produce)

    class Held:
        def __init__(self, array):
            array.held = self

    plan = gguf_plan([watched(e) for e in entries(source, "gguf", "keep")])
    write_gguf(tmp_path / "m.gguf", source, plan, Ledger())
    assert len(plan) > 10
    assert most == 0


def test_quantised_demo_becomes_float16(demo, tmp_path):
    with GGUFCheckpoint(demo) as source, GGUFCheckpoint(save(source, tmp_path / "m.gguf", "float16")) as read:
        assert read.config == source.config
        assert read.assets == source.assets
        assert read.tensors.keys() == source.tensors.keys()
        for name, info in read.tensors.items():
            expected = source.read(name).astype(info.dtype)
            np.testing.assert_array_equal(read.read(name), expected)
        assert {i.dtype for i in read.tensors.values() if len(i.shape) == 2} == {"float16"}


def test_demo_comes_back_from_a_gguf_bit_for_bit(demo, tmp_path):
    port(demo, tmp_path / "hf", to="hf", dtype="float32")
    with open_checkpoint(tmp_path / "hf") as original:
        path = save(original, tmp_path / "m.gguf")
        with open_checkpoint(path) as read:
            back = convert(read, "hf")
            count = 0
            for (name, value), (other, expected) in zip(back, convert(original, "hf"), strict=True):
                assert name == other
                assert value.tobytes() == expected.tobytes(), name
                count += 1
            assert count == 272
            for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
                assert read.assets[name] == original.assets[name]


# Through `port`


def test_port_writes_what_the_writer_writes(tmp_path):
    result = port(Source(), tmp_path / "a.gguf", to="gguf", dtype="bfloat16")
    assert (tmp_path / "a.gguf").read_bytes() == save(Source(), tmp_path / "b.gguf", "bfloat16").read_bytes()
    assert result.dtypes == {"bfloat16": 23, "float32": 7}
    assert result.losses["bfloat16"].relative > 1e-3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "a.gguf.sha256", "b.gguf"]
    digest = hashlib.sha256((tmp_path / "a.gguf").read_bytes()).hexdigest()
    assert result.files == {"a.gguf": digest}
    with open_checkpoint(tmp_path / "a.gguf", check=True) as read:
        assert read.config.num_hidden_layers == TINY.num_hidden_layers


def test_port_replaces_a_file_only_when_asked(tmp_path):
    dest = tmp_path / "m.gguf"
    port(Source(), dest, to="gguf")
    before = dest.read_bytes()
    with pytest.raises(DestinationError, match="exists"):
        port(Source(), dest, to="gguf", dtype="float16")
    # The source of this port is the file itself.
    with pytest.raises(DestinationError, match="is the source"):
        port(dest, dest, to="gguf", dtype="float16", overwrite=True)
    assert dest.read_bytes() == before
    port(Source(), dest, to="gguf", dtype="float16", overwrite=True)
    assert len(dest.read_bytes()) < len(before) * 0.7


@pytest.mark.parametrize(
    "source, options, message",
    [
        (Source(), {"dtype": "float64"}, "does not compute"),
        (Source(preset("transformer-tiny")), {}, "no (such )?form"),
        (Source(TINY.replace(max_position_embeddings=2**33)), {}, "cannot hold"),
    ],
)
def test_nothing_is_left_of_a_refused_port(source, options, message, tmp_path):
    with pytest.raises(TwinformersError, match=message):
        port(source, tmp_path / "m.gguf", to="gguf", **options)
    assert not list(tmp_path.iterdir())


def test_other_names_than_a_gguf_files_are_refused(tmp_path):
    with pytest.raises(DestinationError, match=r"\.gguf"):
        port(Source(), tmp_path / "folder", to="gguf")
    assert not list(tmp_path.iterdir())


def test_command_line_writes_a_gguf(tmp_path, capfd):
    from twinformers.cli.app import run

    dest = tmp_path / "m.gguf"
    assert run(["port", "preset:llama-tiny@3", str(dest), "--to", "gguf", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["format"] == "gguf"
    assert [t.name for t in gguf.GGUFReader(dest).tensors][-1] == "rope_freqs.weight"


# Refusals


def test_float64_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    with pytest.raises(WeightsError, match="does not compute"):
        save(Source(), path, "float64")
    wide = Entry("blk.0.ffn_up.weight", (2, 3), "float64", lambda: np.zeros((2, 3)))
    with pytest.raises(WeightsError, match="float64") as caught:
        gguf_plan([wide])
    assert caught.value.where == wide.name
    assert not path.exists()


def test_architectures_without_a_form_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no form in GGUF"):
        preset("transformer-tiny").to_gguf()
    with pytest.raises((ConfigError, WeightsError), match=r"no (such )?form"):
        save(Source(preset("transformer-tiny")), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"low_freq_factor": 2.0},
        {"high_freq_factor": 5.0},
        {"original_max_position_embeddings": 100_000},  # no pair is divided by the whole factor
    ],
)
def test_scaling_that_could_not_be_read_back_is_refused(change):
    scaling = replace(preset("llama-tiny").rope_scaling, **change)
    with pytest.raises(ConfigError, match="rope_scaling"):
        TINY.replace(rope_scaling=scaling).to_gguf()


def test_values_beyond_the_format_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot hold") as caught:
        save(Source(TINY.replace(max_position_embeddings=2**33)), tmp_path / "m.gguf")
    assert caught.value.where == "llama.context_length"
    assert not list(tmp_path.iterdir())


# Tokenizers


def byte_level(pre, **keys):
    _, metadata = train_byte_level(pre)
    return tokenizer_assets(metadata | {f"tokenizer.ggml.{k}": v for k, v in keys.items()}, "m.gguf")


def trained(pre):
    """Assets of a tokenizer as its makers would publish it, special tokens outside of the vocabulary."""
    original, _ = train_byte_level(pre)
    original.add_special_tokens(["<|begin|>", "<|end|>", "<|turn|>"])
    original.add_tokens([tokenizers.AddedToken("<think>", normalized=True)])
    state = json.loads(original.to_str())
    state["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    del state["model"]["ignore_merges" if pre != "llama-bpe" else "dropout"]
    state["model"]["merges"] = [" ".join(merge) for merge in state["model"]["merges"]]
    ids = {token["content"]: token["id"] for token in state["added_tokens"]}
    generation = {"bos_token_id": 0, "eos_token_id": [ids["<|turn|>"], ids["<|end|>"]]}
    config = {
        "bos_token": "<|begin|>",
        "eos_token": {"content": "<|end|>"},
        "chat_template": "{{ messages }}",
    }
    return {
        "tokenizer.json": json.dumps(state).encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "generation_config.json": json.dumps(generation).encode(),
    }


@pytest.fixture(scope="module")
def spaced(sentencepiece_model):
    return tokenizer_assets(sentencepiece_metadata(sentencepiece_model), "m.gguf")


def backend(assets):
    return tokenizers.Tokenizer.from_buffer(assets["tokenizer.json"])


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe"])
def test_byte_level_tokenizer_survives(pre, tmp_path):
    assets = trained(pre)
    size = backend(assets).get_vocab_size() + 5  # rows of the embedding beyond the vocabulary
    path = save(Source(TINY.replace(vocab_size=size), assets), tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert fields["tokenizer.ggml.pre"] == pre
    given = backend(assets).get_vocab()
    tokens = sorted(given, key=given.get)
    assert fields["tokenizer.ggml.tokens"] == [*tokens, *(f"[PAD{size - n}]" for n in range(5, 0, -1))]
    types = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    odd = {token: kind for token, kind in types.items() if kind != 1}
    assert odd == {"<|begin|>": 3, "<|end|>": 3, "<|turn|>": 3, "<think>": 4} | {
        t: 5 for t in list(types)[-5:]
    }
    assert fields["tokenizer.ggml.eos_token_id"] == given["<|end|>"]
    assert fields["tokenizer.ggml.eot_token_id"] == given["<|turn|>"]
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    with GGUFCheckpoint(path) as read:
        ours = backend(read.assets)
        generation = json.loads(read.assets["generation_config.json"])
    for text in [*TEXTS, *random_texts(50), "<|begin|>a<|end|><think><think >"]:
        assert ours.encode(text).ids == backend(assets).encode(text).ids
        assert ours.encode(text).ids == ours.encode(text, add_special_tokens=False).ids
    assert generation["bos_token_id"] == 0
    assert generation["eos_token_id"] == [given["<|end|>"], given["<|turn|>"]]


def test_sentencepiece_tokenizer_survives(spaced, sentencepiece_model, tmp_path):
    size = backend(spaced).get_vocab_size()
    path = save(Source(TINY.replace(vocab_size=size), spaced), tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    original = sentencepiece_metadata(sentencepiece_model)
    for key in ("model", "pre", "tokens", "token_type"):
        assert fields[f"tokenizer.ggml.{key}"] == original[f"tokenizer.ggml.{key}"]
    # The scores are others, but in the same order wherever a merge makes the token.
    scores = fields["tokenizer.ggml.scores"]
    theirs = original["tokenizer.ggml.scores"]
    merged = {"".join(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]}
    made = [i for i, token in enumerate(original["tokenizer.ggml.tokens"]) if token in merged]
    assert len(made) > 100
    assert sorted(made, key=lambda i: scores[i]) == sorted(made, key=lambda i: theirs[i])
    with GGUFCheckpoint(path) as read:
        assert read.assets["tokenizer.json"] == spaced["tokenizer.json"]
        assert read.assets["generation_config.json"] == spaced["generation_config.json"]
        # Without the merges, as llama.cpp reads it, it is the same tokenizer.
        metadata = {k: v for k, v in read.metadata.items() if k != "tokenizer.ggml.merges"}
    assert tokenizer_assets(metadata, "m.gguf")["tokenizer.json"] == spaced["tokenizer.json"]


def test_byte_level_tokenizer_matches_transformers(tmp_path):
    import transformers

    for pre in ("gpt-2", "smollm", "llama-bpe"):
        assets = trained(pre)
        file = f"{pre}.gguf"
        source = Source(TINY.replace(vocab_size=backend(assets).get_vocab_size()), assets)
        save(source, tmp_path / file)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file)
        if pre == "smollm":  # transformers overlooks that it splits digits
            theirs.backend_tokenizer.pre_tokenizer = backend(assets).pre_tokenizer
        assert theirs.bos_token == "<|begin|>" and theirs.eos_token == "<|end|>"
        assert theirs.chat_template == "{{ messages }}"
        for text in [*TEXTS, *random_texts(50), "<|begin|>a<|end|><think><think >"]:
            if "<|endoftext|>" in text:  # which transformers adds to every such vocabulary
                continue
            assert theirs(text)["input_ids"] == backend(assets).encode(text).ids, (pre, text)


def test_sentencepiece_tokenizer_matches_transformers(spaced, tmp_path):
    import transformers

    save(Source(TINY.replace(vocab_size=backend(spaced).get_vocab_size()), spaced), tmp_path / "m.gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    # transformers takes every such vocabulary for one whose prefix space comes first in the text only.
    theirs.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    theirs.backend_tokenizer.pre_tokenizer = None
    for text in filter(None, TEXTS + random_texts(50)):
        assert theirs(text)["input_ids"] == backend(spaced).encode(text).ids, text


def test_demo_matches_transformers(demo, tmp_path):
    import transformers

    with GGUFCheckpoint(demo) as source:
        metadata = tokenizer_metadata(source.assets, source.config.vocab_size, "demo")
        # The weights are not needed for a tokenizer.
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
        for key, value in metadata.items():
            kinds = {bool: "BOOL", int: "UINT32", str: "STRING", list: "ARRAY"}
            writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])
        for key, value in source.config.to_gguf().items():
            writer.add_key_value(
                key, value, gguf.GGUFValueType[{int: "UINT32", float: "FLOAT32"}[type(value)]]
            )
        writer.add_string("general.name", "demo")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
        ours = backend(source.assets)
    plain = [
        t
        for t in TEXTS + random_texts()
        if t.isascii() or not any(unicodedata.category(c)[0] == "N" for c in t)
    ]
    assert len(plain) > 50
    for text in plain:
        assert theirs(text)["input_ids"] == ours.encode(text).ids, text


def changed(assets, change):
    state = json.loads(assets["tokenizer.json"])
    change(state)
    return {**assets, "tokenizer.json": json.dumps(state).encode()}


def setting(*path, value):
    def change(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


def part_merges(state):
    """Let one of the ways to put a token together come last, all other tokens' before it."""
    merges = state["model"]["merges"]
    whole = ["".join(merge) for merge in merges]
    merges.append(merges.pop(next(i for i, token in enumerate(whole) if whole.count(token) > 1)))


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
CLS = {
    "type": "RobertaProcessing",
    "sep": ["<|end|>", 1],
    "cls": ["<|begin|>", 0],
    "trim_offsets": True,
    "add_prefix_space": False,
}
INEXPRESSIBLE = {
    "a normalizer": (setting("normalizer", value={"type": "NFC"}), "normalizer"),
    "another split": (setting("pre_tokenizer", "use_regex", value=False), "pre_tokenizer"),
    "a prefix space": (setting("pre_tokenizer", "add_prefix_space", value=True), "pre_tokenizer"),
    "a classifier": (setting("post_processor", value=CLS), "post_processor"),
    "another decoder": (setting("decoder", value={"type": "Fuse"}), "decoder"),
    "a token that eats spaces": (setting("added_tokens", 1, "lstrip", value=True), "added_tokens"),
    "a token of whole words": (setting("added_tokens", 0, "single_word", value=True), "added_tokens"),
    "no merges": (setting("model", "merges", value=[]), "model.merges"),
    "dropout": (setting("model", "dropout", value=0.1), "model"),
    "an unknown token": (setting("model", "unk_token", value="<|end|>"), "model"),
    "whole words first": (setting("model", "ignore_merges", value=True), "model"),
    "a named token that is not special": (setting("added_tokens", value=[]), "added_tokens"),
}


@pytest.mark.parametrize("case", INEXPRESSIBLE)
def test_inexpressible_tokenizer_is_refused(case):
    change, part = INEXPRESSIBLE[case]
    assets = byte_level("gpt-2")
    tokenizer_metadata(assets, 420, "m")  # as it is, it can be expressed
    with pytest.raises(FormatError, match=f"no words for this part of the tokenizer: {part}\n") as caught:
        tokenizer_metadata(changed(assets, change), 420, "folder")
    assert caught.value.where == "folder: tokenizer.json"
    assert caught.value.expected != caught.value.found


INEXPRESSIBLE_SPACED = {
    "metaspace": (setting("pre_tokenizer", value=METASPACE), "pre_tokenizer"),
    "a space to strip": (setting("decoder", "decoders", 3, "start", value=2), "decoder"),
    "a normalized token": (setting("added_tokens", 1, "normalized", value=True), "added_tokens"),
    "merges in another order": (part_merges, "model.merges"),
    "a merge less": (lambda state: state["model"]["merges"].pop(), "model.merges"),
    "unknown tokens one by one": (setting("model", "fuse_unk", value=False), "model"),
}


@pytest.mark.parametrize("case", INEXPRESSIBLE_SPACED)
def test_inexpressible_sentencepiece_tokenizer_is_refused(case, spaced):
    change, part = INEXPRESSIBLE_SPACED[case]
    with pytest.raises(FormatError, match=f"no words for this part of the tokenizer: {part}\n"):
        tokenizer_metadata(changed(spaced, change), 600, "folder")


def test_more_ends_than_gguf_has_names_for_are_refused():
    assets = byte_level("gpt-2")
    for ends, fits in (([1, 2, 3], True), ([1, 2, 3, 4], False)):
        assets["generation_config.json"] = json.dumps({"bos_token_id": 0, "eos_token_id": ends}).encode()
        if fits:
            metadata = tokenizer_metadata(assets, 420, "m")
            assert [metadata[f"tokenizer.ggml.{n}_token_id"] for n in ("eos", "eot", "eom")] == ends
        else:
            with pytest.raises(FormatError, match="the tokens that end"):
                tokenizer_metadata(assets, 420, "m")


def test_tokenizer_larger_than_the_model_is_refused():
    with pytest.raises(FormatError, match=r"model\.vocab"):
        tokenizer_metadata(byte_level("gpt-2"), 419, "m")


def test_other_kinds_of_tokenizers_are_refused():
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram([("a", 0.0)], 0))
    with pytest.raises(FormatError, match=r"model\.type"):
        tokenizer_metadata({"tokenizer.json": unigram.to_str().encode()}, 9, "m")
    with pytest.raises(FormatError, match="not read here") as caught:
        tokenizer_metadata({"tokenizer.model": b"\n"}, 9, "m")
    assert caught.value.found == "tokenizer.model"


def test_without_a_tokenizer_the_file_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        path = save(Source(), tmp_path / "m.gguf")
    assert "no tokenizer" in caplog.text
    with GGUFCheckpoint(path) as read:
        assert read.metadata["tokenizer.ggml.model"] == "no_vocab"
        assert read.assets == {}


def test_chat_template_that_is_no_unicode_is_refused():
    assets = byte_level("gpt-2")
    config = json.loads(assets["tokenizer_config.json"]) | {"chat_template": "\ud800"}
    assets["tokenizer_config.json"] = json.dumps(config).encode()
    with pytest.raises(FormatError, match="chat_template"):
        tokenizer_metadata(assets, 420, "m")
