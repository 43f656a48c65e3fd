"""The gallery: a page, drawings and figures of every architecture, made from the code.

    scripts/build-gallery            writes docs/gallery.md, docs/images/gallery-*.svg and docs/api/models.md
    scripts/build-gallery --measure  measures both twins first and writes docs/results/gallery.json
    scripts/build-gallery --check    fails if a file is not what would be written

A new architecture needs a file docs/gallery/NAME.md and a run with `--measure NAME`; all else is found.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import gallery_drawing  # noqa: E402
import gallery_tracing  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from twinformers.configs import Config, architectures, config_class, presets  # noqa: E402
from twinformers.errors import UsageError  # noqa: E402
from twinformers.weight_maps import weight_map  # noqa: E402

FIGURES = ROOT / "docs" / "results" / "gallery.json"
PAGE = ROOT / "docs" / "gallery.md"
MODELS = ROOT / "docs" / "api" / "models.md"
IMAGES = ROOT / "docs" / "images"


@dataclass(frozen=True)
class Story:
    """What no code says: a name, when and where it was published, and what was new in it."""

    title: str
    year: int
    paper: str
    new: str


STORY = re.compile(r"# (.+)\n\nyear: (\d{4})\npaper: (.+)\n\n(.+)", re.DOTALL)


def story(name: str) -> Story:
    """What docs/gallery/NAME.md says. Raises UsageError where there is no such file, or nothing in it."""
    path = ROOT / "docs" / "gallery" / f"{name}.md"
    found = STORY.fullmatch(path.read_text()) if path.exists() else None
    if found is None:
        raise UsageError(
            "an architecture without a story",
            where=str(path.relative_to(ROOT)),
            expected="title, year, paper, and what is new in it, as in the files beside it",
            found="another form" if path.exists() else "no file",
        )
    title, year, paper, new = found.groups()
    return Story(title, int(year), paper, new.strip())


HEAD = """\
# The gallery

Every architecture here, drawn and measured. `scripts/build-gallery` makes this page: the drawings come from
running the Flax twin's own code on symbols, the parameters from the weight maps, the figures from `verify` in
float64. The PyTorch twin has the same classes, arguments and submodules; a test compares their outlines.

| architecture | year | parameters | outputs | gradients | independent | course |
|---|---|---|---|---|---|---|
"""
LEGEND = """\

Parameters are those of the preset that is drawn.
Figures are the largest difference found, relative to the largest value of the tensor in which it was found:
outputs and gradients between the twins, and everything of both against an implementation that others have
written. The limits are 1e-12 for outputs and 1e-10 for gradients ([how parity is proven](parity.md)).

**How to read the drawings.** Data flows downwards. The name in a box is the submodule's name in the code of
both twins, with its class or its sizes below; a white box is an operation. A line that goes round on the left
is a residual connection. `attend` is softmax(q·k / √H)·v. The first panel is the model, with one box for each
stack of layers; the others are the classes that it is made of. Dropout, padding and random keys are left out.
"""


def order() -> list[str]:
    """All stems, the oldest first: what has a configuration, and what has code and a weight map alone."""
    found = set(architectures())
    for path in (ROOT / "twinformers" / "weight_maps").glob("[a-z]*.py"):
        if path.stem != "base" and (ROOT / "jax_models" / path.name).exists():
            found.add(path.stem)
    return sorted(found, key=lambda name: (story(name).year, name))


def presets_of(name: str) -> dict[str, Config]:
    return {p: c for p, c in presets().items() if c.architecture == name}


# --- drawings


def abstract(name: str) -> tuple[list[Any], Any]:
    """The modules to draw, shapes without numbers, and the weight map of the model they are of, if any."""
    file = importlib.import_module(f"jax_models.{name}")
    if name not in architectures():
        return [_mechanism(cls) for cls in _classes(file)], None
    config = next(iter(presets_of(name).values()))
    once = config.replace(**{f.name: 1 for f in dataclasses.fields(config) if f.name.endswith("layers")})
    cls = getattr(file, config.model_class)
    return [nnx.eval_shape(lambda: cls(once, dtype=jnp.float32, rngs=nnx.Rngs(0)))], weight_map(config)


#: The sizes that mechanisms without a configuration are drawn with.
SIZES = {"hidden_size": 512, "num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "causal": True}


def _classes(file: Any) -> list[Any]:
    return [
        c
        for c in vars(file).values()
        if inspect.isclass(c) and c.__module__ == file.__name__ and c is not file
    ]


def _mechanism(cls: Any) -> Any:
    taken = inspect.signature(cls.__init__).parameters
    sizes = {name: value for name, value in SIZES.items() if name in taken}
    return nnx.eval_shape(lambda: cls(**sizes, dtype=jnp.float32, rngs=nnx.Rngs(0)))


def _size(module: Any) -> int:
    """How many numbers a module learns."""
    import jax

    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def short(count: int) -> str:
    """A count in three digits: 6.74 B, 124 M, 16.4 K, 1,234."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= max(size, 10**4):
            value = count / size
            return (
                f"{value:.2f} {unit}"
                if value < 10
                else f"{value:.1f} {unit}"
                if value < 100
                else f"{value:.0f} {unit}"
            )
    return f"{count:,}"


