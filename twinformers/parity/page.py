"""What the HTML pages share: where they are written, their templates, figures, failures and plots.

A page needs nothing but itself: no script, no font and no picture from elsewhere, and its policy forbids
the browser to fetch any. What a source calls itself is foreign text, so everything is escaped.
"""

from __future__ import annotations

import datetime
import itertools
import math
import os
import platform
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from twinformers.checkpoints import Checkpoint
from twinformers.errors import DestinationError
from twinformers.loading import find_device
from twinformers.parity.results import CheckResult
from twinformers.weight_maps import weight_map

#: What is compared submodule by submodule; every other result has a row in a table of its own.
PAIRS = (("jax", "torch"), ("jax", "transformers"), ("torch", "transformers"))
BY_SUBMODULE = ("logits", "activations", "reference")
EXPLAINED = {
    "cache": "the prompt in uneven chunks and single steps, against one full pass",
    "generation": "the tokens that both choose",
    "rounding": "the error of the logits against float64, and how large honest rounding may make it",
    "gradients": "of parameters and outputs, relative to their largest or a part of the model's",
    "tokens": "the likeliest next token at every position of a text",
    "training": "one update from the same state",
    "training-run": "many updates, each twin on its own",
}
NAMES = {"jax": "Flax", "torch": "PyTorch"}
PACKAGES = ("twinformers", "jax", "flax", "torch", "transformers", "numpy")
LOGITS = "logits"  # the path of the model's own output, the last row
DOCTYPE = "<!doctype html>"
KINDS = {DOCTYPE: "HTML page"}

Cells = Mapping[tuple[str, str, tuple[str, str]], CheckResult]


def write_page(path: str | Path, template: str, **values: Any) -> None:
    """Fill a template and write it; the page appears whole or not at all, in place of an earlier one.

    Raises DestinationError for a path that cannot be written or holds something else.
    """
    write_text(path, _environment().get_template(template).render(size=SIZE, explained=EXPLAINED, **values))


def write_text(path: str | Path, text: str, begins: str = DOCTYPE) -> None:
    """Write a report that begins like that, whole or not at all; errors as above."""
    path = check_destination(path, begins)
    temporary = _beside(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _environment() -> Any:
    import jinja2

    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([here, here.parent / "benchmarks"]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": figure,
        "judged": is_judged,
        "limit": lambda value: f"{value:.1e}".replace(".0e", "e"),
        "named": lambda side: NAMES.get(side, side),
        "visible": visible,
    }
    return environment


def figure(value: float | None) -> str:
    if value is None:
        return "no figure"
    return f"{value:.1e}" if value else "0"


def visible(text: str) -> str:
    """A token's text with nothing in it that cannot be seen."""
    marked = text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in marked) or "∅"


def check_destination(path: str | Path, begins: str = DOCTYPE) -> Path:
    """The path, if a report can be written there: ask before minutes of work, not after.

    An earlier report is told by what it `begins` with.

    Raises DestinationError where the folder is missing or not writable, and where the path holds anything
    but an earlier report: a slip of the hand must not cost a checkpoint.
    """
    path = Path(path).expanduser()
    if not path.parent.is_dir():
        raise DestinationError(
            "the folder for the report does not exist",
            where=str(path),
            expected=f"a folder {path.parent}",
            found="a file" if path.parent.exists() else "nothing",
            hint="create it, or name another file",
        )
    probe = _beside(path)
    try:
        if path.is_dir() or (path.exists() and path.stat().st_size and not _begins(path, begins)):
            raise DestinationError(
                "the path of the report is taken",
                where=str(path),
                expected="a new file, or an earlier report",
                found="a folder"
                if path.is_dir()
                else f"a file that is no {KINDS.get(begins, 'such report')}",
                hint="name another file",
            )
        probe.touch()
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        probe.unlink(missing_ok=True)
    return path


def _begins(path: Path, begins: str) -> bool:
    with path.open("rb") as file:
        return file.read(len(begins.encode())).lower() == begins.lower().encode()


