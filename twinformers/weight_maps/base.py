"""One table per architecture, every direction from one row.

A row says where a tensor lives on each side and which axes it has there, in einops notation. Moving from
one side to another is `einops.rearrange(x, f"{axes_there} -> {axes_here}")`, and swapping the two inverts
it; nothing is ever scaled, so a round trip is bit-identical. The axes also give the shape, so that
headers can be checked by arithmetic before a byte of data is read.

Sides: `hf` (Hugging Face), `gguf`, `torch` and `jax` (the twins).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from twinformers.errors import WeightsError

if TYPE_CHECKING:
    import numpy as np

    from twinformers.checkpoints.base import TensorInfo

SIDES = ("hf", "gguf", "torch", "jax")


@dataclass(frozen=True)
class Place:
    """Where one tensor lives on one side: its name there (`{i}` counts layers) and its axes."""

    name: str
    axes: str


@dataclass(frozen=True)
class Row:
    """One parameter: its places by side. `over` names the index of the repeated block, if any."""

    places: Mapping[str, Place]
    over: str | None = None


@dataclass(frozen=True)
class Tied:
    """A tensor that a file may hold although the model reads another one in its place.

    It is accepted only if it equals that other tensor; the twins have no parameter for it.
    """

    places: Mapping[str, str]
    to: Mapping[str, str]


@dataclass(frozen=True)
class Buffer:
    """A tensor that a file may hold and that the configuration already determines; it is not read."""

    places: Mapping[str, str]


def _groups(axes: str) -> list[str]:
    """The axes of a pattern, parenthesised groups kept whole: "(N r h) D" -> ["(N r h)", "D"]."""
    return re.findall(r"\([^)]*\)|\S+", axes)


def _row(path: str, leaves: Mapping[str, str], axes: str, jax_axes: str, places: Mapping[str, Any]) -> Row:
    sides = {
        "torch": Place(f"{path}.{leaves['torch']}", axes),
        "jax": Place(f"{path}.{leaves['jax']}", jax_axes),
    }
    for side, place in places.items():
        name, there = (place, axes) if isinstance(place, str) else place
        sides[side] = Place(name, there)
    return Row(sides, over="i" if "{i}" in path else None)


def Linear(path: str, axes: str, **places: str | tuple[str, str]) -> Row:
    """A matrix: torch and Hugging Face store [out, in], Flax [in, out]. `axes` are torch's."""
    out, into = _groups(axes)
    return _row(path, {"torch": "weight", "jax": "kernel"}, axes, f"{into} {out}", places)


def Norm(path: str, axes: str, **places: str | tuple[str, str]) -> Row:
    """The scale of a normalisation: torch's `weight`, Flax's `scale`."""
    return _row(path, {"torch": "weight", "jax": "scale"}, axes, axes, places)


def Embedding(path: str, axes: str, **places: str | tuple[str, str]) -> Row:
    """A table of rows: torch's `weight`, Flax's `embedding`, [count, features] in both."""
    return _row(path, {"torch": "weight", "jax": "embedding"}, axes, axes, places)


@dataclass(frozen=True)
class Leaf:
    """One tensor of one model: a row with its layer filled in and its axes measured."""

    places: Mapping[str, Place]
    sizes: Mapping[str, int]

    def name(self, side: str) -> str:
        return self.places[side].name

    def shape(self, side: str) -> tuple[int, ...]:
        return tuple(
            math.prod(self.sizes[a] for a in group.strip("()").split())
            for group in _groups(self.places[side].axes)
        )

    def move(self, array: np.ndarray, source: str, target: str) -> np.ndarray:
        """The tensor as `target` stores it; a view where no element moves. Any dtype, bit for bit."""
        here, there = self.places[source].axes, self.places[target].axes
        if here == there:
            return array
        from einops import rearrange

        return rearrange(array, f"{here} -> {there}", **{a: self.sizes[a] for a in re.findall(r"\w+", here)})

    def moves(self, source: str, target: str) -> bool:
        """Whether any element changes its place between the two sides."""
        return self.places[source].axes != self.places[target].axes