def _repeats(path: str, table: Any) -> int:
    """How many layers stand where the drawing has one."""
    stack = path.rpartition(".")[0]
    for leaf in table.rows:
        places = getattr(leaf, "places", {})
        name = getattr(places.get("torch"), "name", "")
        if getattr(leaf, "over", None) and name.startswith(f"{stack}.{{"):
            return table.counts[leaf.over]
    return 1


def looks(table: Any, heads: dict[int, str]) -> Callable[[Any], tuple[str, str, str]]:
    """The look of a box: its style, its name and what stands below."""

    def look(node: Any) -> tuple[str, str, str]:
        module = node.module
        if node.kind == "in":
            return "in", node.label.replace("_", " "), ""
        if module is None:
            return (
                ("attn", node.label, heads.get(id(node), ""))
                if node.label == "attend"
                else ("op", node.label, "")
            )
        kind, label = type(module).__name__, node.label.rpartition(".")[2]
        if label.isdecimal():
            return "linear", f"{kind} × {_repeats(node.label, table)}", node.note
        if isinstance(module, nnx.Embed):
            count, width = module.embedding.shape
            if label.endswith("ᵀ"):
                return "table", label, f"{width} → {count}"
            return "table", label, f"{count} × {width}"
        if isinstance(module, nnx.Linear):
            inside, outside = module.kernel.shape
            return "linear", label, f"{inside} → {outside}"
        if kind.endswith("Norm"):
            return "norm", label, f"{kind}, {module.scale.shape[0]}"
        style = "attn" if "Attention" in kind else "mlp" if kind == "MLP" else "linear"
        return style, label, f"{kind}, {short(_size(module))}"

    return look


