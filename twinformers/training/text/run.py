"""A run from start or checkpoint to the end: updates, evaluations, checkpoints, and the model they leave."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from twinformers.errors import DestinationError, MissingDependency, TwinformersError, UsageError
from twinformers.training.loop import _interruptible
from twinformers.training.text.checkpoints import Checkpoints
from twinformers.training.text.data import Windows, prepare, read_about, token_map, tokenizer_files
from twinformers.training.text.final import parameters, write_model
from twinformers.training.text.metrics import METRICS, PLOT, MetricsLog, plot
from twinformers.training.text.processes import SEEN, Processes, terminable
from twinformers.training.text.settings import PACKAGES, RUN, Run, TextSettings, read_run, write_whole
from twinformers.training.text.start import blank_weights, chosen_model, fitted_model, initial_weights

LOCK = ".lock"
#: What a run that was killed at its very beginning may have left.
BEGINNINGS = {LOCK, f".{RUN}.new", SEEN, f".{SEEN}.new"}


@dataclass(frozen=True)
class TextResult:
    """What a run came to. `model` is empty after an interruption, with which `--resume` goes on.

    `loss` is the mean of the last 100 updates, `eval_loss` that of the last evaluation, both per token;
    `begun_at` is the update that this call went on from, and `tokens_per_second` counts its own alone,
    compiling, evaluations and checkpoints included. Several processes say the same, but for their number
    (`process`).
    """

    framework: str
    destination: str
    model: str
    parameters: int
    tokens: int
    windows: int
    steps: int
    begun_at: int
    loss: float | None
    eval_loss: float | None
    seconds: float
    tokens_per_second: float
    interrupted: bool
    process: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def train_text(
    destination: str | Path,
    *,
    resume: bool = False,
    distributed: bool = False,
    on_tokens: Callable[[int], None] = lambda count: None,
    on_step: Callable[[int, int, dict[str, Any]], None] = lambda step, steps, row: None,
    **settings: Any,
) -> TextResult:
    """Train a language model on text or token files, and leave a folder that `generate` and `port` read.

    `settings` are fields of `TextSettings`. With a `mesh`, every process calls this alike: for PyTorch those
    that torchrun launched, for JAX this one with all its devices, or those that it finds (`distributed`). The
    folder lies where all of them see it, and the first one alone tells `on_tokens` and `on_step`.

    With `resume` the folder's run goes on from its last whole checkpoint, bit for bit as if it had not ended;
    settings may be left out, and those that change no number may change. `on_tokens` is told how many tokens
    the data has so far, `on_step(step, steps, row)` each update with its line of `metrics.jsonl`. Ctrl-C ends
    after the update that it meets, with a checkpoint.

    Raises UsageError for bad settings and a loss that is no number any more, DestinationError for a folder
    that exists or is in use, SourceError, FormatError and IntegrityError for data and checkpoints that are
    missing or damaged, MissingDependency for a package of the extra, WorkerError where another process fails.
    """
    folder = Path(os.path.expanduser(destination))
    # From wherever the run is resumed, its data lie where they lay.
    if "data" in settings:
        settings["data"] = tuple(map(_absolute, settings["data"]))
    for name in ("config", "tokenizer"):
        if settings.get(name) is not None and os.path.exists(os.path.expanduser(settings[name])):
            settings[name] = _absolute(settings[name])
    if resume:
        run = read_run(folder, settings)
    else:
        given = TextSettings(**{"data": (), **settings})
        run = Run(folder, given, chosen_model(given))
    side = _side(run.settings.framework)
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(side.connected(run.settings, distributed))
        with processes.together():
            if processes.first:
                if not resume:
                    _check_new(folder)
                stack.enter_context(_alone(folder, resume))
                run.write()
                prepare(run, on_tokens)
        processes.share(folder)
        with processes.together():
            data = read_about(run)
            config = fitted_model(run, data)
        stack.enter_context(side.scope(run.settings))
        interrupted = stack.enter_context(_interruptible())
        if processes.count > 1:
            stack.enter_context(terminable(interrupted))
        return _train(run, config, data, side, processes, interrupted, on_step)


def _train(
    run: Run, config: Any, data: Any, side: Any, processes: Processes, interrupted: Any, on_step: Any
) -> TextResult:
    s = run.settings
    windows = Windows(
        token_map(run, data),
        sequence=s.sequence,
        batch_size=s.batch_size,
        seed=s.seed,
        eval_share=s.eval_share,
    )
    rows = s.batch_size // s.accumulate
    held_out = windows.held_out(rows, s.eval_batches * rows)
    checkpoints = Checkpoints(run.checkpoints, s.keep, processes.first)
    begun_at, metrics = _begin(run, checkpoints, processes)
    weights = blank_weights(config) if begun_at else initial_weights(config, s.seed)
    trainer = side.Trainer(config, s, weights, processes.mesh)
    del weights
    if begun_at:
        with processes.together():
            trainer.restore(checkpoints.path(begun_at), begun_at)
    started = before = time.perf_counter()
    saved = begun_at
    with contextlib.ExitStack() as stack:
        stack.callback(metrics.close)
        stack.callback(checkpoints.close)
        batch = windows[trainer.updates] if trainer.updates < s.steps else None
        while trainer.updates < s.steps and not processes.any(interrupted.is_set()):
            loss, norm = trainer.update(batch)
            step = trainer.updates
            if step < s.steps:  # while the device computes
                batch = windows[step]
            loss, norm = float(loss), float(norm)
            _check_finite(loss, norm, step)
            now = time.perf_counter()
            row = {"step": step, "loss": loss, "norm": norm, "rate": s.recipe.rate(step)}
            row["tokens_per_second"] = round(s.batch_size * s.sequence / (now - before), 1)
            if held_out and (step == s.steps or (s.eval_every and step % s.eval_every == 0)):
                row["eval_loss"] = _evaluate(trainer, held_out)
                _check_finite(row["eval_loss"], norm, step)
            metrics.add(row)
            if processes.first:
                on_step(step, s.steps, row)
            if s.save_every and step % s.save_every == 0:
                metrics.settle()
                checkpoints.save(step, trainer.save)
                saved = step
            before = time.perf_counter()
        if trainer.updates > saved:
            metrics.settle()
            checkpoints.save(trainer.updates, trainer.save)
        with processes.together():
            checkpoints.wait()
        seconds = time.perf_counter() - started
    finished = trainer.updates == s.steps
    with processes.together():
        if processes.first:
            write_whole(run.folder / PLOT, plot({s.framework: metrics.rows}))
        if finished:
            write_model(run, config, trainer, processes, tokenizer_files(run))
    loss, eval_loss = json.loads(processes.tell(json.dumps(_last(metrics.rows))))
    return TextResult(
        framework=s.framework,
        destination=str(run.folder),
        model=str(run.folder / "model") if finished else "",
        parameters=parameters(config),
        tokens=data.count,
        windows=windows.count,
        steps=trainer.updates,
        begun_at=begun_at,
        loss=loss,
        eval_loss=eval_loss,
        seconds=seconds,
        tokens_per_second=(trainer.updates - begun_at) * s.batch_size * s.sequence / seconds,
        interrupted=not finished,
        process=processes.index,
    )


def _begin(run: Run, checkpoints: Checkpoints, processes: Processes) -> tuple[int, MetricsLog]:
    """The update that the run goes on from, 0 at its start, and its metrics up to there."""
    begun_at = 0
    with processes.together():
        if processes.first:
            checkpoints.clean()
            begun_at = max(checkpoints.steps(), default=0)
            if begun_at:
                checkpoints.check(begun_at)
        # Opened before the model is made: what does not fit is said at once.
        metrics = MetricsLog(run.folder, begun_at, processes.first)
    return int(processes.tell(str(begun_at))), metrics


def _last(rows: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """The mean loss of the last 100 updates, and the last loss of what was held out."""
    last = [row["loss"] for row in rows[-100:]]
    eval_loss = next((r["eval_loss"] for r in reversed(rows) if "eval_loss" in r), None)
    return (sum(last) / len(last) if last else None), eval_loss


def _evaluate(trainer: Any, batches: list[Any]) -> float:
    """Mean cross-entropy over all targets of the batches."""
    found = [trainer.evaluate(batch) for batch in batches]
    return sum(total for total, _ in found) / sum(count for _, count in found)


def _check_finite(loss: float, norm: float, step: int) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UsageError(
            "the loss is no number any more" if not math.isfinite(loss) else "the gradient is no number",
            where=f"update {step}",
            found=str(loss if not math.isfinite(loss) else norm),
            hint="lower --peak or raise --warmup in a new run; the last checkpoint is untouched",
        )


def _side(framework: str) -> Any:
    packages = (*PACKAGES[framework], *(("orbax",) if framework == "jax" else ()))
    try:
        side = importlib.import_module(f"twinformers.training.text.{framework}_side")
    except ImportError as error:
        if error.name not in packages:
            raise
        raise MissingDependency(
            f"{error.name} is not installed", hint=f"pip install 'twinformers[{framework},train]'"
        ) from None
    if importlib.util.find_spec("matplotlib") is None:  # said now, and not after hours
        raise MissingDependency("matplotlib is not installed", hint="pip install 'twinformers[train]'")
    return side


def _check_new(folder: Path) -> None:
    try:
        left = {p.name for p in folder.iterdir()} - BEGINNINGS if folder.exists() else set()
    except OSError:
        left = {folder.name}
    if left:
        raise DestinationError(
            "the destination exists",
            where=str(folder),
            hint="name another one, or pass --resume to go on with what is there",
        )


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


@contextlib.contextmanager
def _alone(folder: Path, resume: bool) -> Iterator[None]:
    """The run's folder for this process alone. Raises DestinationError where another one trains in it.

    A new run that fails before its first update leaves nothing behind.
    """
    from filelock import FileLock, Timeout

    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise DestinationError(
            "another process trains in this folder", where=str(folder), hint="wait until it ends"
        ) from None
    except OSError as error:
        raise DestinationError(
            "the destination cannot be written", where=str(folder), found=error.strerror or str(error)
        ) from None
    try:
        yield
    except TwinformersError:
        if not resume and not (folder / METRICS).exists():
            shutil.rmtree(folder / "data", ignore_errors=True)
            for name in (RUN, *BEGINNINGS):
                (folder / name).unlink(missing_ok=True)
            if not existed:
                folder.rmdir()
        raise
    except OSError as error:
        raise DestinationError(
            "the destination cannot be written",
            where=str(error.filename or folder),
            found=error.strerror or str(error),
            hint="check permissions and free space, and go on with --resume",
        ) from error
    finally:
        lock.release()