@dataclass(frozen=True)
class WeightMap:
    """The table of one architecture, measured for one configuration.

    `modules` pairs our submodule paths with Hugging Face's, for comparing activations; rows pair the rest.
    """

    rows: tuple[Row | Tied | Buffer, ...]
    sizes: Mapping[str, int]
    counts: Mapping[str, int]
    modules: Mapping[str, str]
    _cache: dict[str, dict[str, Leaf]] = field(default_factory=dict, compare=False, repr=False)

    def leaves(self, side: str) -> dict[str, Leaf]:
        """Every tensor that the side must have, by its name there, in the order of the table."""
        if side not in self._cache:
            self._cache[side] = {leaf.name(side): leaf for leaf in self._expand()}
        return self._cache[side]

    def _expand(self) -> Iterator[Leaf]:
        rows = [r for r in self.rows if isinstance(r, Row)]
        yield from (Leaf(r.places, self.sizes) for r in rows if r.over is None)
        for index, count in self.counts.items():
            repeated = [r for r in rows if r.over == index]
            for n in range(count):
                for r in repeated:
                    filled = {
                        s: Place(p.name.replace(f"{{{index}}}", str(n)), p.axes) for s, p in r.places.items()
                    }
                    yield Leaf(filled, self.sizes)

    @property
    def parameters(self) -> int:
        """How many numbers the model learns; a tied head counts once."""
        return sum(math.prod(leaf.shape("torch")) for leaf in self.leaves("torch").values())

    def tied(self, side: str) -> dict[str, str]:
        """Tensors that the side may hold in addition, each with the one that it must equal."""
        return {r.places[side]: r.to[side] for r in self.rows if isinstance(r, Tied) and side in r.places}

    def _buffers(self, side: str) -> set[str]:
        names = [r.places[side] for r in self.rows if isinstance(r, Buffer) and side in r.places]
        return {
            n.replace("{i}", str(k)) for n in names for k in (range(self.counts["i"]) if "{i}" in n else [0])
        }

    def module_paths(self) -> dict[str, str]:
        """Our submodule paths to Hugging Face's, layers filled in; the paths of leaves included."""
        pairs = {
            r.places["torch"].name.rpartition(".")[0]: r.places["hf"].name.rpartition(".")[0]
            for r in self.rows
            if isinstance(r, Row)
        }
        result = {}
        for ours, theirs in (pairs | dict(self.modules)).items():
            if "{i}" in ours:
                for n in range(self.counts["i"]):
                    result[ours.replace("{i}", str(n))] = theirs.replace("{i}", str(n))
            else:
                result[ours] = theirs
        return result

    def check(self, side: str, tensors: Mapping[str, TensorInfo], where: str) -> None:
        """Compare headers with the table: nothing missing, nothing left over, every shape as it must be.

        Raises WeightsError naming file, tensor, expected and found.
        """
        leaves = self.leaves(side)
        missing = [name for name in leaves if name not in tensors]
        extra = sorted(tensors.keys() - leaves.keys() - self._buffers(side) - self.tied(side).keys())
        if missing:
            also = f"; left over: {_some(extra)}" if extra else ""
            raise WeightsError(
                f"{_count(missing)} missing",
                where=where,
                expected=_some(missing),
                found=f"{len(tensors)} tensors without {'it' if len(missing) == 1 else 'them'}{also}",
                hint="the file is incomplete, or config.json belongs to another model",
            )
        if extra:
            raise WeightsError(
                f"{_count(extra)} left over",
                where=f"{tensors[extra[0]].file or where}: {_some(extra)}",
                expected=f"the {len(leaves)} tensors of this configuration",
                found=f"{len(tensors)} tensors",
                hint="config.json belongs to another model, or to a variant that is not implemented",
            )
        shapes = {name: leaf.shape(side) for name, leaf in leaves.items()}
        shapes |= {name: shapes[to] for name, to in self.tied(side).items() if name in tensors}
        for name, shape in shapes.items():
            if tensors[name].shape != shape:
                raise WeightsError(
                    "wrong shape",
                    where=f"{tensors[name].file or where}: {name}",
                    expected=str(list(shape)),
                    found=str(list(tensors[name].shape)),
                    hint="config.json and the weights belong to different models",
                )


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'}"


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
