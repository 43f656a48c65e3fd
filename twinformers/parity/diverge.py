"""Where two models part, and why: `twinformers.diverge(left, right)`.

Both sides are recorded in float64, every call of every submodule. Then the calls are gone through in the
order of completion. Where two outputs differ, the right's submodule is called again with the inputs of the
left's: if that closes the gap, the submodule only passed on what it was given. The first one that differs
all the same is the cause, and since all its parts agreed, it is its own code or its own parameters. What its
first differing part was given says where in it. Then hypotheses are tried until one makes the difference
vanish.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from twinformers.errors import UsageError
from twinformers.parity.diverging.case import Case
from twinformers.parity.diverging.gradients import Backward
from twinformers.parity.diverging.hypotheses import Explanation, explanations
from twinformers.parity.diverging.opening import from_source, stranger
from twinformers.parity.diverging.sides import Call, Side
from twinformers.parity.diverging.values import Layout, Leaves, distance, expand, pair_leaves
from twinformers.parity.kinds import real

#: The largest difference that counts as none, relative to the tensor's largest value.
LIMIT = 1e-9


@dataclass(frozen=True)
class Step:
    """One submodule: its difference as recorded, and with the same inputs where that was tried.

    `verdict` is "equal", "consequence" (the same inputs close the gap), "cause", or "not alone" where it
    could not be called with the left's inputs. Differences are relative; infinite where nothing compares.
    """

    path: str
    recorded: float | None
    same_inputs: float | None
    verdict: str
    note: str = ""


@dataclass(frozen=True)
class DivergeReport:
    """Where two models part. `culprit` is a path, "" the model itself, None if they do not part.

    `where` says what in the culprit shows the difference first. `explanation` makes the difference vanish;
    where there is none, `best` names what came closest.
    """

    left: str
    right: str
    of: str
    limit: float
    diverged: bool
    culprit: str | None
    where: str
    explanation: Explanation | None
    best: Explanation | None
    steps: list[Step]
    notes: list[str] = field(default_factory=list)

    @property
    def hypothesis(self) -> str | None:
        """The name of the hypothesis that makes the difference vanish."""
        return self.explanation.hypothesis if self.explanation else None

    @property
    def verdict(self) -> str:
        """The outcome in a few sentences."""
        if not self.diverged:
            return f"No divergence: {len(self.steps)} {self.of} agree within {self.limit:g}."
        step = next(s for s in self.steps if s.verdict == "cause")
        name = self.culprit or "the model itself"
        said = f"First divergence: {name}, off by {step.same_inputs:.1e} with the same inputs. {self.where}"
        if self.explanation:
            e = self.explanation
            return f"{said}\nExplained by: {e.hypothesis} ({e.change}). In general: {e.meaning}."
        if self.best:
            b = self.best
            return (
                f"{said}\nNone of the hypotheses explains it. The closest, {b.hypothesis} ({b.change}), "
                f"leaves {b.after:.1e} of {b.before:.1e}."
            )
        return f"{said}\nNone of the hypotheses explains it."

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what is infinite is None."""
        plain = {**asdict(self), "hypothesis": self.hypothesis, "verdict": self.verdict}
        return _finite(plain)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def diverge(
    left: Any,
    right: Any,
    *,
    inputs: Sequence[Any] | None = None,
    paths: Mapping[str, str] | None = None,
    call_left: Callable[..., Any] | None = None,
    call_right: Callable[..., Any] | None = None,
    layouts: Mapping[str, str] | None = None,
    limit: float = LIMIT,
    gradients: bool = False,
    on_progress: Callable[[str], None] = lambda text: None,
) -> DivergeReport:
    """Find the first submodule in which two models differ by themselves, and try to say why.

    A side is "jax:SOURCE", "torch:SOURCE", "hf:FOLDER", an `nnx.Module` or a `torch.nn.Module`; modules are
    copied and made float64. `inputs` are the arrays for `model(*inputs)`, by default those that `verify`
    uses; `call_left(model, *inputs)` and `call_right` make another call of it and return the output. `paths`
    maps the left's submodules to the right's, `{i}` standing for a number; by default those of the same name.
    `layouts` maps the left's paths (with wildcards) to patterns such as "b t d -> t b d" where the right
    keeps its axes in another order. With `gradients`, the backward pass is searched once the forward pass
    agrees.

    Raises UsageError for sides, paths and inputs that make no sense, and the errors of a source.
    """
    if not limit > 0:
        raise UsageError("bad value", where="limit", expected="a positive number", found=str(limit))
    on_progress("loading")
    sides, notes = _sides(left, right, inputs, {"left": call_left, "right": call_right})
    found = {}
    for name, side in sides.items():
        on_progress(f"recording {side.name}")
        found[name] = _record(side)
    search = _Search(
        sides["left"],
        sides["right"],
        found["left"],
        found["right"],
        _mapping(sides, found, paths),
        {pattern: Layout(text) for pattern, text in (layouts or {}).items()},
        limit,
        notes,
        on_progress,
    )
    report = search.outputs()
    return search.gradients() if gradients and not report.diverged else report


