"""A mistake is a change of a source text, planted in the running process and taken out again.

The changed text of a module is executed beside it. Then every function that came out otherwise lends its code
to the one that is in use, wherever that was imported to, and data that came out otherwise takes its place. So
nothing is imported twice, which would cost more than all that the tests compute.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Edit:
    """`old` becomes `new` at "module:Class.method", "module:function", or anywhere in a "module".

    There `old` must occur exactly once: a mistake that is planted nowhere, or twice, tells nothing.
    """

    where: str
    old: str
    new: str

    @property
    def module(self) -> str:
        return self.where.partition(":")[0]

    def applied(self, text: str) -> str:
        first, last = _lines(text, self.where.partition(":")[2])
        lines = text.splitlines(keepends=True)
        within = "".join(lines[first:last])
        if within.count(self.old) != 1:
            raise ValueError(f"{self.where}: {self.old!r} occurs {within.count(self.old)} times, not once")
        return "".join(lines[:first]) + within.replace(self.old, self.new) + "".join(lines[last:])


def _lines(text: str, name: str) -> tuple[int, int]:
    """From which line to which one the definition of that name goes; the whole text without a name."""
    node: Any = ast.parse(text)
    for part in filter(None, name.split(".")):
        node = next(n for n in node.body if getattr(n, "name", None) == part)
    return (node.lineno - 1, node.end_lineno) if name else (0, len(text.splitlines()))


@contextlib.contextmanager
def planted(edits: Sequence[Edit]) -> Iterator[None]:
    """While it lasts, the modules behave as if their sources were changed so."""
    undo: list[Callable[[], Any]] = []
    try:
        for name in dict.fromkeys(edit.module for edit in edits):
            module = importlib.import_module(name)
            text = inspect.getsource(module)
            for edit in edits:
                text = edit.applied(text) if edit.module == name else text
            beside = {k: v for k, v in vars(module).items() if k.startswith("__") and k != "__builtins__"}
            exec(compile(text, module.__file__ or name, "exec"), beside)
            before = len(undo)
            for key, value in vars(module).items():
                if key in beside and not key.startswith("__"):
                    put = functools.partial(setattr, module, key)
                    _exchange(value, beside[key], put, module.__name__, undo)
            if len(undo) == before:
                raise ValueError(f"{name}: the change of its text changes nothing")
        _forget()
        yield
    finally:
        for restore in reversed(undo):
            restore()
        _forget()


def _exchange(
    old: Any, new: Any, put: Callable[[Any], Any], module: str, undo: list[Callable[[], Any]]
) -> None:
    """Make `old` do what `new` does. `put` sets another value where `old` stands."""
    if isinstance(old, functools.partial | types.ModuleType) or type(old) is not type(new):
        return
    if hasattr(old, "__wrapped__"):  # what a decorator has put around it stays
        _exchange(old.__wrapped__, new.__wrapped__, put, module, undo)
    elif isinstance(old, types.FunctionType):
        for part in ("__code__", "__defaults__", "__kwdefaults__"):
            before, after = getattr(old, part), getattr(new, part)
            if _told(before) != _told(after):
                setattr(old, part, after)
                undo.append(functools.partial(setattr, old, part, before))
    elif isinstance(old, property):
        _exchange(old.fget, new.fget, put, module, undo)
    elif isinstance(old, type):
        if old.__module__ == module:
            for key, value in list(vars(old).items()):
                if key in vars(new) and not (key.startswith("__") and isinstance(value, str | tuple | dict)):
                    _exchange(value, vars(new)[key], functools.partial(setattr, old, key), module, undo)
    elif isinstance(old, dict):
        for key in old.keys() & new.keys():
            _exchange(old[key], new[key], functools.partial(old.__setitem__, key), module, undo)
    elif _told(old) != _told(new):
        put(new)
        undo.append(functools.partial(put, old))


def _told(value: Any) -> str:
    """What a value says of itself, without addresses. Of code: what it does, not on which line it stands."""
    if isinstance(value, types.CodeType):
        return f"{value.co_code!r} {value.co_names} {value.co_varnames} {[_told(c) for c in value.co_consts]}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _forget() -> None:
    """Empty what modules of ours remember: a model loaded before is one without the mistake."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("test_", "twinformers", "jax_models", "torch_models")):
            for value in list(vars(module).values()):
                if callable(clear := getattr(value, "cache_clear", None)):
                    clear()
