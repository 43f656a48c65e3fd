"""Training: data, schedule, loss, the two trainers against each other, resuming, and the command line."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from num2words import num2words

from twinformers.checkpoints.tokenizer import Tokenizer
from twinformers.cli.app import run as command
from twinformers.configs import preset
from twinformers.errors import DestinationError, FormatError, SourceError, UsageError
from twinformers.training import jax_trainer, torch_trainer
from twinformers.training.loop import train
from twinformers.training.numbers import HELD_OUT, Batches, held_out, held_out_numbers, spell, train_tokenizer
from twinformers.training.schedule import learning_rate
from twinformers.training.state import TrainSettings, TrainState, initial_weights, restore
from twinformers.translation import translate
from twinformers.weight_maps import weight_map

ROOT = Path(__file__).parent.parent
#: Small, no two dimensions alike, and with the vocabulary that names fill: few shapes for JAX to compile.
TINY = preset("transformer-tiny").replace(
    source_vocab_size=256, target_vocab_size=256, encoder_layers=1, decoder_layers=2
)
STEP_LIMIT = 1e-10
#: A run of a second or two.
QUICK = {"batch_size": 8, "warmup": 10, "dtype": "float64"}


@cache
def vocabulary():
    return train_tokenizer(TINY.source_vocab_size)


def tokenizer():
    return Tokenizer.from_assets({"tokenizer.json": vocabulary()}, "test")


def begun(**settings):
    kept = TrainSettings(**QUICK | settings)
    config = TINY.replace(dropout=kept.dropout)
    weights = initial_weights(config, kept.seed)
    zeros = {name: np.zeros_like(x) for name, x in weights.items()}
    return TrainState(kept, config, vocabulary(), weights, zeros, zeros)


# Data


def test_names_are_num2words_own():
    rng = np.random.default_rng(0)
    for n in [*range(0, 2100), 254, 100_000, 101_000, 999_999, *rng.integers(0, 1_000_000, 500).tolist()]:
        english = num2words(n, lang="en").replace(",", "").replace(" and ", " ")
        assert spell(n) == (english, num2words(n, lang="de"))
    assert spell(254) == ("two hundred fifty-four", "zweihundertvierundfünfzig")


def test_split_is_fixed_and_disjoint():
    kept = held_out_numbers()
    assert kept[:5] == [1009, 1098, 1168, 1633, 1713] and len(set(kept)) == len(kept) == 5038
    assert abs(len(kept) - 1_000_000 / HELD_OUT) < 5 * (1_000_000 / HELD_OUT) ** 0.5
    assert all(map(held_out, kept))
    batches = Batches(tokenizer(), TINY, 64, 0)
    drawn = Counter(n for step in range(320) for n in batches.numbers(step))
    assert sum(drawn.values()) == 320 * 64
    assert not set(drawn) & set(kept) and min(drawn) == 0 and 990_000 < max(drawn) < 1_000_000
    # Short names come often enough to be learned: a quarter of the draws has 1 to 6 digits evenly.
    assert abs(sum(c for n, c in drawn.items() if n < 1000) / sum(drawn.values()) - 0.125) < 0.01


def test_tokenizer_is_the_same_each_time_and_loses_nothing():
    again = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from twinformers.training.numbers import train_tokenizer as t;"
            f"sys.stdout.buffer.write(t({TINY.source_vocab_size}))",
        ],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    assert again.stdout == vocabulary()
    known = tokenizer()
    assert known.vocab_size == TINY.source_vocab_size
    for n in held_out_numbers()[:200]:
        for text in spell(n):
            ids = known.encode(text)
            assert known.decode(ids) == text and ids[-1] == TINY.eos_token_id
            assert not set(ids[:-1]) & {TINY.pad_token_id, TINY.eos_token_id, TINY.decoder_start_token_id}
    british = "Two hundred and fifty-four thousand, one hundred and one"
    assert known.encode(british) == known.encode("two hundred fifty-four thousand one hundred one")


def test_batches_depend_on_seed_and_step_alone():
    first, again = (Batches(tokenizer(), TINY, 8, 3) for _ in range(2))
    whole = [first[step] for step in range(40)]
    for step in (39, 5, 17, 16, 0):  # in any order
        for left, right in zip(whole[step], again[step], strict=True):
            assert np.array_equal(left, right)
    other = Batches(tokenizer(), TINY, 8, 4)[0]
    assert other.source.shape != whole[0].source.shape or not np.array_equal(other.source, whole[0].source)
    known = tokenizer()
    for step, batch in enumerate(whole):
        names = [spell(n) for n in first.numbers(step)]
        real = batch.positions >= 0
        for row in range(8):
            source = batch.source[row, batch.source_positions[row] >= 0]
            labels = batch.labels[row, real[row]]
            assert (known.decode(source), known.decode(labels)) == names[row]
            assert labels[-1] == source[-1] == TINY.eos_token_id
            assert batch.tokens[row, 0] == TINY.decoder_start_token_id
            assert np.array_equal(batch.tokens[row, 1 : real[row].sum()], labels[:-1])
            assert (batch.labels[row, ~real[row]] == TINY.pad_token_id).all()


# Schedule and loss


def test_schedule_is_the_papers():
    rates = [learning_rate(n, 512, 4000) for n in range(1, 20001)]
    for n in (1, 2, 100, 3999, 4000, 4001, 20000):
        formula = 1 / 512**0.5 * min(1 / n**0.5, n / 4000**1.5)
        assert abs(rates[n - 1] - formula) <= 1e-15 * formula
    assert max(rates) == rates[3999] and abs(rates[3999] - 0.000698771) < 1e-9
    assert np.allclose(np.diff(rates[:4000]), rates[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_loss_matches_torch_cross_entropy(smoothing):
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((3, 7, 11)) * 3, rng.integers(0, 11, (3, 7))
    real = np.arange(7) < np.array([[7], [4], [1]])
    target = torch.tensor(np.where(real, labels, -100)).flatten()
    theirs = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)
    expected = theirs(torch.tensor(logits).flatten(0, 1), target).item()
    found = torch_trainer.smoothed_loss(*map(torch.tensor, (logits, labels, real)), smoothing).item()
    assert abs(found - expected) <= 1e-14
    with jax.enable_x64(True):
        found = float(jax_trainer.smoothed_loss(*map(jnp.asarray, (logits, labels, real)), smoothing))
    assert abs(found - expected) <= 1e-14


# Initial weights and updates


def test_initial_weights_are_drawn_as_said():
    config = preset("transformer-numbers")
    first, again, other = initial_weights(config, 1), initial_weights(config, 1), initial_weights(config, 2)
    assert sum(x.size for x in first.values()) == weight_map(config).parameters
    for name, x in first.items():
        assert np.array_equal(x, again[name])
        if name.endswith("norm.weight") or name.endswith("bias"):
            assert (x == ("weight" in name)).all()
            continue
        assert not np.array_equal(x, other[name])
        expected = config.d_model**-0.5 if name == "embed.weight" else np.sqrt(2 / sum(x.shape))
        assert abs(x.std() / expected - 1) < 0.02 and abs(x.mean()) < 0.02 * expected, name
    matrices = [first[f"decoder.0.self_attn.{p}_proj.weight"] for p in "qkv"]
    assert abs(np.corrcoef([m.ravel() for m in matrices]) - np.eye(3)).max() < 0.05


RATE = partial(learning_rate, d_model=TINY.d_model, warmup=10)


def trained(trainer, state, steps, rate=RATE):
    """Losses of so many updates, and what they left."""
    batches = Batches(tokenizer(), TINY, state.settings.batch_size, state.settings.seed)
    running = trainer(state)
    losses = [running.update(batches[n], n, rate(n + 1)) for n in range(state.step, state.step + steps)]
    return losses, running.arrays()


def compare(left, right):
    """The largest difference of losses, and of weights and moments against the tensor's largest value."""
    losses = max(abs(a - b) / b for a, b in zip(left[0], right[0], strict=True))
    arrays = 0.0
    for kind in ("weights", "first", "second"):
        assert left[1][kind].keys() == right[1][kind].keys()
        for name, x in right[1][kind].items():
            # Key biases have a mathematically zero gradient: Adam makes steps of rounding errors there.
            if not name.endswith("k_proj.bias"):
                arrays = max(arrays, np.abs(left[1][kind][name] - x).max() / np.abs(x).max())
    return losses, arrays


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_jax_updates_match_torch(dropout):
    state = begun(dropout=dropout, seed=7)
    with jax.enable_x64(True):
        left = trained(jax_trainer.Trainer, state, 5)
    right = trained(torch_trainer.Trainer, state, 5)
    losses, arrays = compare(left, right)
    assert losses <= STEP_LIMIT and arrays <= STEP_LIMIT
    if dropout:
        without = trained(torch_trainer.Trainer, begun(seed=7), 5)
        assert compare(without, right)[0] > 1e-3
    else:
        assert right[0][-1] < right[0][0]