def _sides(
    left: Any, right: Any, inputs: Sequence[Any] | None, calls: Mapping[str, Callable[..., Any] | None]
) -> tuple[dict[str, Side], list[str]]:
    """Both sides, fed with the same inputs, and how their configurations differ."""
    sides: dict[str, Side] = {}
    configs: dict[str, Any] = {}
    for name, given in (("left", left), ("right", right)):
        if isinstance(given, str):
            sides[name], configs[name] = from_source(given)
    if len(configs) == 2 and configs["left"].architecture != configs["right"].architecture:
        raise UsageError(
            "two architectures have no common submodules",
            where=f"{left} and {right}",
            expected=configs["left"].architecture,
            found=configs["right"].architecture,
        )
    chosen = next((s.inputs for s in sides.values()), None) if inputs is None else tuple(map(_plain, inputs))
    if chosen is None:
        raise UsageError(
            "nothing to feed the modules", where="inputs", expected="a tuple of arrays for model(*inputs)"
        )
    for name, given in (("left", left), ("right", right)):
        if name in sides:
            sides[name].inputs = chosen
            sides[name].invoke = calls[name] or sides[name].invoke
        else:
            sides[name] = stranger(given, name, calls[name], chosen)
    notes = []
    if len(configs) == 2:
        for f in fields(configs["left"]):
            a, b = (getattr(configs[name], f.name) for name in ("left", "right"))
            if a != b:
                notes.append(f"the configurations differ: {f.name} is {a} on the left, {b} on the right")
    return {name: sides[name] for name in ("left", "right")}, notes


def _plain(x: Any) -> np.ndarray:
    array = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
    return array.astype(np.float64) if np.issubdtype(array.dtype, np.floating) else array


def _record(side: Side) -> dict[str, Call]:
    try:
        return side.record()
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            "the model cannot be called with these inputs",
            where=side.name,
            expected=f"invoke(model, {', '.join(str(list(x.shape)) for x in side.inputs)})",
            found=f"{type(error).__name__}: {error}"[:300],
            hint="give a call_left or call_right that calls it as it wants to be called",
        ) from error


def _mapping(
    sides: Mapping[str, Side], calls: Mapping[str, dict[str, Call]], paths: Mapping[str, str] | None
) -> dict[str, str]:
    """{left path: right path}. Raises UsageError for paths that a side does not have."""
    ours, theirs = (sides[name].modules() for name in ("left", "right"))
    if paths is None:
        found = {name: name for name in ours if name in theirs}
    else:
        found = expand(paths, list(ours))
        for pattern in paths:
            if "{i}" in pattern and not expand({pattern: ""}, list(ours)):
                found[pattern] = paths[pattern]  # matches nothing: refused below
        for name, have, wanted in (("left", ours, found), ("right", theirs, found.values())):
            if missing := [path for path in wanted if path not in have]:
                raise UsageError(
                    "no such submodule",
                    where=f"paths, {name} side: {missing[0]}",
                    expected="one of " + ", ".join(sorted(path for path in have if path)[:12]),
                    found=missing[0],
                )
    if not any(a in calls["left"] and b in calls["right"] for a, b in found.items() if a):
        raise UsageError(
            "the two sides have no submodule in common",
            where="paths",
            expected="{left path: right path}",
            found=f"left {', '.join(sorted(ours)[1:5])}; right {', '.join(sorted(theirs)[1:5])}",
            hint="map the left's paths to the right's; {i} stands for a number",
        )
    return {**found, "": ""}