def _beside(path: Path) -> Path:
    return path.parent / f".report.{uuid.uuid4().hex[:8]}.tmp"


def _unwritable(path: Path, error: OSError) -> DestinationError:
    return DestinationError(
        "the report cannot be written",
        where=str(path),
        found=error.strerror or str(error),
        hint="check permissions and free space",
    )


def is_judged(result: CheckResult) -> bool:
    """Whether the result has a limit, or is right or wrong without one, as chosen tokens are."""
    return result.limit is not None or result.check in ("generation", "tokens") or not result.ok


def _figure(value: float | None) -> str:
    if value is None:
        return "no figure"
    return f"{value:.1e}" if value else "0"


def severity(result: CheckResult) -> tuple[bool, float]:
    """Orders results from harmless to worst: failures last, and nothing is worse than what is not finite."""
    return not result.ok, math.inf if result.max_rel is None else result.max_rel


class Failure(NamedTuple):
    """The failed results of one kind: how many of how many, and the first in the order of execution."""

    first: CheckResult
    failed: int
    total: int


def failures(checks: Sequence[CheckResult]) -> list[Failure]:
    """What failed, by check, dtype and pair; a submodule comes before the logits that it spoils."""
    kinds: dict[tuple[str, ...], list[CheckResult]] = {}
    for r in checks:
        kinds.setdefault((r.check, r.dtype, r.left, r.right), []).append(r)
    found = []
    for results in kinds.values():
        failed = sorted((r for r in results if not r.ok), key=lambda r: not r.path)
        if failed:
            found.append(Failure(failed[0], len(failed), len(results)))
    return found


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of Python and of packages, by name."""
    versions = {"Python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def facts(
    report: Any, checkpoint: Checkpoint | None, referred: bool, jax_device: Any, torch_device: Any
) -> dict[str, str]:
    """What ran where, each fact by its name for people; `referred`: transformers ran too."""
    import jax
    import torch

    versions = installed(PACKAGES)
    on_jax = find_device("jax", jax_device) or jax.devices()[0]
    on_torch = find_device("torch", torch_device) or torch.get_default_device()
    card = f" ({torch.cuda.get_device_name(on_torch)})" if on_torch.type == "cuda" else ""
    about = {"source": report.source, "architecture": report.architecture}
    if checkpoint:
        parameters = weight_map(checkpoint.config).parameters
        about |= {"parameters": f"{parameters:,}", "format": checkpoint.format}
    return {
        **about,
        **versions,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "Flax ran on": f"{on_jax.platform} ({on_jax.device_kind})",
        "PyTorch ran on": f"{on_torch}{card}",
        "transformers ran on": "cpu, eager attention" if referred else "nothing: it was not asked",
        "precision in JAX": "matrix products at “highest”, x64 on for float64 alone",
        "precision in PyTorch": f"float32 matrix products at “{torch.get_float32_matmul_precision()}”",
        "written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


class Submodules(NamedTuple):
    """The results that belong to a submodule, by path, dtype and pair, and the others.

    `blocks` are the paths in the order of execution, grouped by the numbered block that they belong to.
    """

    cells: Cells
    blocks: list[tuple[str, list[str]]]
    dtypes: list[str]
    others: list[CheckResult]


def by_submodule(checks: Sequence[CheckResult]) -> Submodules:
    in_table: list[CheckResult] = []
    others: list[CheckResult] = []
    for r in checks:
        (in_table if r.check in BY_SUBMODULE and (r.left, r.right) in PAIRS else others).append(r)
    # A submodule may have a figure and also be wrong in another way: the failure takes the cell.
    cells = {
        (r.path or LOGITS, r.dtype, (r.left, r.right)): r for r in sorted(in_table, key=lambda r: not r.ok)
    }
    # Figures come in the order of execution, except that the model's own output comes first.
    measured = sorted(in_table, key=lambda r: r.max_rel is None)
    paths = sorted(dict.fromkeys(r.path or LOGITS for r in measured), key=lambda path: path == LOGITS)
    blocks = [(block, list(members)) for block, members in itertools.groupby(paths, _block)]
    return Submodules(cells, blocks, list(dict.fromkeys(r.dtype for r in checks)), others)


def _block(path: str) -> str:
    """The numbered block that a submodule belongs to: "layers.3.mlp.up_proj" -> "layers.3"."""
    match = re.match(r".*?\.\d+(?=\.|$)", path)
    return match[0] if match else ""


class Point(NamedTuple):
    """One submodule in the plot, with the pair that differs most there."""

    x: float
    y: float
    path: str
    result: CheckResult


class Line(NamedTuple):
    """One dtype in the plot; `limit` is the height of its limit, `label` that of its name."""

    dtype: str
    points: list[Point]
    limit: tuple[float, float] | None
    label: float


class Plot(NamedTuple):
    """The geometry of the picture; heights grow downwards, as SVG wants it."""

    lines: list[Line]
    ticks: list[tuple[float, str]]
    edges: list[float]
    names: list[tuple[float, str]]


WIDTH, HEIGHT = 960, 420
LEFT, RIGHT, TOP, FLOOR = 64, 84, 16, HEIGHT - 44
SIZE = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "floor": FLOOR}
MARGIN = 18  # between the scale's ends and the frame, for what no logarithm can place


def growth(table: Submodules) -> Plot | None:
    """Each dtype's largest difference among the pairs, submodule by submodule, on a logarithmic scale."""
    cells, blocks, dtypes, _ = table
    if not cells:
        return None
    paths = [path for _, members in blocks for path in members]
    limits = {r.dtype: r.limit for r in cells.values() if r.limit}
    worst: dict[str, list[tuple[int, CheckResult]]] = {}
    for (i, path), dtype in itertools.product(enumerate(paths), dtypes):
        found = [cells[path, dtype, pair] for pair in PAIRS if (path, dtype, pair) in cells]
        if found:
            worst.setdefault(dtype, []).append((i, max(found, key=severity)))
    values = [r.max_rel for line in worst.values() for _, r in line if r.max_rel and math.isfinite(r.max_rel)]
    exponents = [math.log10(v) for v in (*values, *limits.values())] or [0.0]
    low, high = math.floor(min(exponents)), max(math.ceil(max(exponents)), math.floor(min(exponents)) + 1)
    step = (WIDTH - LEFT - RIGHT) / len(paths)

    def height(value: float | None) -> float:
        if value is None or not math.isfinite(value):
            return TOP + MARGIN / 2
        return on_scale(math.log10(value)) if value else FLOOR

    def on_scale(exponent: float) -> float:
        share = (high - exponent) / (high - low)
        return round(TOP + MARGIN + share * (FLOOR - TOP - 2 * MARGIN), 1)

    lines: list[Line] = []
    for dtype, line in sorted(worst.items(), key=lambda item: height(item[1][-1][1].max_rel)):
        points = [Point(round(LEFT + (i + 0.5) * step, 1), height(r.max_rel), paths[i], r) for i, r in line]
        label = max(points[-1].y, lines[-1].label + 16 if lines else 0.0)  # names never overlap
        limit = (height(limits[dtype]), limits[dtype]) if dtype in limits else None
        lines.append(Line(dtype, points, limit, label))
    ticks = [(on_scale(e), f"1e{e}") for e in range(low, high + 1, math.ceil((high - low) / 8))]
    starts = list(itertools.accumulate((len(members) for _, members in blocks), initial=0))
    numbered = [(k, block) for k, (block, _) in enumerate(blocks) if block]
    names = [
        (LEFT + (starts[k] + starts[k + 1]) / 2 * step, block.rpartition(".")[2])
        for n, (k, block) in enumerate(numbered)
        if n % math.ceil(len(numbered) / 16) == 0
    ]
    return Plot(lines, [(FLOOR, "0"), *ticks], [LEFT + start * step for start in starts], names)
