"""Training on text: data and their order, both frameworks alike, checkpoints, resuming, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tokenizers import Tokenizer as Backend
from torch.distributed.checkpoint import FileSystemWriter

from twinformers.checkpoints import open_checkpoint, port
from twinformers.cli.app import run as command
from twinformers.configs import preset
from twinformers.errors import (
    ConfigError,
    DestinationError,
    FormatError,
    IntegrityError,
    MissingDependency,
    SourceError,
    UsageError,
)
from twinformers.training.text import data, jax_side, sources, torch_side
from twinformers.training.text import run as running
from twinformers.training.text.checkpoints import Checkpoints
from twinformers.training.text.data import Windows, prepare, token_map
from twinformers.training.text.metrics import EXACT, MetricsLog, plot, read_metrics
from twinformers.training.text.run import train_text
from twinformers.training.text.settings import Run, TextSettings, read_run
from twinformers.training.text.start import chosen_model, fitted_model, initial_weights
from twinformers.training.text.vocabulary import END, train_tokenizer
from twinformers.weight_maps import weight_map

ROOT = Path(__file__).parent.parent
SIDES = {"jax": jax_side, "torch": torch_side}
pytestmark = pytest.mark.usefixtures("own_logging")


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory):
    """What one run compiles serves the others: half the time, and a check that a cache changes nothing."""
    options = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: jax.config.values[name] for name in options}
    compilation_cache.reset_cache()
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A few pages of Python's own documentation, a file each, and one that is empty."""
    folder = tmp_path_factory.mktemp("texts")
    for n, name in enumerate(sorted(topics)[:6]):
        (folder / f"{n}.txt").write_text(topics[name], encoding="utf-8")
    (folder / "9.md").write_text("")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture(scope="module")
def quick(texts, tmp_path_factory):
    """Settings of a run of a second or two: one layer, and the vocabulary of its configuration."""
    config = preset("llama-tiny").replace(num_hidden_layers=1, vocab_size=300)
    file = tmp_path_factory.mktemp("config") / "config.json"
    file.write_text(json.dumps(config.to_hf()))
    return {
        "data": (str(texts),),
        "config": str(file),
        "steps": 6,
        "batch_size": 4,
        "sequence": 24,
        "warmup": 2,
        "eval_every": 2,
        "eval_share": 0.1,
        "eval_batches": 2,
        "save_every": 2,
    }


def arrays(folder):
    """The weights of the model that a run left."""
    with open_checkpoint(folder / "model") as model:
        return {name: model.read(name) for name in model.tensors}


def exact(folder):
    return [{k: r[k] for k in EXACT if k in r} for r in read_metrics(folder / "metrics.jsonl")]


def same(left, right):
    assert exact(left) == exact(right)
    a, b = arrays(left), arrays(right)
    assert a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)


def stop_after(update):
    """For `on_step`: Ctrl-C once an update has been made."""

    def told(step, steps, row):
        if step == update:
            os.kill(os.getpid(), signal.SIGINT)

    return told


# Data


def run_of(folder, quick, **settings):
    given = TextSettings(**quick | settings)
    folder.mkdir(exist_ok=True)
    return Run(folder, given, chosen_model(given))


def test_documents_are_joined_by_the_end_token_and_lose_nothing(tmp_path, texts, quick, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 1000)  # several pieces for each document
    monkeypatch.setattr(data, "TOGETHER", 3000)
    run = run_of(tmp_path / "run", quick)
    about = prepare(run)
    tokens = token_map(run, about)
    assert about.dtype == "uint16" and about.count == len(tokens) and about.vocab_size == 300
    backend = Backend.from_file(str(run.data / "tokenizer" / "tokenizer.json"))
    assert backend.token_to_id(END) == 0 and tokens[-1] == 0
    ends = np.flatnonzero(tokens == 0)
    parts = [tokens[a + 1 : b].tolist() for a, b in pairwise([-1, *ends])]
    decoded = [backend.decode(part) for part in parts]
    assert decoded == [p.read_text() for p in sorted(texts.glob("*.txt"))]