@dataclass
class _Search:
    left: Side
    right: Side
    ours: dict[str, Call]
    theirs: dict[str, Call]
    names: dict[str, str]
    patterns: dict[str, Layout]
    limit: float
    notes: list[str]
    on_progress: Callable[[str], None]

    def keep(self, x: np.ndarray) -> Any:
        """Which rows of an array mean something: those of real tokens, where a source gave the inputs."""
        sources = ":" in self.left.name or ":" in self.right.name
        return real(x, self.left.inputs) if sources and x.ndim >= 2 else ...

    def layout(self, path: str) -> Layout | None:
        name = path.partition("#")[0]
        return next((x for p, x in self.patterns.items() if fnmatch.fnmatchcase(name, p)), None)

    def pairs(self) -> dict[str, tuple[Call, Call]]:
        """The calls that both sides made, in the left's order."""
        found = {}
        for path, call in self.ours.items():
            name, number, count = path.partition("#")
            if (there := self.theirs.get(f"{self.names.get(name, '#')}{number}{count}")) is not None:
                found[path] = call, there
        return found

    def given(self, ours: Call, theirs: Call) -> Leaves:
        """The left's inputs as the right's call takes them: those that correspond."""
        layout = self.layout(ours.path)
        moved = {n: layout.to_right(x) if layout else x for n, x in ours.leaves.items()}
        return {b: moved[a] for b, a in pair_leaves(moved, theirs.leaves).items()}

    def aligned(self, path: str, x: np.ndarray, like: np.ndarray) -> np.ndarray:
        layout = self.layout(path)
        return layout.to_left(x, like) if layout else x

    def outputs(self) -> DivergeReport:
        """The walk through the forward pass."""
        steps: list[Step] = []
        for path, (a, b) in self.pairs().items():
            self.on_progress(f"comparing {path or 'the model'}")
            gap = distance(a.output, self.aligned(path, b.output, a.output), self.keep)
            if gap <= self.limit:
                steps.append(Step(path, gap, None, "equal"))
                continue
            same, note = (gap, "") if path == "" else self._again(a, b)
            verdict = "not alone" if note else "consequence" if same <= self.limit else "cause"
            steps.append(Step(path, gap, None if note else same, verdict, note))
            if verdict == "cause":
                return self._explained(steps, a, b)
        return self._report("submodules", steps, None, "", None, None)

    def _again(self, a: Call, b: Call) -> tuple[float, str]:
        """The difference with the left's inputs on the right, or why there is none."""
        try:
            found = self.right.call(b, self.given(a, b))
        except Exception as error:  # a stranger's module may need more than its arguments
            return math.inf, f"{type(error).__name__}: {error}"[:200]
        return distance(a.output, self.aligned(a.path, found, a.output), self.keep), ""

    def _explained(self, steps: list[Step], a: Call, b: Call) -> DivergeReport:
        prefix = f"{a.path}." if a.path else ""
        first = next(
            (s.path for s in steps if s.verdict == "consequence" and s.path.startswith(prefix)), None
        )
        pairs = self.pairs()
        outer = self._outermost(first, prefix) if first else None
        case = Case(
            {"left": self.left, "right": self.right},
            {"left": a, "right": b},
            {"left": {}, "right": {} if a.path == "" else self.given(a, b)},
            {"left": first, "right": pairs[first][1].path} if first else None,
            dict(zip(("left", "right"), pairs[outer], strict=True)) if outer else None,
            self.keep,
            self.layout,
            self.limit,
        )
        best: Explanation | None = None
        self.on_progress("trying hypotheses")
        for tried in explanations(case):
            if best is None or tried.after < best.after:
                best = tried
            if tried.after <= self.limit:
                return self._report("submodules", steps, a.path, self._where(steps, a, outer), tried, None)
        if best is not None and not best.after < best.before / 2:
            best = None  # that is no reduction
        return self._report("submodules", steps, a.path, self._where(steps, a, outer), None, best)

    def _gaps(self, path: str) -> dict[str, float]:
        """Which arguments of a submodule differ as recorded, and by how much."""
        a, b = self.pairs()[path]
        layout = self.layout(path)
        moved = {n: layout.to_right(x) if layout else x for n, x in a.leaves.items()}
        gaps = {
            ours: distance(moved[ours], b.leaves[theirs], self.keep)
            for theirs, ours in pair_leaves(moved, b.leaves).items()
        }
        return {name: gap for name, gap in gaps.items() if gap > self.limit}

    def _outermost(self, first: str, prefix: str) -> str:
        """The largest part of the culprit that holds `first` and whose own arguments already differ."""
        given = self.pairs()
        parts = first.removeprefix(prefix).split(".")
        around = [prefix + ".".join(parts[:n]) for n in range(1, len(parts))]
        return next((path for path in around if path in given and self._gaps(path)), first)

    def _where(self, steps: list[Step], culprit: Call, first: str | None) -> str:
        """What within the culprit shows the difference first, in words."""
        prefix = f"{culprit.path}." if culprit.path else ""
        inside = [s for s in steps if s.path.startswith(prefix) and s.path != culprit.path]
        if not inside:
            return "It has no submodules that both sides call: its own code or its parameters differ."
        if first is None:
            return f"All that it calls agrees, up to {inside[-1].path}: its own code differs."
        off = [f"{name} ({gap:.1e})" for name, gap in self._gaps(first).items()]
        agreed = next(
            (s.path for s in reversed(steps) if s.verdict == "equal" and not s.path.startswith(first)), ""
        )
        off = off or ["some that do not correspond"]
        return (
            f"Its own code differs before {first}, whose arguments already differ: {', '.join(off)}"
            f"{f'; all up to {agreed} agrees' if agreed else ''}."
        )

    def gradients(self) -> DivergeReport:
        """The walk through the backward pass: in reverse, the parts of a submodule before the submodule."""
        backward = Backward(self.left, self.right, self.names, self.keep, self.layout, self.given)
        pairs = self.pairs()
        self.on_progress("gradients of the whole model")
        whole, _ = backward.gaps(*pairs[""], self.limit)
        steps: list[Step] = []
        for path, (a, b) in sorted(pairs.items(), key=lambda item: -item[1][0].start):
            self.on_progress(f"gradients of {path or 'the model'}")
            prefix = f"parameter {path}." if path else ""
            recorded = max((d for name, d in whole.items() if name.startswith(prefix)), default=None)
            try:
                differences, gaps = backward.gaps(a, b, self.limit)
            except Exception as error:  # as in `_again`
                note = f"{type(error).__name__}: {error}"[:200]
                steps.append(Step(path, recorded, None, "not alone", note))
                continue
            worst = max(differences.values(), default=0.0)
            passed_on = recorded is not None and recorded > self.limit
            verdict = "cause" if gaps else "consequence" if passed_on else "equal"
            steps.append(Step(path, recorded, worst, verdict, "; ".join(g.note for g in gaps)))
            if gaps:
                named = next((g for g in gaps if g.reason), None)
                explanation = (
                    Explanation(named.reason, named.note, named.name, named.difference, 0.0)
                    if named
                    else None
                )
                where = " ".join(f"{g.note[0].upper()}{g.note[1:]}." for g in gaps[:4])
                return self._report("submodules' gradients", steps, path, where, explanation, None)
        return self._report("submodules' gradients", steps, None, "", None, None)

    def _report(
        self,
        of: str,
        steps: list[Step],
        culprit: str | None,
        where: str,
        explanation: Explanation | None,
        best: Explanation | None,
    ) -> DivergeReport:
        alone = sorted({p for p in self.ours if p and p not in self.pairs()})
        notes = [*self.notes, *([f"only on the left: {', '.join(alone[:8])}"] if alone else [])]
        diverged = culprit is not None
        names = (self.left.name, self.right.name)
        return DivergeReport(
            *names, of, self.limit, diverged, culprit, where, explanation, best, steps, notes
        )