def _heads(panel: Any) -> str:
    """How many heads an attention has, by the widths of its projections."""
    module = panel.module
    count, shared = (getattr(module, f"{p}_proj").kernel.shape[1] // module.head_dim for p in "qk")
    if count == shared:
        return f"{count} heads of {module.head_dim}"
    return f"{count} heads, {shared} of k and v"


def draw(name: str) -> tuple[str, list[Any]]:
    """The drawing of an architecture, and its panels."""
    modules, table = abstract(name)
    panels = [p for m in modules for p in gallery_tracing.panels(m, model=table is not None)]
    heads = {
        id(node): _heads(panel)
        for panel in panels
        for node in panel.nodes
        if node.label == "attend" and hasattr(panel.module, "q_proj")
    }
    sizes = {id(p): f"{short(_size(p.module))} parameters" for p in panels}
    if table is not None:
        sizes[id(panels[0])] = f"{short(table.parameters)} parameters"
    about = "; ".join(
        f"{p.name}: " + ", ".join(n.label for n in p.nodes if n.kind not in ("in",)) for p in panels
    )
    svg = gallery_drawing.drawing(
        panels,
        looks(table, heads),
        lambda p: sizes[id(p)],
        f"{story(name).title}, as the code computes it",
        about,
    )
    return svg, panels


# --- figures


def measure(name: str) -> list[dict[str, Any]]:
    """The largest differences in float64, by what was compared. Raises UsageError if a check fails."""
    if name not in architectures():
        return measure_mechanisms()
    from twinformers import verify
    from twinformers.checkpoints.preset import PresetCheckpoint

    checks = ("logits", "activations", "cache", "generation", "reference", "gradients")
    source = f"{name}-tiny"
    config = presets()[source]
    found = _rows(source, verify(f"preset:{source}", dtypes=["float64"], checks=checks), config)
    if config.hf_class is None:  # the same architecture as transformers spells it
        spelled, cls = next((m, c) for m, c in config_class(name).hf_classes().items() if c)
        other: Any = config
        other = other.replace(model_type=spelled)
        checkpoint = PresetCheckpoint(f"preset:{source}", other)
        report = verify(checkpoint, dtypes=["float64"], checks=("reference", "gradients"))
        found += [
            {**row, "source": f"{source}, as {spelled}"}
            for row in _rows(source, report, other)
            if cls in row["between"]
        ]
    return found


#: What a check of `verify` compares.
WHAT = {
    "logits": "logits",
    "activations": "output of every submodule",
    "cache": "decoding with the cache",
    "generation": "greedy tokens",
    "reference": "logits",
    "gradients": "gradients of parameters and outputs",
}


def _rows(source: str, report: Any, config: Config) -> list[dict[str, Any]]:
    if not report.ok:
        bad = next(c for c in report.checks if not c.ok)
        raise UsageError("a check failed", where=source, expected=f"{bad.check} {bad.path}", found=bad.note)
    rows: dict[tuple[str, str], list[Any]] = {}
    for c in report.checks:
        if c.max_rel is None and c.check != "generation":
            continue
        what = WHAT[c.check]
        if c.check == "reference" and c.path:
            what = WHAT["activations"]
        between = "Flax and PyTorch"
        if c.right == "transformers":
            between = (
                f"Flax and {config.hf_class}" if c.check == "gradients" else f"both and {config.hf_class}"
            )
        elif c.check == "cache":
            between = "each and its own full pass"
        if c.check == "logits" and config.kind == "encoder":
            what = "output"
        rows.setdefault((what, between), []).append(c)
    return [
        {
            "source": source,
            "what": what,
            "between": between,
            "compared": len(checks),
            "largest": max((c.max_rel for c in checks if c.max_rel is not None), default=None),
            "limit": next((c.limit for c in checks if c.limit is not None), None),
        }
        for (what, between), checks in rows.items()
    ]


def measure_mechanisms() -> list[dict[str, Any]]:
    """Both twins of each mechanism on the same weights, and many heads against PyTorch's own module."""
    import jax
    import numpy as np
    import torch

    import jax_models.attention as flax_side
    import torch_models.attention as torch_side
    from jax_models import functional
    from twinformers.parity.limits import EXACT, OUTPUTS
    from twinformers.weight_maps.attention import weight_map as table_of

    rng = np.random.default_rng(0)
    D, N, K, H, T = 30, 6, 2, 5, 41  # D = N H, which PyTorch's own module needs
    x, target = (rng.standard_normal((2, T, D)) for _ in range(2))
    positions = np.tile(np.arange(T, dtype=np.int32), (2, 1))
    worst: dict[tuple[str, str], list[float]] = {}

    def note(what: str, between: str, a: Any, b: Any) -> None:
        worst.setdefault((what, between), []).append(float(np.abs(a - b).max() / np.abs(b).max()))

    with jax.enable_x64(True):
        for cls in _classes(flax_side):
            sizes = {"hidden_size": D, "num_heads": N, "num_kv_heads": K, "head_dim": H, "causal": True}
            taken = inspect.signature(cls.__init__).parameters
            sizes = {n: v for n, v in sizes.items() if n in taken}
            heads = sizes.get("num_heads", 1)
            groups = sizes.get(
                "num_kv_heads", 1 if cls.__name__ in ("SelfAttention", "MultiQueryAttention") else heads
            )
            table = table_of(D, heads, groups, H, use_bias=True)
            state = {
                n: rng.standard_normal(leaf.shape("torch")) * 0.3 for n, leaf in table.leaves("torch").items()
            }
            pt = getattr(torch_side, cls.__name__)(**sizes, use_bias=True, dtype=torch.float64)
            pt.load_state_dict({n: torch.from_numpy(a) for n, a in state.items()})
            jx = cls(**sizes, use_bias=True, dtype=jnp.float64, rngs=nnx.Rngs(0))
            apply, params = functional(jx)
            for n in table.tensors("jax"):
                path, _, leaf = n.partition(".")
                params[path][leaf] = jnp.asarray(table.produce(n, "jax", state.__getitem__, "torch"))

            def output(value: Any) -> Any:
                return value[0] if isinstance(value, tuple) else value

            def loss(x: Any, apply: Any = apply, params: Any = params) -> Any:
                return jnp.sum(output(apply(params, x, jnp.asarray(positions))) * target)

            given = torch.from_numpy(x).requires_grad_()
            out = output(pt(given, torch.from_numpy(positions)))
            (out * torch.from_numpy(target)).sum().backward()
            theirs = out.detach().numpy()
            ours = np.asarray(output(apply(params, jnp.asarray(x), jnp.asarray(positions))))
            assert given.grad is not None
            note("output", "Flax and PyTorch", ours, theirs)
            note(
                "gradient of the input",
                "Flax and PyTorch",
                np.asarray(jax.grad(loss)(jnp.asarray(x))),
                given.grad.numpy(),
            )
            if cls.__name__ == "MultiHeadAttention":
                own = torch.nn.MultiheadAttention(D, N, batch_first=True, dtype=torch.float64)
                own.load_state_dict(
                    {
                        n: torch.from_numpy(
                            np.ascontiguousarray(table.produce(n, "torch.nn", state.__getitem__, "torch"))
                        )
                        for n in table.tensors("torch.nn")
                    }
                )
                hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
                with torch.no_grad():
                    independent = own(*[torch.from_numpy(x)] * 3, attn_mask=hidden, need_weights=False)[
                        0
                    ].numpy()
                for twin in (ours, theirs):
                    note("output of many heads", "both and torch.nn.MultiheadAttention", twin, independent)
            if cls.__name__ == "CachedMultiHeadAttention":
                cache, parts = jx.empty_cache(2, T), []
                for start in range(0, T, 7):
                    part = slice(start, start + 7)
                    piece, cache = apply(
                        params, jnp.asarray(x[:, part]), jnp.asarray(positions[:, part]), cache
                    )
                    parts.append(np.asarray(piece))
                note("decoding with the cache", "Flax and its own full pass", np.concatenate(parts, 1), ours)
    rows = []
    for (what, between), figures in worst.items():
        most = EXACT["gradients"] if "gradient" in what else OUTPUTS
        if max(figures) > most:
            raise UsageError("a check failed", where=what, expected=f"{most:g}", found=f"{max(figures):.1e}")
        rows.append(
            {
                "source": f"{len(_classes(flax_side))} classes",
                "what": what,
                "between": between,
                "compared": len(figures),
                "largest": max(figures),
                "limit": most,
            }
        )
    return rows


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("jax", "flax", "torch", "transformers")}


