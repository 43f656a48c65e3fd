"""One table per architecture, every direction from one row.

A row says where a tensor lives on each side and which axes it has there, in einops notation. Moving from
one side to another is `einops.rearrange(x, f"{axes_there} -> {axes_here}")`, and swapping the two inverts
it; nothing is ever scaled, so a round trip is bit-identical. The axes also give the shape, so that
headers can be checked by arithmetic before a byte of data is read.

Where one side stores several of our parameters in one tensor, brackets list the parts, and each row says
which one it is: with `([N H | K H | K H]) D`, the queries', keys' and values' rows lie below each other.
Such a tensor is cut where it is read and packed where it is written.

Sides: `hf` (Hugging Face), `gguf`, `meta` (LLaMA as Meta publishes it), `flax` (transformers 4's Flax
models), `torch` and `jax` (the twins).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from twinformers.errors import WeightsError

if TYPE_CHECKING:
    import numpy as np

    from twinformers.checkpoints.base import TensorInfo

SIDES = ("hf", "gguf", "meta", "flax", "torch", "jax")


@dataclass(frozen=True)
class Place:
    """Where one parameter lives on one side: its tensor's name (`{i}` counts layers) and the tensor's axes.

    If the axes have brackets, `part` says which of the parts between them the parameter is.
    """

    name: str
    axes: str
    part: int = 0

    @property
    def fused(self) -> bool:
        """Whether the tensor holds other parameters too."""
        return "[" in self.axes

    @property
    def own_axes(self) -> str:
        """The axes of the part alone: part 0 of "([N H | K H | K H]) D" is "(N H) D"."""
        return re.sub(r"\[([^]]*)\]", lambda parts: parts[1].split("|")[self.part].strip(), self.axes)


@dataclass(frozen=True)
class Row:
    """One parameter: its places by side. `over` names the index of the repeated block, if any.

    What does not train is a weight like any other, but no parameter: see `Fixed`.
    """

    places: Mapping[str, Place]
    over: str | None = None
    trains: bool = True


@dataclass(frozen=True)
class Tied:
    """A tensor that a file may hold although the model reads another one in its place.

    It is accepted only if it equals that other tensor; the twins have no parameter for it.
    """

    places: Mapping[str, str]
    to: Mapping[str, str]


@dataclass(frozen=True)
class Buffer:
    """A tensor that a file may hold and that the configuration already determines; it is not read.

    `value` makes it, in float64, where files without it are incomplete to their reader: `port` writes it.
    """

    places: Mapping[str, str]
    value: Callable[[], np.ndarray] | None = None


#: How a row gives its place on another side: the name, the axes where they are not torch's, the part.
There = str | tuple[str, str] | tuple[str, str, int]


def _groups(axes: str) -> list[str]:
    """The axes of a pattern, parenthesised groups kept whole: "(N r h) D" -> ["(N r h)", "D"]."""
    return re.findall(r"\([^)]*\)|\S+", axes)


def _row(path: str, leaves: Mapping[str, str], axes: str, jax_axes: str, places: Mapping[str, There]) -> Row:
    sides = {
        "torch": Place(f"{path}.{leaves['torch']}", axes),
        "jax": Place(f"{path}.{leaves['jax']}", jax_axes),
    }
    for side, place in places.items():
        sides[side] = Place(place, axes) if isinstance(place, str) else Place(*place)
    index = re.search(r"\{(\w+)\}", path)
    return Row(sides, over=index[1] if index else None)


def Linear(path: str, axes: str, **places: There) -> Row:
    """A matrix: torch and Hugging Face store [out, in], Flax [in, out]. `axes` are torch's."""
    out, into = _groups(axes)
    return _row(path, {"torch": "weight", "jax": "kernel"}, axes, f"{into} {out}", places)


def Bias(path: str, axes: str, **places: There) -> Row:
    """What is added to each output feature: `bias` in both."""
    return _row(path, {"torch": "bias", "jax": "bias"}, axes, axes, places)


def Norm(path: str, axes: str, **places: There) -> Row:
    """The scale of a normalisation: torch's `weight`, Flax's `scale`."""
    return _row(path, {"torch": "weight", "jax": "scale"}, axes, axes, places)


def Embedding(path: str, axes: str, **places: There) -> Row:
    """A table of rows: torch's `weight`, Flax's `embedding`, [count, features] in both."""
    return _row(path, {"torch": "weight", "jax": "embedding"}, axes, axes, places)


def Fixed(path: str, axes: str, **places: There) -> Row:
    """A weight that is given and never learned: a buffer in torch, in Flax a Variable that is no Param."""
    row = _row(path, {"torch": "", "jax": ""}, axes, axes, places)
    return replace(
        row, places={s: replace(p, name=p.name.rstrip(".")) for s, p in row.places.items()}, trains=False
    )


