"""Typed errors: what was expected, what was found, and what to do about it.

Every error that a user's input can cause derives from `TwinformersError`; the command line turns it
into one message and exit code 2. A check that ran and failed is not an error: it is a result.
"""

from __future__ import annotations


class TwinformersError(Exception):
    """Base of every error that bad input, a missing package or a full disk can cause.

    Attributes: `where` names the file, tensor or field; `expected` and `found` what the two sides
    of the disagreement are; `hint` what to do. Each may be empty.
    """

    def __init__(self, problem: str, *, where: str = "", expected: str = "", found: str = "", hint: str = ""):
        # What a foreign file says may have no end.
        problem, where, expected, found = map(_clipped, (problem, where, expected, found))
        self.problem, self.where, self.expected, self.found, self.hint = problem, where, expected, found, hint
        lines = [f"{where}: {problem}" if where else problem]
        lines += [f"  expected: {expected}"] if expected else []
        lines += [f"  found:    {found}"] if found else []
        lines += [f"  to do:    {hint}"] if hint else []
        super().__init__("\n".join(lines))


def _clipped(text: str, most: int = 800) -> str:
    return text if len(text) <= most else f"{text[: most - 200]} ... {text[-190:]}"


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its type where it says nothing."""
    return next(iter(str(error).splitlines()), "")[:300] or type(error).__name__


class SourceError(TwinformersError):
    """The source does not exist, or is none of the forms that the sources grammar knows."""


class FormatError(TwinformersError):
    """A file is not what its format says it must be: truncated, malformed, of an unknown version."""


class ConfigError(TwinformersError):
    """A configuration is missing a field, has a wrong value, or asks for what the code does not do."""


class WeightsError(TwinformersError):
    """A tensor is missing, left over, duplicated or of the wrong shape or dtype."""


class IntegrityError(TwinformersError):
    """A file is not the one that was written: its checksum differs, or it is missing or was added."""


class DestinationError(TwinformersError):
    """The destination exists, cannot be written, or is the source itself."""


class MissingDependency(TwinformersError):
    """A package that this operation needs is not installed; the message names the extra."""


class UsageError(TwinformersError):
    """An option has a value that makes no sense, alone or together with another."""


class WorkerError(TwinformersError):
    """A process that was to measure ended, gave no answer in time, or says that it cannot."""