# --- pages


def _figure(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1e}"


def _largest(rows: Iterable[dict[str, Any]], keep: Callable[[dict[str, Any]], bool]) -> str:
    kept = [row["largest"] for row in rows if keep(row) and row["largest"] is not None]
    return _figure(max(kept)) if kept else ""


def notebooks(name: str) -> list[tuple[str, str]]:
    """The notebooks that build code of this architecture's files: their titles and files."""
    found = []
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        source = ROOT / "notebooks" / "src" / f"{path.stem}.py"
        if source.exists() and re.search(rf"^# %% twin:.*\b{name}\.[A-Z]", source.read_text(), re.MULTILINE):
            found.append(
                (re.sub(r"[_-]", " ", path.stem).replace("GPT 2", "GPT-2"), f"../notebooks/{path.name}")
            )
    return found


def _links(name: str) -> str:
    files = [
        ("Flax twin", f"jax_models/{name}.py"),
        ("PyTorch twin", f"torch_models/{name}.py"),
        ("configuration", f"twinformers/configs/{name}.py"),
        ("weight map", f"twinformers/weight_maps/{name}.py"),
        ("tests", f"parity_tests/test_{name}.py"),
    ]
    links = [f"[{text}](../{path})" for text, path in files if (ROOT / path).exists()]
    links += [f"[notebook {title}]({path})" for title, path in notebooks(name)]
    return " · ".join(links)


def _sentence(cls: Any) -> str:
    """The first sentence of a class's docstring, fit for a cell of a table."""
    text = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    text = re.split(r"(?<=[a-z0-9)\]`])[.:] (?=[A-Z\[`])", text)[0].rstrip(".:")
    return text.replace("|", "\\|").replace("*", "\\*")