def with_flax(rows: Iterable[Row | Tied | Buffer], **kept: str) -> tuple[Row | Tied | Buffer, ...]:
    """The rows with a side "flax": the parameters of this model's Flax class in transformers 4.

    They have Hugging Face's names joined by "/", and a `weight` is called and laid out as Flax does: `kernel`
    [in, out], `embedding` or `scale`. `kept` says what a class called one of these three instead.
    """
    return tuple(_with_flax(row, kept) if isinstance(row, Row) else row for row in rows)


def _with_flax(row: Row, kept: Mapping[str, str]) -> Row:
    hf, leaf = row.places["hf"], row.places["jax"].name.rpartition(".")[2]
    *path, last = hf.name.split(".")
    if last == "weight":
        last = kept.get(leaf, leaf)
    axes = " ".join(reversed(_groups(hf.axes))) if leaf == "kernel" else hf.axes
    return replace(row, places={**row.places, "flax": Place("/".join((*path, last)), axes, hf.part)})


@dataclass(frozen=True)
class Leaf:
    """One parameter of one model: a row with its layer filled in and its axes measured."""

    places: Mapping[str, Place]
    sizes: Mapping[str, int]
    trains: bool = True

    def name(self, side: str) -> str:
        return self.places[side].name

    def shape(self, side: str) -> tuple[int, ...]:
        """The shape of the tensor that the side stores, all its parts included."""
        measured = [self._measure(group) for group in _groups(self.places[side].axes)]
        return tuple(before * sum(widths) * after for before, widths, after in measured)

    def _measure(self, group: str) -> tuple[int, list[int], int]:
        """The sizes of what stands before the brackets, of each part between them, and of what follows."""
        before, _, rest = group.strip("()").partition("[")
        parts, _, after = rest.partition("]")
        *widths, first, last = (
            math.prod(int(a) if a.isdecimal() else self.sizes[a] for a in letters.split())
            for letters in [*parts.split("|"), before, after]
        )
        return first, widths, last

    def _parts(self, side: str) -> tuple[list[int], int, list[int]]:
        """A fused tensor's shape with its parts on an axis of their own (-1), that axis, and their widths."""
        shape: list[int] = []
        for group in _groups(self.places[side].axes):
            before, parts, after = self._measure(group)
            if "[" in group:
                axis, widths = len(shape) + 1, parts
                shape += [before, -1, after]
            else:
                shape.append(before)
        return shape, axis, widths

    def move(self, array: np.ndarray, source: str, target: str) -> np.ndarray:
        """The parameter in the axes of `target`, out of the tensor that `source` stores. Any dtype, bit for
        bit; a view where no element moves.
        """
        place, there = self.places[source], self.places[target].own_axes
        if place.fused:
            import numpy as np

            shape, axis, widths = self._parts(source)
            cuts = np.cumsum(widths)[:-1]
            array = np.split(array.reshape(shape), cuts, axis)[place.part]
            array = array.reshape([self._measure(group)[0] for group in _groups(place.own_axes)])
        if (here := place.own_axes) == there:
            return array
        from einops import rearrange

        return rearrange(
            array, f"{here} -> {there}", **{a: self.sizes[a] for a in re.findall(r"[A-Za-z]\w*", here)}
        )

    def order(self, source: str, target: str) -> list[int] | None:
        """For each axis of `target`, which of `source` it is, where no axis is taken apart; else None."""
        here, there = self.places[source], self.places[target]
        if here.fused or there.fused:
            return None
        axes = _groups(here.axes)
        if len(set(axes)) < len(axes) or set(axes) != set(_groups(there.axes)):
            return None
        return [axes.index(group) for group in _groups(there.axes)]

    def pack(self, pieces: list[np.ndarray], side: str) -> np.ndarray:
        """The tensor that the side stores, from all its parts in their order there."""
        if not self.places[side].fused:
            return pieces[0]
        import numpy as np

        shape, axis, _ = self._parts(side)
        return np.concatenate([piece.reshape(shape) for piece in pieces], axis).reshape(self.shape(side))


