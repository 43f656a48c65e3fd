"""Processes that save one model together: what they tell each other, and that they fail together."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from twinformers import errors
from twinformers.errors import TwinformersError, WorkerError, first_line

if TYPE_CHECKING:
    import numpy as np


class Group(ABC):
    """`count` processes, of which this one is number `index`. Every method is called by all of them alike."""

    index: int
    count: int

    @abstractmethod
    def total(self, block: np.ndarray, to: int | None = None) -> np.ndarray:
        """The sum over all processes of an int32 array [n]; what is not process `to`, if given, may get
        anything. The block may be overwritten.
        """

    def tell(self, value: Any) -> list[Any]:
        """What each process has to say, in their order; anything that JSON holds."""
        import numpy as np

        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        lengths = np.zeros(self.count, np.int32)
        lengths[self.index] = text.size
        lengths = self.total(lengths).copy()
        page = np.zeros((self.count, -(-int(lengths.max()) // 4) * 4), np.uint8)
        page[self.index, : text.size] = text
        page = self.total(page.view(np.int32).reshape(-1)).view(np.uint8).reshape(page.shape)
        return [json.loads(line[:n].tobytes()) for line, n in zip(page, lengths, strict=True)]

    def together(self, work: Callable[[], Any]) -> list[Any]:
        """What `work` returned in each process. Where it failed in one, every process raises that error.

        Typed errors arrive as they are; of others, the rest of the processes get a WorkerError.
        """
        failure: Exception | None = None
        try:
            said = {"value": work()}
        except Exception as error:
            failure, said = error, {"error": _described(error, self.index)}
        answers = self.tell(said)
        if failure is not None:
            raise failure
        for answer in answers:
            if "error" in answer:
                kind, problem, rest = answer["error"]
                raise getattr(errors, kind)(problem, **rest)
        return [answer["value"] for answer in answers]


def _described(error: Exception, index: int) -> tuple[str, str, dict[str, str]]:
    if isinstance(error, TwinformersError):
        rest = {name: getattr(error, name) for name in ("where", "expected", "found", "hint")}
        return type(error).__name__, error.problem, rest
    return WorkerError.__name__, "a process failed", {"where": f"process {index}", "found": first_line(error)}