@pytest.mark.parametrize(
    "name", ["betas", "epsilon", "smoothing", "padding in the loss", "another rate", "one step late"]
)
def test_planted_mistake_in_an_update_is_caught(name, monkeypatch):
    state, rate = begun(), RATE
    right = trained(torch_trainer.Trainer, state, 5)
    wrong, adam, loss = torch_trainer.Trainer, torch.optim.Adam, torch_trainer.smoothed_loss
    if name == "betas":
        monkeypatch.setattr(torch.optim, "Adam", lambda p, **o: adam(p, **o | {"betas": (0.9, 0.999)}))
    elif name == "epsilon":
        monkeypatch.setattr(torch.optim, "Adam", lambda p, **o: adam(p, **o | {"eps": 1e-8}))
    elif name == "smoothing":
        monkeypatch.setattr(torch_trainer, "smoothed_loss", lambda x, y, r, s: loss(x, y, r, 0.0))
    elif name == "padding in the loss":
        monkeypatch.setattr(
            torch_trainer, "smoothed_loss", lambda x, y, r, s: loss(x, y, torch.ones_like(r), s)
        )
    elif name == "another rate":
        rate = partial(learning_rate, d_model=TINY.d_model, warmup=11)
    else:
        rate = lambda n: learning_rate(n + 1, TINY.d_model, 10)  # noqa: E731
    assert max(compare(trained(wrong, state, 5, rate), right)) > STEP_LIMIT


