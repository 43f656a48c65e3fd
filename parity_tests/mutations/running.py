"""Whether the ordinary suite notices a planted mistake, and where `diverge` finds it."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

from mutations.around import AROUND
from mutations.locating import PAIRS
from mutations.models import MODELS
from mutations.mutation import Mutation
from mutations.others import OTHERS
from mutations.planting import planted

MUTATIONS: dict[str, Mutation] = {mutation.name: mutation for mutation in MODELS + OTHERS + AROUND}
TESTS = Path(__file__).parent.parent
#: What a test raises that noticed something; anything else would be a mistake in the mistake.
NOTICED = ("AssertionError", "Failed", "ConfigError", "WeightsError", "UsageError")


@dataclass(frozen=True)
class Outcome:
    """What became of one mistake, or (`mutation` None) of a test without any.

    `error` is what the test raised, None if it passed; `path` is where `diverge` put the mistake.
    """

    mutation: str | None
    test: str
    error: str | None
    message: str
    path: str | None
    seconds: float


class _Loop:
    """Runs pytest's items its own way: each as it is, then again for each mistake that it must catch."""

    def __init__(self, mutations: Iterable[Mutation], on_outcome: Callable[[Outcome], None]):
        self.mutations, self.on_outcome = list(mutations), on_outcome
        self.raised: tuple[str | None, str] = None, ""

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Generator[None, Any, None]:
        report = (yield).get_result()
        if not report.passed and call.excinfo is not None:
            # What a fixture raises, or that a test is skipped, is no verdict of the test's.
            name = (
                call.excinfo.typename if report.when == "call" else f"{report.when}: {call.excinfo.typename}"
            )
            self.raised = name, str(call.excinfo.value).strip()[:300]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: Any) -> bool:
        items = {item.nodeid.rpartition("/")[2]: item for item in session.items}
        for test, item in items.items():
            self._tell(None, test, item)
        for mutation in self.mutations:
            with planted(mutation.edits):
                self._tell(mutation, mutation.caught_by, items[mutation.caught_by])
        return True

    def _tell(self, mutation: Mutation | None, test: str, item: Any) -> None:
        start, self.raised, path = time.perf_counter(), (None, ""), None
        runtestprotocol(item, log=False)
        if mutation is not None and mutation.located is not None:
            path = PAIRS[mutation.located.pair]().culprit
        name = mutation.name if mutation else None
        self.on_outcome(Outcome(name, test, *self.raised, path, round(time.perf_counter() - start, 2)))


def run(mutations: Iterable[Mutation], on_outcome: Callable[[Outcome], None]) -> None:
    """Run the tests that these mistakes name without any mistake and with theirs, and let `diverge` look."""
    mutations, said = list(mutations), io.StringIO()
    tests = dict.fromkeys(str(TESTS / mutation.caught_by) for mutation in mutations)
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = pytest.main(
            ["-q", "-n", "0", "-p", "no:cacheprovider", *tests], plugins=[_Loop(mutations, on_outcome)]
        )
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest ended with {code!r}:\n{said.getvalue()[-4000:]}")
