"""What a Flax twin computes, found by running its own code on symbols instead of arrays.

`panels(model)` calls the model, and each of its parts that its own file defines, with symbols that note
what is done with them. Submodules note their call and are not entered; `attend`, `rotate` and the like note
theirs; sums and products of symbols are notes too. Nothing is computed, so any size will do. Code that
chooses by its configuration is followed as it runs. Dropout and padding are left out.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from flax import nnx

#: Functions through which a value goes unchanged, as far as a drawing tells.
SAME = {"constrain", "dropout", "stop_gradient", "maximum", "asarray", "stack", "reshape", "astype"}
#: Functions whose result says where tokens are and not what they are.
POSITIONS = {"visible", "place", "rotary_angles", "subkey", "at_least_float32", "empty_cache", "zeros_like"}
#: Arguments that are no input of a block: what follows from positions, caches, random keys.
BESIDE = {"mask", "slots", "positions", "context", "cache", "key", "i"}
#: What functions are called in a drawing, where their own name says too little.
NAMES = {
    "rotate": "rotary",
    "store": "key-value cache",
    "where": "mask",
    "first": "first token",
    "matmul": "product",
}


@dataclass
class Node:
    """One step: its kind ("in", "module", "op", "add", "times"), its name, the steps before it."""

    kind: str
    label: str
    parents: tuple[int, ...]
    note: str = ""
    module: Any = None


@dataclass
class Graph:
    """All steps of one call, in their order; `mask` is what `visible` was asked for last."""

    nodes: list[Node] = field(default_factory=list)
    mask: str = ""

    def add(self, kind: str, label: str, parents: Sequence[Symbol] = (), **more: Any) -> Symbol:
        above = tuple(dict.fromkeys(p.node for p in parents))
        self.nodes.append(Node(kind, label, above, **more))
        return Symbol(self, len(self.nodes) - 1)

    def used(self) -> list[Node]:
        """The steps without inputs that nothing uses."""
        seen = {p for node in self.nodes for p in node.parents}
        kept = [n for n, node in enumerate(self.nodes) if node.kind != "in" or n in seen]
        number = {n: place for place, n in enumerate(kept)}
        for n in kept:
            self.nodes[n].parents = tuple(number[p] for p in self.nodes[n].parents)
        return [self.nodes[n] for n in kept]


class Nothing:
    """Stands for all that a drawing leaves out: whatever is done with it gives it again."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Nothing:
        return self

    __iter__ = None  # else Python would ask for one element after the other, without end

    def _again(self, *others: Any) -> Any:
        return next((x for x in others if isinstance(x, Symbol)), self)

    __getitem__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _again
    __floordiv__ = __mod__ = __pow__ = __matmul__ = __and__ = __or__ = __invert__ = __neg__ = _again
    __lt__ = __le__ = __gt__ = __ge__ = _again


NOTHING = Nothing()


def _factor(value: float) -> str:
    """A number that something is multiplied by, as a root where it is one."""
    for text, square in (("× √", value**2), ("÷ √", value**-2)):
        if square > 1.5 and math.isclose(square, round(square), rel_tol=1e-9):
            return f"{text}{round(square)}"
    return f"× {value:.4g}"


class Symbol:
    """A value in a graph. Methods that only move elements give the value itself."""

    dtype = NOTHING
    shape = (NOTHING, NOTHING, NOTHING)

    def __init__(self, graph: Graph, node: int):
        self.graph, self.node = graph, node

    @property
    def is_positions(self) -> bool:
        node = self.graph.nodes[self.node]
        return node.kind == "in" and node.label.endswith("positions")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self

    def __getitem__(self, index: Any) -> Symbol:
        return self

    def _with(self, kind: str, label: str, other: Any) -> Symbol:
        if isinstance(other, Symbol):
            return self.graph.add(kind, label, (self, other))
        return self

    def __add__(self, other: Any) -> Symbol:
        return self._with("add", "+", other)

    def __mul__(self, other: Any) -> Symbol:
        if isinstance(other, int | float):
            return self.graph.add("op", _factor(other), (self,))
        return self._with("times", "×", other)

    def __truediv__(self, other: Any) -> Symbol:
        return self * (1 / other) if isinstance(other, int | float) else self._with("op", "÷", other)

    def __sub__(self, other: Any) -> Symbol:
        return self._with("op", "−", other)

    def __matmul__(self, other: Any) -> Symbol:
        return self._with("op", NAMES["matmul"], other)

    def _nothing(self, other: Any) -> Nothing:
        return NOTHING

    __radd__, __rmul__ = __add__, __mul__
    __lt__ = __le__ = __gt__ = __ge__ = _nothing