@pytest.mark.parametrize("size", [300, 70_000])
def test_token_files_are_read_as_they_are(tmp_path, quick, size):
    ids = np.random.default_rng(0).integers(0, size, 1000)
    np.save(tmp_path / "a.npy", ids)
    (tmp_path / "b.bin").write_bytes(ids.astype("<u4").tobytes())
    config = tmp_path / "config.json"
    config.write_text(json.dumps(preset("llama-tiny").replace(vocab_size=size).to_hf()))
    run = run_of(tmp_path / "run", quick, data=(str(tmp_path),), token_dtype="uint32", config=str(config))
    about = prepare(run)
    assert about.vocab_size is None and about.dtype == ("uint16" if size < 65536 else "uint32")
    assert np.array_equal(token_map(run, about), np.r_[ids, ids])
    assert fitted_model(run, about).vocab_size == size


def test_tokenizer_is_the_same_each_time():
    texts = [topics[name] for name in sorted(topics)[:6]]
    assert train_tokenizer(texts, 400) == train_tokenizer(texts, 400)


def test_batches_depend_on_seed_and_step_alone():
    tokens = np.arange(1000, dtype=np.uint16)
    make = lambda seed=3: Windows(tokens, sequence=9, batch_size=4, seed=seed, eval_share=0.1)  # noqa: E731
    first, again = make(), make()
    steps = range(3 * first.count // 4)  # three epochs
    whole = [first[n] for n in steps]
    for n in (*reversed(steps), 0, 5, 61):
        for left, right in zip(whole[n], again[n], strict=True):
            assert left.dtype == np.int32 and np.array_equal(left, right)
    assert not np.array_equal(make(4)[0].tokens, whole[0].tokens)
    starts = np.concatenate([b.tokens[:, 0] for b in whole])
    epochs = [starts[n : n + first.count] for n in range(0, len(starts) - first.count + 1, first.count)]
    for epoch in epochs:  # every window once, in another order each time
        assert np.array_equal(np.sort(epoch), np.arange(first.count) * 9)
    assert not np.array_equal(epochs[0], epochs[1]) and len(epochs) > 1
    for batch in whole:
        assert np.array_equal(batch.targets, batch.tokens + 1)
        assert np.array_equal(batch.positions, np.tile(np.arange(9), (4, 1)))
    assert max(b.targets.max() for b in whole) < 900


def test_held_out_windows_are_read_once_and_never_learned():
    tokens = np.arange(1000, dtype=np.uint16)
    windows = Windows(tokens, sequence=9, batch_size=4, seed=0, eval_share=0.1)
    batches = windows.held_out(4, 1000)
    real = np.concatenate([b.targets[b.targets >= 0] for b in batches])
    assert np.array_equal(real, np.arange(901, 1000)) and len(batches) == 3
    assert (batches[-1].positions[-1] == -1).all() and (batches[-1].targets[-1] == -1).all()
    assert sum(len(b.tokens) for b in windows.held_out(4, 5)) == 8
    assert Windows(tokens, sequence=9, batch_size=4, seed=0).held_out(4, 5) == []


# The start


def test_initial_weights_are_drawn_as_said():
    config = preset("llama-10m")
    first, again, other = initial_weights(config, 1), initial_weights(config, 1), initial_weights(config, 2)
    assert sum(x.size for x in first.values()) == weight_map(config).parameters == 9_988_800
    for name, x in first.items():
        assert np.array_equal(x, again[name]) and x.dtype == np.float32
        if name.endswith("norm.weight"):
            assert (x == 1).all()
            continue
        residual = "o_proj" in name or "down_proj" in name
        assert abs(x.std() / (0.02 / (14**0.5 if residual else 1)) - 1) < 0.02, name
        assert not np.array_equal(x, other[name])
    pair = [first[f"layers.{i}.attn.q_proj.weight"].ravel() for i in (0, 1)]
    assert abs(np.corrcoef(pair)[0, 1]) < 0.02


def test_both_frameworks_learn_alike(tmp_path, quick):
    options = {**quick, "dtype": "float64", "accumulate": 2}
    for framework in SIDES:
        train_text(tmp_path / framework, framework=framework, **options)
    rows = [exact(tmp_path / framework) for framework in SIDES]
    assert rows[0][-1]["loss"] < rows[0][0]["loss"] and [r["step"] for r in rows[0]] == [1, 2, 3, 4, 5, 6]
    for left, right in zip(*rows, strict=True):
        assert left.keys() == right.keys() and ("eval_loss" in left) == (left["step"] % 2 == 0)
        for name in left:
            assert abs(left[name] - right[name]) <= 1e-10 * abs(right[name]), (left["step"], name)
    # Weights too; the sides store them apart, in their own layout.
    models = [open_checkpoint(tmp_path / framework / "model") for framework in SIDES]
    table = weight_map(models[0].config)
    for name, leaf in table.leaves("torch").items():
        left = leaf.move(models[0].read(leaf.name("jax")), "jax", "torch")
        right = models[1].read(name)
        assert np.abs(left - right).max() <= 1e-8 * np.abs(right).max(), name


@pytest.mark.parametrize("framework", SIDES)
def test_products_in_bfloat16_differ_by_their_rounding(tmp_path, quick, framework):
    """Against float64: float32 by its own rounding, bfloat16 by more, and by less than one of its steps."""
    options = {**quick, "framework": framework, "steps": 4}
    kinds = {"exact": {"dtype": "float64"}, "float32": {}, "bfloat16": {"compute_dtype": "bfloat16"}}
    for name, more in kinds.items():
        train_text(tmp_path / name, **options, **more)
    truth = [r["loss"] for r in exact(tmp_path / "exact")]
    far = {
        name: [abs(r["loss"] / x - 1) for r, x in zip(exact(tmp_path / name), truth, strict=True)]
        for name in kinds
    }
    assert max(far["float32"]) < 2**-20, far
    assert 2**-18 < max(far["bfloat16"]) < 2**-7 and min(far["bfloat16"]) > 0, far
    # The weights themselves are not rounded: what an update adds is not lost.
    for name, x in arrays(tmp_path / "bfloat16").items():
        assert x.dtype == np.float32
        if x.ndim == 2:
            lost = np.ascontiguousarray(x).view(np.uint32) & 0xFFFF
            assert (lost != 0).mean() > 0.9, name


# Resuming


@pytest.mark.parametrize(
    ("framework", "more"),
    [
        ("jax", {}),
        ("torch", {}),
        ("jax", {"remat": "dots", "accumulate": 2, "dtype": "float64"}),
        ("jax", {"compute_dtype": "bfloat16"}),
        ("torch", {"compute_dtype": "bfloat16", "remat": "full", "accumulate": 2}),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, quick, framework, more):
    options = {**quick, **more, "framework": framework, "save_every": 0}
    whole = train_text(tmp_path / "whole", **options)
    before = signal.getsignal(signal.SIGINT)
    part = train_text(tmp_path / "part", on_step=stop_after(3), **options)
    assert signal.getsignal(signal.SIGINT) is before
    assert (
        part.interrupted and part.model == "" and Checkpoints(tmp_path / "part/checkpoints", 2).steps() == [3]
    )
    with open(tmp_path / "part" / "metrics.jsonl", "ab") as file:  # as after a kill, beyond the checkpoint
        file.write(b'{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    gone_on = train_text(tmp_path / "part", resume=True)
    assert not gone_on.interrupted and (gone_on.begun_at, gone_on.steps) == (3, 6)
    assert gone_on.loss == whole.loss and gone_on.eval_loss == whole.eval_loss
    same(tmp_path / "whole", tmp_path / "part")


@pytest.mark.parametrize("mistake", ["moments", "position"])
def test_a_resume_that_forgets_something_is_caught(tmp_path, quick, monkeypatch, mistake):
    """The check above can fail: a run that loses its moments or its place in the data goes another way."""
    options = {**quick, "framework": "torch"}
    train_text(tmp_path / "whole", **options)
    train_text(tmp_path / "part", on_step=stop_after(3), **options)
    if mistake == "moments":
        right = torch_side.Trainer.restore

        def restore(self, folder, updates):
            right(self, folder, updates)
            for kept in self._state.optimizer.state.values():
                kept["exp_avg"].zero_()

        monkeypatch.setattr(torch_side.Trainer, "restore", restore)
    else:
        get = Windows.__getitem__
        monkeypatch.setattr(Windows, "__getitem__", lambda self, step: get(self, step - 3))
    train_text(tmp_path / "part", resume=True)
    with pytest.raises(AssertionError):
        same(tmp_path / "whole", tmp_path / "part")


def copied(trainer):
    """All that an update changes, in memory of its own."""
    flat = trainer._flat().items()
    return {n: (x.detach().numpy() if hasattr(x, "detach") else np.asarray(x)).copy() for n, x in flat}


def test_jax_gives_no_update_the_memory_that_somebody_looks_at():
    """What the checkpoints in JAX rely on: Orbax holds numpy's view of an array that lies on the CPU."""
    double = jax.jit(lambda x: x * 2, donate_argnums=0)
    x = jax.block_until_ready(jax.numpy.ones((500, 500)))
    place, seen = x.unsafe_buffer_pointer(), np.asarray(x)
    assert seen.__array_interface__["data"][0] == place  # no copy
    y = jax.block_until_ready(double(x))
    assert y.unsafe_buffer_pointer() != place and (seen == 1).all()
    del x, seen
    place = y.unsafe_buffer_pointer()
    assert jax.block_until_ready(double(y)).unsafe_buffer_pointer() == place  # else it does


@pytest.mark.parametrize("framework", SIDES)
def test_updates_do_not_disturb_what_is_being_written(tmp_path, quick, framework, monkeypatch):
    go, write = threading.Event(), FileSystemWriter.write_data
    monkeypatch.setattr(FileSystemWriter, "write_data", lambda *args: go.wait(60) and write(*args))
    run = run_of(tmp_path / "run", quick, framework=framework)
    about = prepare(run)
    config = fitted_model(run, about)
    windows = Windows(token_map(run, about), sequence=24, batch_size=4, seed=0)
    side = SIDES[framework]
    with side.scope(run.settings):
        trainer = side.Trainer(config, run.settings, initial_weights(config, 0))
        trainer.update(windows[0])
        kept = copied(trainer)
        finish = trainer.save(tmp_path)
        for n in range(1, 4):
            loss, _ = trainer.update(windows[n])
        float(loss)
        go.set()
        finish()
        later = copied(trainer)
        assert all(not np.array_equal(later[n], x) for n, x in kept.items() if x.ndim)
        trainer.restore(tmp_path, 1)
        assert trainer.updates == 1
        for name, x in copied(trainer).items():
            assert x.tobytes() == kept[name].tobytes(), name
        # What cannot be written is said at once or when somebody waits for it.
        checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
        with pytest.raises(DestinationError, match="cannot be written"):
            checkpoints.save(2, lambda new: [(new / "state").write_text(""), trainer.save(new)][1])
            checkpoints.wait()
        assert checkpoints.steps() == []


def test_last_checkpoints_stay_and_what_is_not_whole_has_no_name(tmp_path):
    place = tmp_path / "checkpoints"
    kept = Checkpoints(place, 2)
    seen = []

    def write(folder):
        def finish():
            (folder / "state").write_text(folder.name)
            seen.append(kept.steps())

        return finish

    for step in (5, 10, 15):
        kept.save(step, write)
    kept.wait()
    assert seen == [[], [5], [5, 10]] and kept.steps() == [10, 15]
    assert sorted(p.name for p in place.iterdir()) == ["00000010", "00000015"]

    def fails(folder):
        return lambda: (folder / "no" / "folder").write_text("")

    kept.save(20, fails)
    with pytest.raises(DestinationError, match="cannot be written"):
        kept.wait()
    assert kept.steps() == [10, 15] and (place / ".00000020.new").exists()
    kept.clean()
    assert sorted(p.name for p in place.iterdir()) == ["00000010", "00000015"]
    (place / "00000015" / "state").write_text("state")
    with pytest.raises(IntegrityError, match=r"damaged[\s\S]*--resume then goes on from"):
        kept.check(15)
    assert kept.check(10) == place / "00000010"
    kept.close()


@pytest.mark.parametrize("framework", SIDES)
def test_damaged_checkpoint_is_refused_and_the_one_before_serves(tmp_path, quick, framework):
    options = {**quick, "framework": framework}
    train_text(tmp_path / "whole", **options)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "00000006"
    file = max((p for p in last.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match="damaged"):
        train_text(tmp_path / "run", resume=True)
    shutil.rmtree(last)
    assert train_text(tmp_path / "run", resume=True).begun_at == 4
    same(tmp_path / "whole", tmp_path / "run")


def test_metrics_are_cut_at_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for n in range(1, 6):
        log.add({"step": n, "loss": n / 3})
    log.close()
    file = tmp_path / "metrics.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"step": 6')
    cut = MetricsLog(tmp_path, 3)
    cut.close()
    assert [r["step"] for r in cut.rows] == [1, 2, 3] and file.read_bytes() == whole[
        : whole.index(b'{"step": 4')
    ]
    with pytest.raises(FormatError, match="disagree"):
        MetricsLog(tmp_path, 4)
    assert plot({"jax": cut.rows, "torch": [{"step": 1, "loss": 1.0, "eval_loss": 2.0}]}).startswith(
        b"\x89PNG"
    )


# The command


@pytest.mark.parametrize("framework", SIDES)
def test_train_then_generate_port_and_verify_on_the_command_line(tmp_path, texts, quick, capfd, framework):
    out = tmp_path / "run"
    options = ["--config", quick["config"], "--framework", framework, "--steps", "3"]
    options += ["--batch-size", "4", "--sequence", "24", "--eval-every", "2", "--eval-share", "0.1", "--json"]
    assert command(["train", "text", "--out", str(out), "--data", str(texts), *options]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["steps"] == 3 and result["framework"] == framework and not result["interrupted"]
    assert result["model"] == str(out / "model") and result["tokens"] > result["windows"] * 24
    rows = read_metrics(out / "metrics.jsonl")
    assert result["loss"] == pytest.approx(np.mean([r["loss"] for r in rows]), rel=1e-12)
    assert result["eval_loss"] == rows[-1]["eval_loss"] and "eval_loss" in rows[1] and len(rows) == 3
    assert all(r.keys() >= {"step", "loss", "norm", "rate", "tokens_per_second"} for r in rows)
    assert abs(rows[0]["loss"] - np.log(300)) < 0.1
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    marker = json.loads((out / "model" / "twinformers.json").read_text())
    assert marker["format"] == framework
    generate = ["generate", str(out / "model"), "--prompt", "The ", "--max-new-tokens", "4", "--json"]
    assert command([*generate, "--framework", framework]) == 0
    assert json.loads(capfd.readouterr().out)["outputs"][0]["tokens"]
    if framework == "torch":
        check = ["verify", str(out / "model"), "--dtype", "float64", "--check", "logits", "--json"]
        assert command(check) == 0 and json.loads(capfd.readouterr().out)["ok"]
    port(out / "model", tmp_path / "hf", to="hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 0
    # Once more, when nothing is left to do.
    assert command(["train", "text", "--out", str(out), "--resume", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["begun_at"] == 3


def test_interrupted_command_exits_with_130_and_says_how_to_go_on(tmp_path, quick, capfd, monkeypatch):
    add = MetricsLog.add

    def told(self, row):
        add(self, row)
        stop_after(3)(row["step"], 0, row)

    monkeypatch.setattr(MetricsLog, "add", told)
    options = ["--config", quick["config"], "--framework", "torch", "--steps", "50", "--sequence", "24"]
    arguments = ["train", "text", "--out", str(tmp_path / "run"), "--data", quick["data"][0], *options]
    assert command(arguments) == 130
    assert "--resume" in capfd.readouterr().out
    assert Checkpoints(tmp_path / "run" / "checkpoints", 2).steps() == [3]


# What must be refused


def bad_data(tmp_path, kind):
    file = tmp_path / (
        "data.bin" if kind == "odd" else "data.npy" if kind in ("float", "negative") else "data.txt"
    )
    content = {
        "latin": "Gr\xfc\xdfe".encode("latin-1"),
        "odd": b"abc",
        "empty": b"",
        "short": b"hello",
        "text": b"some words and more of them " * 50,
    }
    if kind in content:
        file.write_bytes(content[kind])
    else:
        np.save(file, np.ones(500) if kind == "float" else np.full(500, -3))
    return str(file)


TEXT = {"vocab_size": 257, "config": None, "preset": "llama-tiny"}
#: What the data are, what else is set, the error, and what it must say.
BAD = {
    "no data": (None, {"data": ()}, UsageError, "data: bad value"),
    "missing data": (None, {"data": ("/nowhere/at/all",)}, SourceError, "/nowhere/at/all: no such data"),
    "no model": ("text", {"config": None}, UsageError, r"preset, config:[\s\S]*neither"),
    "two models": ("text", {"preset": "llama-tiny"}, UsageError, "both"),
    "unknown preset": ("text", TEXT | {"preset": "llama-11m"}, SourceError, "llama-10m"),
    "translator": ("text", TEXT | {"preset": "transformer-tiny"}, UsageError, "only language models"),
    "unknown framework": ("text", {"framework": "keras"}, UsageError, "framework"),
    "not UTF-8": ("latin", TEXT, FormatError, r"not a text in UTF-8[\s\S]*byte 2"),
    "empty text": ("empty", TEXT | {"tokenizer": "{tokenizer}"}, SourceError, "nothing to learn from"),
    "too little text": ("short", TEXT, UsageError, r"too little text to learn from[\s\S]*25 tokens"),
    "too little held out": ("text", TEXT | {"eval_share": 0.0001}, UsageError, "too little text held out"),
    "vocabulary below the bytes": ("text", TEXT | {"vocab_size": 256}, UsageError, r"too small[\s\S]*257"),
    "vocabulary beyond the text": ("text", {}, UsageError, "does not fill this vocabulary"),
    "tokens beyond the model": (
        None,
        {"tokenizer": "{tokenizer}"},
        UsageError,
        r"too small[\s\S]*at least 400",
    ),
    "no such tokenizer": ("text", TEXT | {"tokenizer": "nowhere"}, SourceError, "nowhere"),
    "tokenizer without an end": ("text", TEXT | {"tokenizer": "{endless}"}, SourceError, "ends a document"),
    "raw tokens of no type": ("odd", TEXT, UsageError, "--token-dtype"),
    "odd raw tokens": ("odd", TEXT | {"token_dtype": "uint16"}, FormatError, "3 bytes"),
    "tokens that are floats": ("float", TEXT, FormatError, "float64"),
    "negative tokens": ("negative", TEXT, FormatError, "-3 to -3"),
    "window beyond the model": (
        "text",
        TEXT | {"sequence": 2000, "eval_share": 0.0},
        UsageError,
        "at most 1024",
    ),
    "no steps": ("text", TEXT | {"steps": 0}, UsageError, "steps"),
    "floor above the peak": ("text", TEXT | {"floor": 1.0}, UsageError, "floor"),
    "odd parts": ("text", TEXT | {"accumulate": 3}, UsageError, "multiple of accumulate = 3"),
    "unknown compute dtype": ("text", TEXT | {"compute_dtype": "int8"}, UsageError, "compute_dtype"),
    "narrow weights": ("text", TEXT | {"dtype": "bfloat16"}, UsageError, "float32 or float64"),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A tokenizer of 400 entries, and one whose files name no end."""
    whole, endless = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("endless")
    for name, content in train_tokenizer([topics[n] for n in sorted(topics)[:6]], 400).items():
        (whole / name).write_bytes(content)
    shutil.copy(whole / "tokenizer.json", endless)
    return {"{tokenizer}": str(whole / "tokenizer.json"), "{endless}": str(endless / "tokenizer.json")}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_and_data_are_refused(tmp_path, quick, tokenizers, name):
    kind, settings, error, message = BAD[name]
    given = {**quick, "framework": "torch", **settings}
    if kind:
        given["data"] = (bad_data(tmp_path, kind),)
    given["tokenizer"] = tokenizers.get(given.get("tokenizer"), given.get("tokenizer"))
    with pytest.raises(error, match=message):
        train_text(tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_bad_runs_are_refused(tmp_path, quick, monkeypatch):
    folder, options = tmp_path / "run", {**quick, "framework": "torch", "steps": 1}
    with pytest.raises(SourceError, match=r"no training run[\s\S]*run.json"):
        train_text(folder, resume=True)
    assert not folder.exists()
    train_text(folder, **options)
    with pytest.raises(DestinationError, match="--resume"):
        train_text(folder, **options)
    for name, value in {"seed": 5, "framework": "jax", "steps": 2, "data": (str(tmp_path),)}.items():
        with pytest.raises(UsageError, match=rf"{name}[\s\S]*keeps its settings"):
            train_text(folder, resume=True, **{name: value})
    assert train_text(folder, resume=True, save_every=9, keep=1, seed=0).steps == 1
    assert read_run(folder, {}).settings.save_every == 9
    with running._alone(folder, True), pytest.raises(DestinationError, match="another process"):
        train_text(folder, resume=True)
    tokens = folder / "data" / "tokens.bin"
    kept = tokens.read_bytes()
    tokens.write_bytes(kept[:-2] + b"\0\1")
    with pytest.raises(IntegrityError, match="tokens are not those"):
        train_text(folder, resume=True)
    tokens.write_bytes(kept)
    about = (folder / "run.json").read_text()
    for wrong, message in (
        (about.replace('"version": 1', '"version": 2'), "version 2"),
        (about.replace('"batch_size": 4', '"batch_size": "four"'), "cannot be read"),
        (about.replace('"model"', '"other"'), "cannot be read"),
        (about[:50], "JSON"),
    ):
        (folder / "run.json").write_text(wrong)
        with pytest.raises(FormatError, match=message):
            train_text(folder, resume=True)
    (folder / "run.json").write_text(about)
    checkpoint = folder / "checkpoints" / "00000001"
    shutil.move(checkpoint, tmp_path / "kept")
    assert train_text(folder, resume=True).begun_at == 0  # from the start, as after a kill before the first
    shutil.rmtree(checkpoint / "state")
    with pytest.raises(IntegrityError, match="damaged"):
        train_text(folder, resume=True)
    monkeypatch.setattr(running.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="matplotlib"):
        train_text(tmp_path / "other", **options)


@pytest.mark.parametrize("framework", SIDES)
def test_a_run_that_diverges_says_so_and_keeps_its_checkpoint(tmp_path, quick, framework):
    options = {**quick, "framework": framework, "peak": 1e30, "save_every": 1, "warmup": 0}
    with pytest.raises(UsageError, match=r"update \d: the (loss|gradient) is no number[\s\S]*--peak"):
        train_text(tmp_path / "run", **options)
    assert Checkpoints(tmp_path / "run" / "checkpoints", 2).steps()


def test_a_checkpoint_of_another_shape_is_refused(tmp_path, quick):
    for framework, side in SIDES.items():
        run = run_of(tmp_path / framework, quick, framework=framework)
        config = run.model
        windows = Windows(np.arange(300, dtype=np.uint16), sequence=24, batch_size=4, seed=0)
        other = config.replace(intermediate_size=80)
        with side.scope(run.settings):
            trainer = side.Trainer(config, run.settings, initial_weights(config, 0))
            trainer.update(windows[0])
            trainer.save(tmp_path / framework)()
            wrong = side.Trainer(other, run.settings, initial_weights(other, 0))
            with pytest.raises(FormatError, match=r"cannot be read[\s\S]*(88, 48|48, 88)"):
                wrong.restore(tmp_path / framework, 1)


def test_bad_configuration_file_is_refused(tmp_path, quick):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="model_type"):
        train_text(tmp_path / "run", **{**quick, "config": str(tmp_path)})


@pytest.mark.parametrize(("framework", "other"), [("jax", "torch"), ("torch", "jax")])
def test_each_side_runs_without_the_other_framework(framework, other):
    block = f"import sys; sys.modules[{other!r}] = None\n"
    code = f"import twinformers.training.text.run, twinformers.training.text.{framework}_side"
    subprocess.run([sys.executable, "-c", block + code], cwd=ROOT, check=True, timeout=120)
