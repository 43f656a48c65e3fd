"""A model that can be watched, called piece by piece and given other parameters, in either framework.

Everything runs in float64 and outside of any compiled function, so that each call has values. Parameters go
by PyTorch's names and layout on both sides: a Flax `kernel` [..., in, out] is a `weight` [out, in, ...].
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from twinformers.errors import UsageError
from twinformers.parity.diverging.values import Leaves, first_array, leaves, map_leaves

Invoke = Callable[..., Any]


class _Reached(Exception):
    """The submodule that was asked for has returned: nothing after it needs to run."""

    def __init__(self, output: np.ndarray):
        self.output = output


@dataclass
class Call:
    """One call of a submodule: its arguments by name, their arrays by dotted name, and its output.

    `positional` counts the arguments that were passed by place, `start` the calls that had begun before it.
    The whole model has the path "".
    """

    path: str
    arguments: dict[str, Any]
    positional: int
    leaves: Leaves
    output: np.ndarray
    start: int


@dataclass
class Pullback:
    """Gradients of <output, cotangent>: by argument, and by parameter under PyTorch's names and layout."""

    arguments: Leaves
    parameters: Leaves


class Side(ABC):
    """One of the two models. `invoke(model, *inputs)` makes the whole forward pass, on its own arrays."""

    framework: str

    def __init__(self, model: Any, name: str, invoke: Invoke, inputs: tuple[np.ndarray, ...]):
        self.model, self.name, self.invoke, self.inputs = model, name, invoke, inputs

    @abstractmethod
    def modules(self) -> dict[str, Any]:
        """Every submodule by path; the model itself has the path ""."""

    @abstractmethod
    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """In here the model computes in float64."""

    @abstractmethod
    def watched(self, begin: Callable[..., None], end: Callable[[str, Any], None]) -> Any:
        """A context in which `begin(path, args, kwargs)` and `end(path, output)` are told of each call."""

    @abstractmethod
    def numpy(self, x: Any) -> np.ndarray | None:
        """The values, copied; None inside a compiled function, where there are none."""

    @abstractmethod
    def native(self, x: np.ndarray, like: Any = None) -> Any:
        """An array of the framework. Integers and truth values get the dtype of `like`; floats stay."""

    @abstractmethod
    def parameters(self, path: str = "") -> Leaves:
        """The parameters of a submodule by their names in it, as PyTorch has them."""

    @abstractmethod
    def edited(
        self, path: str, parameters: Mapping[str, np.ndarray]
    ) -> contextlib.AbstractContextManager[Any]:
        """While it lasts, these parameters of the submodule have other values."""

    @abstractmethod
    def widened(self, call: Call, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """The output of a call if nothing in it were computed in less than float64."""

    @abstractmethod
    def pullback(self, call: Call, values: Mapping[str, np.ndarray], cotangent: np.ndarray) -> Pullback:
        """The gradients of <output, cotangent> of a call; of integers there are none."""

    @abstractmethod
    def signature(self, path: str) -> inspect.Signature:
        """That of a submodule's call, without `self`."""

    def own_path(self, path: str) -> str:
        """The model's own name for a submodule that is watched under `path`."""
        return path

    def record(self) -> dict[str, Call]:
        """Every call in the order of completion: children before their parents, the model itself last."""
        calls: dict[str, Call] = {}
        open_calls: list[tuple[dict[str, Any], int, int]] = []
        begun = itertools.count(1)
        signatures: dict[str, inspect.Signature] = {}

        def begin(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if path not in signatures:
                signatures[path] = self.signature(path)
            named = _named(signatures[path], args, kwargs)
            # Copied before the call, which may write into them.
            open_calls.append((map_leaves(named, lambda _, x: self._copy(x)), len(args), next(begun)))

        def end(path: str, output: Any) -> None:
            self._note(calls, path, *open_calls.pop(), output)

        with self.scope(), self.watched(begin, end):
            arguments = {str(n): self.native(x) for n, x in enumerate(self.inputs)}
            output = self.invoke(self.model, *arguments.values())
            self._note(calls, "", arguments, len(arguments), 0, output)
        if "" not in calls:
            raise UsageError("the model returned no array", where=self.name, found=type(output).__name__)
        return calls

    def _copy(self, x: Any) -> Any:
        return x

    def _note(
        self,
        calls: dict[str, Call],
        path: str,
        arguments: dict[str, Any],
        positional: int,
        start: int,
        output: Any,
    ) -> None:
        """Keep a call, unless it has no arrays or lies in a compiled function."""
        arrays = {name: self.numpy(x) for name, x in leaves(arguments).items()}
        found = first_array(output)
        returned = None if found is None else self.numpy(found)
        if returned is not None and all(x is not None for x in arrays.values()):
            calls[path] = Call(path, arguments, positional, arrays, returned, start)  # type: ignore[arg-type]

    def arguments(self, call: Call, values: Mapping[str, np.ndarray]) -> tuple[list[Any], dict[str, Any]]:
        """What the call was given, by place and by name, with some arrays replaced."""
        arrays = leaves(call.arguments)
        return placed(call, {**arrays, **{n: self.native(x, arrays[n]) for n, x in values.items()}})

    def perform(self, call: Call, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """The call itself, on arrays of the framework: of the whole model or of one submodule."""
        path = call.path.partition("#")[0]
        return self.invoke(self.model, *args) if not path else self.modules()[path](*args, **kwargs)

    def call(self, call: Call, values: Mapping[str, np.ndarray], until: str | None = None) -> np.ndarray:
        """Make a call alone with some arrays replaced; its output, or that of `until`, a submodule in it.

        Integers fit either framework's dtype. What a submodule cannot compute with is an error of its own.
        """

        def end(path: str, output: Any) -> None:
            if path == until:
                raise _Reached(self._returned(output))

        watch = self.watched(lambda *_: None, end) if until else contextlib.nullcontext()
        with self.scope(), watch:
            try:
                return self._returned(self.perform(call, *self.arguments(call, values)))
            except _Reached as reached:
                return reached.output

    def _returned(self, output: Any) -> np.ndarray:
        found = self.numpy(first_array(output))
        assert found is not None  # what was recorded had values
        return found


def _named(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names of the parameters that take them; by number where there is no such name."""
    by_place = [
        p.name
        for p in signature.parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    names = [by_place[n] if n < len(by_place) else str(n) for n in range(len(args))]
    return {**dict(zip(names, args, strict=True)), **kwargs}


def placed(call: Call, arrays: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """A call's arguments by place and by name, with these arrays in them."""
    pairs = list(map_leaves(call.arguments, lambda name, own: arrays[name]).items())
    return [v for _, v in pairs[: call.positional]], dict(pairs[call.positional :])
