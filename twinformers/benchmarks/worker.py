"""The process of one framework: it loads once, then answers one request after another.

A request is a line of JSON on stdin, its answer a line of JSON on what was stdout when the process began;
whatever else a library prints goes to stderr.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from typing import Any

from twinformers.allocator import give_back, keep_memory
from twinformers.benchmarks.cases import Case
from twinformers.benchmarks.memory import forget_peak, resident
from twinformers.errors import TwinformersError, UsageError, first_line

SIDES = {"jax": "JaxSide", "torch": "TorchSide", "transformers": "TransformersSide"}


class Answers:
    """The requests, each a method."""

    def __init__(self, framework: str, *arguments: Any):
        module = importlib.import_module(f"twinformers.benchmarks.{framework}_side")
        self._side = getattr(module, SIDES[framework])(*arguments)
        self._side.load()
        self._prepared: set[tuple[Case, str]] = set()

    def about(self) -> dict[str, Any]:
        return self._side.about()

    def bandwidth(self) -> dict[str, float]:
        return self._side.bandwidth()

    def matrix(self) -> dict[str, float]:
        return self._side.matrix()

    def first_token(self) -> dict[str, int]:
        return {"token": self._side.first_token(), "peak_bytes": resident(peak=True)}

    def prepare(self, case: dict[str, Any], variant: str) -> dict[str, float]:
        """Run a case for the first time, and once more, since some set up again on the second call."""
        key = Case(**case), variant
        give_back()  # of the case before: the peak is to be this one's
        first = self._side.run(*key)
        self._side.run(*key)
        self._prepared.add(key)
        return first

    def measure(self, case: dict[str, Any], variant: str) -> dict[str, float | None]:
        key = Case(**case), variant
        if key not in self._prepared:
            raise UsageError("the process was started anew since the case was prepared", where=key[0].label)
        gc.collect()  # what a limit was measured on: JAX lets go of an array of NumPy's only then
        forget_peak()
        self._side.forget()
        found = self._side.run(*key)
        return {**found, "peak_bytes": resident(peak=True), "device_bytes": self._side.device_bytes()}

    def release(self) -> None:
        self._side.release()
        self._prepared.clear()


def answer(answers: Answers, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The value, or what went wrong: a case may be too large for the machine, or beyond a library."""
    try:
        return {"value": getattr(answers, method)(**arguments)}
    except TwinformersError as error:
        return {"error": str(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {first_line(error)}"}


def main() -> None:
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def reply(value: dict[str, Any]) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    keep_memory()  # in every process: what is compared is the models, not how often memory is cleared
    try:
        answers = Answers(*json.loads(sys.argv[1]))
    except (TwinformersError, ImportError, RuntimeError, MemoryError) as error:
        reply({"error": str(error) if isinstance(error, TwinformersError) else first_line(error)})
        return
    reply({"value": answers.about()})
    for line in sys.stdin:
        reply(answer(answers, **json.loads(line)))


if __name__ == "__main__":
    main()