def _symbols(values: Any) -> list[Symbol]:
    """All symbols among arguments, whatever tuples and lists hold them."""
    if isinstance(values, Symbol):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    return [s for v in values for s in _symbols(v)] if isinstance(values, list | tuple) else []


def _results(function: Any) -> int:
    """How many values a function returns, by its annotation."""
    text = str(inspect.signature(function).return_annotation)
    if not (inside := re.fullmatch(r"tuple\[(.*)\]", text)):
        return 1
    flat = re.sub(r"\[[^\[\]]*\]", "", inside[1])
    return flat.count(",") + 1


class Recorder:
    """The stand-ins for one call: of the file's functions, of jax's, and of the calls of submodules."""

    def __init__(self, root: Any):
        self.graph, self.root = Graph(), root
        self.file = sys.modules[type(root).__module__]
        self.paths = {id(module): ".".join(map(str, path)) for path, module in nnx.iter_modules(root)}

    def function(self, name: str, original: Any) -> Any:
        count = _results(original)

        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "visible":
                self.graph.mask = self._mask(original, args, kwargs)
            return self._split(self.noted(name, args, kwargs), count, name == "store")

        return call

    def noted(self, name: str, args: Any, kwargs: Any) -> Any:
        """What a function gives, its call noted if there is anything to draw."""
        given = _symbols([args, kwargs])
        if not given or name in POSITIONS:
            return NOTHING
        given = [s for s in given if not s.is_positions] or given
        if name in SAME:
            return given[0]
        return self.graph.add("op", NAMES.get(name, name), given)

    @staticmethod
    def _split(value: Any, count: int, after: bool) -> Any:
        """As many results as the caller unpacks: `store` gives the cache first, others the value."""
        if count == 1:
            return value
        return (NOTHING, *[value] * (count - 1)) if after else (value, *[NOTHING] * (count - 1))

    @staticmethod
    def _mask(original: Any, args: Any, kwargs: Any) -> str:
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        if not bound.arguments["causal"]:
            return "sees all"
        window = bound.arguments["window"]
        return "sees its past" if window is None else f"sees the last {window:,}"

    def module(self, original: Any, suffix: str = "") -> Any:
        """In place of a submodule's method that computes: a node by the submodule's path."""
        count = _results(original)
        recorder = self

        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            label, given = recorder.paths[id(module)], _symbols([args, kwargs])
            if not isinstance(
                module, nnx.Embed
            ):  # positions say what a block may see, and are no values of it
                given = [s for s in given if not s.is_positions]
            noted = recorder.graph.add(
                "module", label + suffix, given, module=module, note=recorder.graph.mask
            )
            return recorder._split(noted, count, False)

        return call

    @staticmethod
    def alias(original: Any) -> Any:
        """In place of a submodule's method that prepares: its input again, as many times as it returns."""
        count = _results(original)

        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            given = (_symbols([args, kwargs]) or [NOTHING])[0]
            return given if count == 1 else (given,) * count

        return call

    def _changes(self) -> Iterator[tuple[Any, str, Any]]:
        """Everything to put in place while the call runs: (owner, name, stand-in)."""
        for name, value in list(vars(self.file).items()):
            if isinstance(value, FunctionType) and value.__module__.startswith("jax_models"):
                yield self.file, name, self.function(name, value)
        yield self.file, "jax", Namespace(self, "jax")
        yield self.file, "jnp", Namespace(self, "jnp")
        if hasattr(self.file, "ACTIVATIONS"):
            yield self.file, "ACTIVATIONS", Activations(self)
        classes = {type(module) for _, module in nnx.iter_modules(self.root) if module is not self.root}
        for cls in classes - set(type(self.root).__mro__):
            if (
                own := next((vars(c)["__call__"] for c in cls.__mro__ if "__call__" in vars(c)), None)
            ) is None:
                continue  # a list of modules
            yield cls, "__call__", self.module(own)
            if issubclass(cls, nnx.Embed):
                yield cls, "attend", self.module(cls.attend, "ᵀ")
            for name, value in vars(cls).items():
                if isinstance(value, FunctionType) and not name.startswith("_") and name != "attend":
                    yield cls, name, self.alias(value)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        missing = object()
        before = []
        try:
            for owner, name, value in list(self._changes()):
                before.append((owner, name, vars(owner).get(name, missing)))
                setattr(owner, name, value)
            yield
        finally:
            for owner, name, value in reversed(before):
                if value is missing:
                    delattr(owner, name)
                else:
                    setattr(owner, name, value)

    def arguments(self, model: bool) -> dict[str, Any]:
        """A symbol for each input, the least for all else. Of a model, positions are inputs too."""
        given: dict[str, Any] = {}
        for name, parameter in inspect.signature(type(self.root).__call__).parameters.items():
            kind = str(parameter.annotation)
            if name == "self":
                continue
            if "CrossCache" in kind:
                memory = self.graph.add("in", "encoder's output")
                given[name] = self.file.CrossCache(memory, memory, NOTHING)
            elif "Embed" in kind:
                given[name] = Table(self, name)
            elif model and name in ("cache", "key"):
                given[name] = None
            elif kind.startswith("jax.Array") and (name not in BESIDE or (model and name != "key")):
                given[name] = self.graph.add("in", name)
            else:
                given[name] = {"i": 0, "key": None}.get(name, NOTHING)
        return given

    def run(self, model: bool) -> list[Node]:
        given = self.arguments(model)
        own = dict(vars(self.root))
        with self.installed():
            for name, value in own.items():
                if isinstance(value, nnx.Variable):  # a shape without numbers, which nothing can be added to
                    vars(self.root)[name] = NOTHING
            if hasattr(self.root, "attend"):
                self.root.attend = vars(self.file)["attend"]
            if "keys_values" in vars(type(self.root)):  # what it attends to is projected before the call
                seen = self.graph.add("in", "x, or encoder's output")
                given["k"], given["v"] = self.root.keys_values(seen)
            self.root(**given)
        vars(self.root).update(own)
        return self.graph.used()


