"""What `test_train_mesh.py` has processes do: each trains the runs that it is told, one after another."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from twinformers.errors import TwinformersError
from twinformers.training.text import processes
from twinformers.training.text.run import train_text

processes.PATIENCE = 0.5


def stop_after(update):
    """For `on_step`: an end asked for in the first process once an update has been made.

    By Ctrl-C, or by what torchrun hands on in its place.
    """
    number = signal.SIGTERM if "TORCHELASTIC_RUN_ID" in os.environ else signal.SIGINT

    def told(step, steps, row):
        if step == update:
            os.kill(os.getpid(), number)

    return told


def copy(rank, source, destination):
    """Copy a run once, seen whole by all."""
    if rank == "0" and source != destination:
        shutil.copytree(source, f"{destination}.new")
        os.rename(f"{destination}.new", destination)
    while source != destination and not os.path.exists(destination):
        time.sleep(0.05)


def main(rank, jobs):
    """What each run came to in this process, or its error."""
    found = []
    for job in jobs:
        stop = job.pop("stop", None)
        destination = job.pop("destination").replace("{rank}", rank)
        copy(rank, job.pop("copy", destination), destination)
        try:
            result = train_text(destination, on_step=stop_after(stop), **job)
            found.append(result.to_dict())
        except TwinformersError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    results, jobs = sys.argv[1:]
    number = os.environ.get("RANK", os.environ.get("JAX_PROCESS_ID", "0"))
    Path(f"{results}.{number}").write_text(json.dumps(main(number, json.loads(jobs))))
