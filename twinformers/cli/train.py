"""`twinformers train`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from twinformers.cli.output import console, print_json, progress
from twinformers.errors import UsageError
from twinformers.training.loop import train

TASKS = ("translation",)


def run(
    task: str,
    out: Path,
    *,
    framework: str,
    resume: bool,
    save_every: int,
    settings: dict[str, Any],
    json: bool,
) -> int:
    if task not in TASKS:
        raise UsageError("unknown task", where="task", expected=" or ".join(TASKS), found=repr(task))
    watched = sys.stderr.isatty() and not json
    with progress("training", json=json) as bar:

        def show(step: int, steps: int, loss: float) -> None:
            bar.update(
                bar.task_ids[0], completed=step, total=steps, description=f"{step}/{steps} loss {loss:.4f}"
            )
            if not watched and step % 100 == 0:
                print(f"{step}/{steps} loss {loss:.4f}", file=sys.stderr, flush=True)

        given = {name: value for name, value in settings.items() if value is not None}
        result = train(out, framework=framework, resume=resume, save_every=save_every, on_step=show, **given)
    if json:
        print_json(result.to_dict())
        return 130 if result.interrupted else 0
    say = console().print
    for english, german in result.samples:
        say(f"{english}\n    {german}", soft_wrap=True)
    say(
        f"{result.framework}: {result.steps} updates, loss {result.loss:.4f}, "
        f"{result.seconds / 60:.1f} minutes, {result.steps_per_second:.1f} updates/s",
        soft_wrap=True,
    )
    if result.interrupted:
        say(f"interrupted; go on with --resume\n{result.destination}", soft_wrap=True)
        return 130
    say(
        f"held-out exact match: {result.exact_match:.2%} of {result.held_out}\n{result.destination}",
        soft_wrap=True,
    )
    return 0