# Runs


def losses_of(folder):
    with open(folder / "losses.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows] == list(range(1, len(rows) + 1))
    return [float(r["loss"]) for r in rows]


@pytest.fixture(autouse=True)
def _few_held_out(monkeypatch, request):
    """Decoding five thousand numbers takes minutes with a model that has not learned to stop."""
    if "slow" not in request.keywords:
        kept = held_out_numbers()[:3]
        monkeypatch.setattr("twinformers.training.loop.held_out_numbers", lambda: kept)


def start_and_go_on(tmp_path, first, second, **settings):
    """Losses and state of four updates at once, and of two and two more in another framework or the same."""
    with jax.enable_x64(True):
        train(tmp_path / "once", framework=second, steps=4, **QUICK | settings)
        train(tmp_path / "parts", framework=first, steps=2, **QUICK | settings)
        train(tmp_path / "parts", framework=second, steps=4, resume=True)
    return [(losses_of(tmp_path / name), restore(tmp_path / name)) for name in ("once", "parts")]


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_resumed_run_equals_uninterrupted_one(tmp_path, framework):
    # Drawing masks takes XLA long to compile, and keys come from the step in both frameworks alike.
    dropout = 0.1 if framework == "torch" else 0.0
    once, parts = start_and_go_on(tmp_path, framework, framework, dropout=dropout)
    assert once[0] == parts[0] and len(once[0]) == 4
    for kind in ("weights", "first", "second"):
        for name, x in getattr(once[1], kind).items():
            assert np.array_equal(x, getattr(parts[1], kind)[name]), name
    assert once[1].tokenizer == parts[1].tokenizer


def test_run_goes_on_in_the_other_framework(tmp_path):
    once, parts = start_and_go_on(tmp_path, "jax", "torch")
    assert np.allclose(once[0], parts[0], rtol=STEP_LIMIT, atol=0)
    marker = json.loads((tmp_path / "parts" / "twinformers.json").read_text())
    assert marker["format"] == "torch"


def test_resuming_without_moments_is_caught(tmp_path):
    """The check above can fail: a run whose moments are lost goes another way."""
    train(tmp_path / "run", framework="torch", steps=2, **QUICK)
    whole = restore(tmp_path / "run")
    zeros = {name: np.zeros_like(x) for name, x in whole.weights.items()}
    lost = TrainState(
        whole.settings, whole.config, whole.tokenizer, whole.weights, zeros, zeros, whole.losses
    )
    left, right = (trained(torch_trainer.Trainer, state, 3) for state in (whole, lost))
    assert max(compare(left, right)) > STEP_LIMIT


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_train_then_translate_on_the_command_line(tmp_path, capfd, framework):
    out = str(tmp_path / "run")
    options = ["--framework", framework, "--batch-size", "8", "--json"]
    assert command(["train", "translation", "--out", out, "--steps", "3", *options]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["steps"] == 3 and result["held_out"] == 3 and 0 <= result["exact_match"] <= 1
    assert [english for english, _ in result["samples"]][2] == "two hundred fifty-four"
    assert (tmp_path / "run" / "losses.png").read_bytes().startswith(b"\x89PNG")
    texts = ["--text", "two hundred fifty-four", "--text", "seven"]
    assert command(["translate", out, *texts, "--framework", "both", "--num-beams", "2", "--json"]) == 0
    outputs = json.loads(capfd.readouterr().out)["outputs"]
    assert [o["framework"] for o in outputs] == ["jax", "jax", "torch", "torch"]
    assert [o["text"] for o in outputs[:2]] == [o["text"] for o in outputs[2:]]
    assert [o["tokens"] for o in outputs[:2]] == [o["tokens"] for o in outputs[2:]]
    known = tokenizer()
    assert all(o["text"] == known.decode(o["tokens"]) for o in outputs)


def test_interrupt_leaves_a_run_that_can_be_resumed(tmp_path, capfd):
    def interrupt(step, steps, loss):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    result = train(tmp_path / "run", framework="torch", steps=500, on_step=interrupt, **QUICK)
    assert signal.getsignal(signal.SIGINT) is before
    assert result.interrupted and 3 <= result.steps < 500 and result.exact_match is None
    assert len(losses_of(tmp_path / "run")) == result.steps
    gone_on = train(tmp_path / "run", framework="torch", steps=result.steps + 1, resume=True)
    whole = train(tmp_path / "whole", framework="torch", steps=result.steps + 1, **QUICK)
    assert not gone_on.interrupted and losses_of(tmp_path / "run") == losses_of(tmp_path / "whole")
    assert whole.exact_match is not None


def test_interrupted_command_exits_with_130(tmp_path):
    program = [sys.executable, "-c", "from twinformers.cli import main; main()"]
    options = [
        "--framework",
        "torch",
        "--batch-size",
        "8",
        "--steps",
        "100000",
    ]
    child = subprocess.Popen(
        [*program, "train", "translation", "--out", str(tmp_path / "run"), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    assert "100/100000" in child.stderr.readline()
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 130 and "--resume" in out
    assert restore(tmp_path / "run").step >= 100


@pytest.mark.slow
def test_a_short_run_learns(tmp_path):
    result = train(tmp_path / "run", framework="torch", steps=1500)
    assert result.held_out == 5038 and result.exact_match is not None and result.exact_match > 0.5
    (said,) = translate(tmp_path / "run", "twenty-one thousand three hundred five", framework="torch")
    assert said.text == "einundzwanzigtausenddreihundertfünf"


# What must be refused


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"steps": 0}, "steps"),
        ({"dropout": 1.0}, "dropout"),
        ({"seed": -1}, "seed"),
        ({"preset": "smollm2-135m"}, "preset"),
        ({"dtype": "int8"}, "dtype"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_settings_are_refused(tmp_path, settings, match):
    with pytest.raises(UsageError, match=match):
        train(tmp_path / "run", framework="torch", **settings)
    assert not (tmp_path / "run").exists()


def test_bad_runs_are_refused(tmp_path, capfd):
    folder = tmp_path / "run"
    with pytest.raises(UsageError, match="framework"):
        train(folder, framework="keras")
    with pytest.raises(SourceError, match=r"no training run[\s\S]*training.json"):
        train(folder, framework="torch", resume=True)
    train(folder, framework="torch", steps=1, **QUICK)
    with pytest.raises(DestinationError, match="--resume"):
        train(folder, framework="torch", steps=1, **QUICK)
    with pytest.raises(UsageError, match=r"seed[\s\S]*keeps its settings"):
        train(folder, framework="torch", resume=True, seed=5)
    text = (folder / "losses.csv").read_text()
    (folder / "losses.csv").write_text(text + "2,1.0\n")
    with pytest.raises(FormatError, match="disagree"):
        train(folder, framework="torch", resume=True)
    (folder / "losses.csv").write_text(text + "2,loss\n")
    with pytest.raises(FormatError, match="cannot be read"):
        train(folder, framework="torch", resume=True)
    (folder / "losses.csv").write_text(text)
    about = (folder / "training.json").read_text()
    (folder / "training.json").write_text(about.replace('"version": 1', '"version": 2'))
    with pytest.raises(FormatError, match="version"):
        train(folder, framework="torch", resume=True)
    assert command(["train", "chess", "--out", str(tmp_path / "other")]) == 2
    assert "chess" in capfd.readouterr().err


def test_bad_texts_are_refused(tmp_path):
    train(tmp_path / "run", framework="torch", steps=1, **QUICK)
    with pytest.raises(UsageError, match="known to the tokenizer"):
        translate(tmp_path / "run", "12", framework="torch")
    with pytest.raises(UsageError, match="framework"):
        translate(tmp_path / "run", "one", framework="keras")
    with pytest.raises(UsageError, match="generate"):
        translate("preset:llama-tiny", "one", framework="torch")
    with pytest.raises(SourceError, match=r"no tokenizer[\s\S]*tokenizer.json"):
        translate("preset:transformer-tiny", "one", framework="torch")