@dataclass(frozen=True)
class WeightMap:
    """The table of one architecture, measured for one configuration.

    `modules` pairs our submodule paths with Hugging Face's, for comparing activations; rows pair the rest.
    `absent` says why there is no Hugging Face side, where the rows have none.
    """

    rows: tuple[Row | Tied | Buffer, ...]
    sizes: Mapping[str, int]
    counts: Mapping[str, int]
    modules: Mapping[str, str]
    absent: str = ""
    _cache: dict[str, dict[str, list[Leaf]]] = field(default_factory=dict, compare=False, repr=False)

    def tensors(self, side: str) -> dict[str, list[Leaf]]:
        """Every tensor that the side must have, by its name there, in the order of the table.

        Each with the parameters that it holds, in their order there: one, unless it is fused. Raises
        WeightsError if the rows leave out a part or name it twice, and for a side that they do not have.
        """
        if side not in self._cache:
            result: dict[str, list[Leaf]] = {}
            for leaf in self._expand():
                if side not in leaf.places:
                    raise WeightsError(
                        "this model has no such form",
                        where=side,
                        expected=f"one of {', '.join(sorted(leaf.places))}",
                        found=f"no place for {leaf.name('torch')}",
                        hint=self.absent,
                    )
                result.setdefault(leaf.name(side), []).append(leaf)
            for name, parts in result.items():
                parts.sort(key=lambda leaf: leaf.places[side].part)
                found = [leaf.places[side].part for leaf in parts]
                expected = list(range(parts[0].places[side].axes.count("|") + 1))
                if found != expected:
                    raise WeightsError(
                        "the rows of a tensor are not its parts",
                        where=f"{side}: {name}",
                        expected=f"parts {expected}",
                        found=str(found),
                    )
            self._cache[side] = result
        return self._cache[side]

    @property
    def sides(self) -> list[str]:
        """The sides that this model has all of."""
        rows = [r for r in self.rows if isinstance(r, Row)]
        return [side for side in SIDES if all(side in r.places for r in rows)]

    def leaves(self, side: str) -> dict[str, Leaf]:
        """Every tensor of a side that fuses none, such as the twins': by its name, its one parameter."""
        return {name: leaf for name, (leaf,) in self.tensors(side).items()}

    def produce(self, name: str, side: str, read: Callable[[str], np.ndarray], source: str) -> np.ndarray:
        """The tensor `name` of `side`, made of what `read` gives for the names that `source` has."""
        parts = self.tensors(side)[name]
        return parts[0].pack([leaf.move(read(leaf.name(source)), source, side) for leaf in parts], side)

    def _expand(self) -> Iterator[Leaf]:
        rows = [r for r in self.rows if isinstance(r, Row)]
        yield from (Leaf(r.places, self.sizes, r.trains) for r in rows if r.over is None)
        for index, count in self.counts.items():
            repeated = [r for r in rows if r.over == index]
            for n in range(count):
                for r in repeated:
                    filled = {
                        s: replace(p, name=p.name.replace(f"{{{index}}}", str(n)))
                        for s, p in r.places.items()
                    }
                    yield Leaf(filled, self.sizes, r.trains)

    @property
    def parameters(self) -> int:
        """How many numbers the model learns; a tied head counts once."""
        return sum(math.prod(leaf.shape("torch")) for leaf in self.leaves("torch").values() if leaf.trains)

    def tied(self, side: str) -> dict[str, str]:
        """Tensors that the side may hold in addition, each with the one that it must equal."""
        return {r.places[side]: r.to[side] for r in self.rows if isinstance(r, Tied) and side in r.places}

    def buffers(self, side: str) -> set[str]:
        names = [r.places[side] for r in self.rows if isinstance(r, Buffer) and side in r.places]
        return {
            n.replace("{i}", str(k)) for n in names for k in (range(self.counts["i"]) if "{i}" in n else [0])
        }

    def written(self, side: str) -> dict[str, Callable[[], np.ndarray]]:
        """Tensors that hold no weight of ours and that the side's reader misses: what makes each, by name."""
        rows = [r for r in self.rows if isinstance(r, Buffer) and side in r.places]
        return {r.places[side]: r.value for r in rows if r.value is not None}

    def module_paths(self) -> dict[str, str]:
        """Our submodule paths to Hugging Face's, layers filled in; the paths of leaves included.

        A fused tensor's module has no counterpart here: it returns several of ours in one.
        """
        pairs = {
            r.places["torch"].name.rpartition(".")[0]: r.places["hf"].name.rpartition(".")[0]
            for r in self.rows
            # A name without a dot is a tensor of the model itself.
            if isinstance(r, Row) and not r.places["hf"].fused and "." in r.places["torch"].name
        }
        result = {}
        for ours, theirs in (pairs | dict(self.modules)).items():
            index = re.search(r"\{(\w+)\}", ours)
            for n in range(self.counts[index[1]]) if index else [None]:
                result[ours.replace(index[0], str(n)) if index else ours] = (
                    theirs.replace(index[0], str(n)) if index else theirs
                )
        return result

    def check(self, side: str, tensors: Mapping[str, TensorInfo], where: str) -> None:
        """Compare headers with the table: nothing missing, nothing left over, every shape as it must be.

        Raises WeightsError naming file, tensor, expected and found.
        """
        leaves = self.tensors(side)
        missing = [name for name in leaves if name not in tensors]
        extra = sorted(tensors.keys() - leaves.keys() - self.buffers(side) - self.tied(side).keys())
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
        shapes = {name: parts[0].shape(side) for name, parts in leaves.items()}
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
