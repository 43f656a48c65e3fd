"""A training run from start or checkpoint to the end: updates, checkpoints, samples, held-out exact match."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from twinformers.checkpoints.tokenizer import Tokenizer
from twinformers.configs import preset
from twinformers.configs._beams import Beams
from twinformers.configs.transformer import TransformerConfig
from twinformers.errors import DestinationError, MissingDependency, UsageError
from twinformers.loading import FRAMEWORKS, load, load_tokenizer
from twinformers.training.numbers import Batches, held_out_numbers, spell, train_tokenizer
from twinformers.training.schedule import learning_rate
from twinformers.training.state import (
    LONGEST,
    PLOT,
    TrainSettings,
    TrainState,
    initial_weights,
    restore,
    save,
)

#: Numbers whose translations show a run's end.
SAMPLES = (0, 21, 254, 1000, 77_077, 999_999)


@dataclass(frozen=True)
class TrainResult:
    """What a run came to. `interrupted` runs have no exact match yet; `--resume` goes on with them.

    `exact_match` is the share of the `held_out` numbers whose name came out right to the letter, decoded
    greedily; `seconds` counts the updates of this call and what compiling and saving took among them.
    """

    framework: str
    destination: str
    steps: int
    loss: float
    seconds: float
    steps_per_second: float
    interrupted: bool
    exact_match: float | None = None
    held_out: int = 0
    samples: list[tuple[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def train(
    destination: str | Path,
    *,
    framework: str,
    resume: bool = False,
    save_every: int = 500,
    on_step: Callable[[int, int, float], None] | None = None,
    **settings: Any,
) -> TrainResult:
    """Teach a Transformer number names, English to German, and leave a folder that `translate` reads.

    `settings` are fields of `TrainSettings`. With `resume` the folder's run goes on, in either framework;
    `steps` may then be raised, and nothing else may change. `on_step(step, steps, loss)` is told each update.
    Ctrl-C ends after the update that it meets and leaves a whole checkpoint. Raises UsageError for bad
    settings, DestinationError for a folder that exists, and MissingDependency for a package of the extra.
    """
    if framework not in FRAMEWORKS:
        raise UsageError(
            "unknown framework", where="framework", expected=" or ".join(FRAMEWORKS), found=repr(framework)
        )
    folder = Path(os.path.expanduser(destination))
    state = _resumed(folder, settings) if resume else _begun(folder, settings)
    trainer = _trainer(framework)(state)
    kept, tokenizer = state.settings, _tokenizer(state)
    batches = Batches(tokenizer, state.config, kept.batch_size, kept.seed)
    first, started = state.step, time.perf_counter()

    def write(**files: bytes) -> None:
        arrays = trainer.arrays()
        save(dataclasses.replace(state, **arrays), folder, framework, files)

    with _interruptible() as interrupted:
        while state.step < kept.steps and not interrupted.is_set():
            rate = learning_rate(state.step + 1, state.config.d_model, kept.warmup)
            loss = trainer.update(batches[state.step], state.step, rate)
            if not math.isfinite(loss):
                raise UsageError(
                    "the loss is no number any more",
                    where=f"update {state.step + 1}",
                    found=str(loss),
                    hint="raise --warmup, which lowers the learning rate; the last checkpoint is untouched",
                )
            state.losses.append(loss)
            if on_step:
                on_step(state.step, kept.steps, loss)
            if state.step % save_every == 0 and state.step < kept.steps:
                write()
        seconds = time.perf_counter() - started
        write(**{PLOT: plot({framework: state.losses})})
    result = TrainResult(
        framework=framework,
        destination=str(destination),
        steps=state.step,
        loss=float(np.mean(state.losses[-100:])),
        seconds=seconds,
        steps_per_second=(state.step - first) / seconds,
        interrupted=state.step < kept.steps,
    )
    if result.interrupted:
        return result
    names = [spell(n) for n in held_out_numbers()]
    said = spoken(folder, framework, [english for english, _ in names], kept.dtype)
    right = [german == heard for (_, german), heard in zip(names, said, strict=True)]
    samples = [spell(n)[0] for n in SAMPLES]
    return dataclasses.replace(
        result,
        exact_match=sum(right) / len(right),
        held_out=len(right),
        samples=list(zip(samples, spoken(folder, framework, samples, kept.dtype), strict=True)),
    )


def spoken(folder: Path, framework: str, texts: Sequence[str], dtype: str, size: int = 256) -> list[str]:
    """The greedy translation of each text by the model in a folder; similar lengths go together."""
    tokenizer = load_tokenizer(folder)
    engine = importlib.import_module(f"{framework}_models.beam").Translator(load(folder, framework, dtype))
    sources = [tokenizer.encode(text) for text in texts]
    result = []
    for start in range(0, len(sources), size):
        part = sources[start : start + size]
        filled = part + part[-1:] * (min(size, len(sources)) - len(part))  # one shape for all batches
        found = engine.translate(filled, Beams(num_beams=1, max_new_tokens=LONGEST))
        result += [tokenizer.decode(h.tokens) for h in found[: len(part)]]
    return result


def plot(curves: dict[str, Sequence[float]], size: tuple[float, float] = (7, 4)) -> bytes:
    """The loss curves as a PNG. Raises MissingDependency without matplotlib."""
    import io

    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependency(
            "matplotlib is not installed", hint="pip install 'twinformers[train]'"
        ) from None
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axes = figure.subplots()
    for n, (name, losses) in enumerate(curves.items()):
        # Dashes above a broad line: two curves that agree can both be seen.
        axes.plot(
            range(1, len(losses) + 1), losses, "--" if n else "-", label=name, linewidth=1.2 if n else 2.5
        )
    axes.set(xlabel="update", ylabel="label-smoothed cross-entropy", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _begun(folder: Path, settings: dict[str, Any]) -> TrainState:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DestinationError(
            "the destination exists",
            where=str(folder),
            hint="name another one, or pass --resume to go on with what is there",
        )
    kept = TrainSettings(**settings)
    config = preset(kept.preset)
    if not isinstance(config, TransformerConfig) or not config.share_embeddings:
        raise UsageError(
            "this preset cannot learn number names",
            where="preset",
            expected="an encoder-decoder model with one vocabulary for both languages",
            found=kept.preset,
        )
    config = config.replace(dropout=kept.dropout)
    weights = initial_weights(config, kept.seed)
    zeros = {name: np.zeros_like(x) for name, x in weights.items()}
    return TrainState(kept, config, train_tokenizer(config.source_vocab_size), weights, zeros, zeros)


def _resumed(folder: Path, settings: dict[str, Any]) -> TrainState:
    state = restore(folder)
    for name, value in settings.items():
        before = getattr(state.settings, name)
        if name != "steps" and value != before:
            raise UsageError(
                "a run that is resumed keeps its settings",
                where=name,
                expected=repr(before),
                found=repr(value),
                hint="leave the option out, or start a new run in another folder",
            )
    state.settings = dataclasses.replace(state.settings, **settings)
    return state


def _trainer(framework: str) -> Any:
    packages = {"jax": ("jax", "flax", "optax"), "torch": ("torch",)}[framework]
    try:
        return importlib.import_module(f"twinformers.training.{framework}_trainer").Trainer
    except ImportError as error:
        if error.name not in packages:
            raise
        raise MissingDependency(
            f"{error.name} is not installed", hint=f"pip install 'twinformers[{framework},train]'"
        ) from None


def _tokenizer(state: TrainState) -> Tokenizer:
    return Tokenizer.from_assets({"tokenizer.json": state.tokenizer}, "the training run")


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of tearing an update apart; a second one does what it always does."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only there signals can be had
        yield asked
        return

    def note(*_: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