def section(name: str, panels: Sequence[Any], rows: list[dict[str, Any]]) -> str:
    told, own = story(name), presets_of(name)
    drawn = f"the sizes of `preset:{next(iter(own))}`" if own else f"a hidden size of {SIZES['hidden_size']}"
    parts = [
        f"## {told.title}",
        f"{told.new} ({told.paper}.)",
        _links(name),
        f"![The {told.title} twins as drawn from their code, class by class](images/gallery-{name}.svg)",
        f"Drawn with {drawn}.",
        "| class | what it is |\n|---|---|\n"
        + "\n".join(f"| `{p.name}` | {_sentence(type(p.module))} |" for p in panels),
    ]
    if own:
        lines = ["| preset | parameters | layers | hidden size |", "|---|---|---|---|"]
        for preset, config in own.items():
            table = weight_map(config)
            layers = " + ".join(str(n) for n in table.counts.values())
            lines.append(f"| `{preset}` | {table.parameters:,} | {layers} | {table.sizes['D']:,} |")
        parts.append("\n".join(lines))
    source = rows[0]["source"]
    lines = [f"| {source}, in float64 | between | compared | largest | limit |", "|---|---|---|---|---|"]
    for row in rows:
        limit = "" if row["limit"] is None else f"{row['limit']:.0e}"
        other = row["source"].removeprefix(source)  # the same model, as others spell it
        lines.append(
            f"| {row['what']}{other} | {row['between']} | {row['compared']} | "
            f"{_figure(row['largest'])} | {limit} |"
        )
    parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def summary(name: str, rows: list[dict[str, Any]]) -> str:
    told, own = story(name), presets_of(name)
    first = next(iter(own), "")
    twins = [r for r in rows if r["between"] == "Flax and PyTorch"]
    gradient = [r for r in twins if "gradient" in r["what"]]
    others = [r for r in rows if r["between"] != "Flax and PyTorch" and "full pass" not in r["between"]]
    anchor = re.sub(r"[^a-z0-9-]", "", told.title.lower().replace(" ", "-"))
    cells = [
        f"[{told.title}](#{anchor})",
        str(told.year),
        short(weight_map(own[first]).parameters) if first else "",
        _largest(twins, lambda r: r not in gradient),
        _largest(gradient, lambda r: True),
        _largest(others, lambda r: True),
        ", ".join(f"[{title[:2]}]({path})" for title, path in notebooks(name)),
    ]
    return f"| {' | '.join(cells)} |"


def models_page() -> str:
    """The reference of all model classes, both frameworks beside one another."""
    parts = [
        "# Models",
        "Written by `scripts/build-gallery`. Each architecture twice, under the same names; the\n"
        "[gallery](../gallery.md) draws them.",
    ]
    for name in order():
        parts.append(f"## {story(name).title}")
        modules = [f"jax_models.{name}", f"torch_models.{name}"]
        if name in architectures():
            modules.insert(0, f"twinformers.configs.{name}")
        titles = {"twinformers": "Configuration", "jax_models": "Flax NNX", "torch_models": "PyTorch"}
        for module in modules:
            parts.append(f"### {titles[module.partition('.')[0]]}: `{module}`")
            parts.append(f"```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n```")
    return "\n\n".join(parts) + "\n"


def outputs() -> dict[Path, str]:
    """Every file that this script writes, by its path, from the code and the figures measured last."""
    figures = json.loads(FIGURES.read_text())
    names = order()
    if lacking := [n for n in names if n not in figures["architectures"]]:
        raise UsageError(
            "an architecture without figures",
            where=str(FIGURES.relative_to(ROOT)),
            found=", ".join(lacking),
            hint=f"scripts/build-gallery --measure {' '.join(lacking)}",
        )
    files: dict[Path, str] = {}
    lines, sections = [], []
    for name in names:
        rows = figures["architectures"][name]
        svg, panels = draw(name)
        files[IMAGES / f"gallery-{name}.svg"] = svg
        lines.append(summary(name, rows))
        sections.append(section(name, panels, rows))
    made = ", ".join(f"{n} {v}" for n, v in figures["versions"].items())
    files[PAGE] = (
        HEAD + "\n".join(lines) + "\n" + LEGEND + f"\nMeasured with {made}.\n\n" + "\n".join(sections)
    )
    files[MODELS] = models_page()
    return files


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", nargs="*", metavar="NAME", help="renew the figures, of all or of these")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is stale")
    options = parser.parse_args()
    try:
        if options.measure is not None:
            known = json.loads(FIGURES.read_text())["architectures"] if FIGURES.exists() else {}
            for name in options.measure or order():
                print(f"gallery: measuring {name}", flush=True)
                known[name] = measure(name)
            kept = {name: known[name] for name in order() if name in known}
            FIGURES.write_text(json.dumps({"versions": versions(), "architectures": kept}, indent=1) + "\n")
        stale = []
        for path, text in outputs().items():
            if path.exists() and path.read_text() == text:
                continue
            stale.append(str(path.relative_to(ROOT)))
            if not options.check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    except UsageError as error:
        print(f"gallery: {error}", file=sys.stderr)
        return 2
    for name in stale:
        print(f"gallery: {'stale' if options.check else 'wrote'} {name}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