class Namespace:
    """In place of `jax` and `jnp`: what is called by any name below is noted."""

    def __init__(self, recorder: Recorder, name: str):
        self._recorder, self._name = recorder, name

    def __getattr__(self, name: str) -> Namespace:
        if name.startswith("__"):
            raise AttributeError(name)
        return Namespace(self._recorder, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._recorder.noted(self._name, args, kwargs)


class Activations:
    """In place of the table of activations: each notes its name."""

    def __init__(self, recorder: Recorder):
        self._recorder = recorder

    def __getitem__(self, name: str) -> Any:
        return lambda x: self._recorder.noted(name, (x,), {})


class Table:
    """In place of an embedding that is given as an argument."""

    def __init__(self, recorder: Recorder, name: str):
        self._recorder, self._name = recorder, name

    def attend(self, x: Any) -> Any:
        return self._recorder.noted(f"{self._name}ᵀ", (x,), {})


@dataclass
class Panel:
    """One class and what a call of it does; `path` is where the model has it first."""

    name: str
    path: str
    nodes: list[Node]
    module: Any


def panels(root: Any, *, model: bool = True) -> list[Panel]:
    """The root's call, and that of every class of its file below it: each class once, the outermost first."""
    found: list[Panel] = []
    waiting = [("", root)]
    seen = {type(root)}
    while waiting:
        path, module = waiting.pop(0)
        nodes = Recorder(module).run(model and module is root)
        found.append(Panel(type(module).__name__, path, nodes, module))
        for node in nodes:
            cls = type(node.module)
            if node.module is not None and cls not in seen and cls.__module__ == type(root).__module__:
                seen.add(cls)
                waiting.append((node.label, node.module))
    return found
