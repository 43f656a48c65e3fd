"""Texts as vectors: of a small BERT with a tokenizer of its own, and of all-MiniLM-L6-v2."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest
from test_cli import SCRIPT

import twinformers
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.configs import preset
from twinformers.embedding import padded
from twinformers.errors import SourceError, UsageError

WORDS = ["the", "a", "cat", "kitten", "dog", "sat", "ran", "on", "mat", "road", "car", "red", "##s", "##ing"]
TEXTS = ["The cats sat on a mat", "the kitten ran", "a red car on the road running cats"]
#: Sentences of which the first two mean nearly the same.
REAL = [
    "A man is eating food.",
    "A man eats a piece of bread.",
    "The girl is carrying a baby.",
    "Two teams play football in the rain, and the crowd at the side of the field shouts until it is over.",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny BERT, with WordPiece as BERT's own tokenizer does it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    place = tmp_path_factory.mktemp("embedding") / "model"
    vocabulary = {t: n for n, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    twinformers.port(PresetCheckpoint("test", preset("bert-tiny")), place, to="hf")
    tokenizer.save(str(place / "tokenizer.json"))
    return place


def by_transformers(folder, texts, pooling="mean"):
    """What transformers and its own tokenizer make of each text alone: no padding at all."""
    import torch
    import transformers
    from tokenizers import Tokenizer

    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    rows = []
    with torch.inference_mode():
        for text in texts:
            hidden = model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0].numpy()
            row = hidden.mean(0) if pooling == "mean" else hidden[0]
            rows.append(row / np.linalg.norm(row))
    return np.stack(rows)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_vectors_are_those_of_transformers(pooling, folder):
    expected = by_transformers(folder, TEXTS, pooling)
    results = twinformers.embed(folder, TEXTS, framework="both", pooling=pooling)
    assert [r.framework for r in results] == ["jax", "torch"]
    for r in results:
        assert r.vectors.dtype == np.float32 and np.abs(r.vectors - expected).max() <= 1e-5
        np.testing.assert_allclose(np.diag(r.similarities), 1, atol=1e-6)
    (alone,) = twinformers.embed(folder, TEXTS[1], framework="torch", pooling=pooling)
    assert np.abs(alone.vectors[0] - expected[1]).max() <= 1e-5


def test_rows_are_filled_up_on_the_right():
    tokens, positions = padded([[5, 6], [7], [8, 9, 1]])
    assert tokens.tolist() == [[5, 6, 0], [7, 0, 0], [8, 9, 1]]
    assert positions.tolist() == [[0, 1, -1], [0, -1, -1], [0, 1, 2]]


@pytest.mark.parametrize(
    ("source", "options", "error", "said"),
    [
        ("folder", {"framework": "numpy"}, UsageError, "jax, torch or both"),
        ("folder", {"pooling": "max"}, UsageError, "mean or first"),
        ("folder", {"text": []}, UsageError, "at least one text"),
        ("folder", {"text": ["a", "cat " * 400]}, UsageError, "text 2.*340 tokens.*402"),
        ("preset:bert-tiny", {}, SourceError, "tokenizer"),
        ("demo", {}, UsageError, "an encoder"),
    ],
)
def test_what_cannot_be_embedded_is_refused(source, options, error, said, folder):
    given = {"text": TEXTS, **options}
    with pytest.raises(error, match=f"(?s){said}"):
        twinformers.embed(folder if source == "folder" else source, given.pop("text"), **given)


def run(*arguments):
    return subprocess.run([SCRIPT, "embed", *map(str, arguments)], capture_output=True, text=True)


def test_the_verb(folder):
    texts = [x for t in TEXTS for x in ("--text", t)]
    done = run(folder, *texts, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["texts"] == TEXTS and 0 < told["largest_difference"] < 1e-5
    assert [o["framework"] for o in told["outputs"]] == ["jax", "torch"]
    assert np.shape(told["outputs"][0]["vectors"]) == (3, 40)
    shown = run(folder, *texts, "--framework", "torch")
    row = told["outputs"][1]["similarities"][0]
    assert shown.returncode == 0 and all(f"{x:.4f}" in shown.stdout for x in row)
    wrong = run(folder, *texts, "--pooling", "max")
    assert wrong.returncode == 2 and wrong.stdout == "" and wrong.stderr.startswith("error:")
    assert "Traceback" not in wrong.stderr


# all-MiniLM-L6-v2


def test_minilm_matches_transformers():
    """Real weights, in float64: both twins, every submodule."""
    checks = ["logits", "activations", "reference"]
    report = twinformers.verify("demo:minilm", dtypes=["float64"], checks=checks)
    assert [r for r in report.checks if not r.ok] == []
    outputs = {(r.left, r.right): r.max_rel for r in report.checks if r.path == ""}
    assert set(outputs) == {("jax", "torch"), ("jax", "transformers"), ("torch", "transformers")}
    assert max(outputs.values()) <= 1e-12
    assert len({r.path for r in report.checks if r.check == "reference"}) == 1 + 6 * 11 - 6 + 4 + 1


def test_minilm_tells_what_means_the_same():
    from twinformers.checkpoints.sources import demo_path

    expected = by_transformers(demo_path("demo:minilm"), REAL)
    for r in twinformers.embed("demo:minilm", REAL, framework="both"):
        assert np.abs(r.vectors - expected).max() <= 2e-6
        assert r.similarities[0, 1] > 0.6 > 0.3 > r.similarities[0, 2]
