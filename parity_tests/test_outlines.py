"""The twins mirror each other: same classes, functions, attributes and arguments, in the same order.

Both files are parsed, never imported. An outline is a list of lines such as
`Attention.__init__: self.q_proj`; what may differ stands in one table below, with its reason, and an
entry that nothing needs any more fails.
"""

from __future__ import annotations

import ast
import difflib
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SIDES = ("jax", "torch")
#: Lines of a file; `layers` is what all architectures share.
LONGEST = {"layers": 300}


def stems(side):
    """The files of one side. `__init__` is no twin: it holds what only one framework needs."""
    return {p.stem for p in (ROOT / f"{side}_models").glob("*.py")} - {"__init__"}


def source(side, stem):
    return (ROOT / f"{side}_models" / f"{stem}.py").read_text()


STEMS = sorted(stems("jax") & stems("torch"))


@dataclass(frozen=True)
class Only:
    """Lines that one side has and the other has not: in which file (a stem, or all), and why."""

    side: str
    stem: str
    line: str  # a regular expression for the whole line
    reason: str

    def covers(self, side, stem, line):
        return side == self.side and self.stem in ("*", stem) and re.fullmatch(self.line, line) is not None


EXCEPTIONS = (
    Only("jax", "*", r".*: argument \*rngs", "initial values come from an explicit key, not a global one"),
    Only("torch", "*", r".*: argument [*]?device(=None)?", "torch creates on a device, JAX places at jit"),
    Only("jax", "*", r"\w+Norm\.__init__: self\.scale", "Flax names the leaf of a norm scale"),
    Only("jax", "*", r"\w+Linear\.__init__: self\.kernel", "Flax names the leaf of a linear layer kernel"),
    Only("torch", "*", r"\w+\.__init__: self\.weight", "torch names both leaves weight"),
    Only(
        "jax",
        "generate",
        r"STEPS|Generator\.__init__: self\._(params|step|loop|grow)",
        "compiled, split once",
    ),
    Only("torch", "generate", r"Generator\.(__init__: self\._model|_step.*)", "the step is a method"),
    Only(
        "jax",
        "lookup",
        r"from models.generate import STEPS|guess: argument end|LookupGenerator\.__init__: self\._ahead",
        "guesses inside the compiled loop, in a history of fixed length",
    ),
    Only(
        "torch",
        "lookup",
        r"from models.generate import grow|LookupGenerator\._ahead.*",
        "the step is a method, the host guesses",
    ),
    Only("jax", "layers", "SHARED", "activations are placed from inside in JAX, from outside in torch"),
    Only("torch", "layers", r"FEW_ROWS|linear\b.*", "XLA orders a product itself, torch is told"),
    Only("torch", "*", r"from models.layers import linear", "the same"),
    Only("jax", "generate", r"argmax\b.*", "on a CPU XLA is slow to find where a maximum stands"),
    Only("jax", "layouts", r"\(?TOGETHER.*|(class )?(Part|_groups|_join)\b.*", "only XLA merges equals"),
    Only("jax", "layouts", r"(class )?(ALIGNED|Room|_aligned|_params)\b.*", "XLA's memory is in small pages"),
    Only(
        "jax",
        "layouts",
        r"from models.layers import KVCache|(class )?(_At|Apart|apart)\b.*",
        "XLA copies a layer out of an array of all, in torch it is a view",
    ),
    Only("jax", "generate", r"from models.layouts import apart", "the same"),
    Only("jax", "quantized", r"\(FEW_ROWS, TILE\)|(whole|tiled)\b.*", "on a CPU XLA converts in tiles"),
    Only(
        "torch",
        "quantized",
        r"from models.layers import FEW_ROWS|WIDTH|(tabled|summed)\b.*|QuantizedLinear\.table",
        "on a CPU torch sums a table of bytes",
    ),
    Only(
        "jax",
        "fused",
        r"_cudnn_can.*|BLOCK|FEW|(_whole|blocks)\b.*",
        "torch chooses among its kernels itself, and has one for CPUs",
    ),
    Only("torch", "random", r"MASK|ROTATIONS|_threefry.*", "JAX has the generator, torch spells it out"),
)

#: How the frameworks spell what is the same; applied to both sides.
SPELLINGS = (
    (r"\bforward\b", "__call__"),
    (r"\b(nnx|nn)\.(Module|Linear)\b", r"\2"),
    (r"\b(jnp|jax|torch)\.(float32|float64)\b", r"\2"),
    (r"\b(jax|torch)_models\b", "models"),
)


def arguments(name, function):
    """One line per argument, with its default; keyword-only ones are starred."""
    a = function.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    pairs = [("", arg, default) for arg, default in zip(plain, defaults, strict=True)]
    pairs += [("*", arg, default) for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    pairs += [(stars, arg, None) for stars, arg in (("*args ", a.vararg), ("**kwargs ", a.kwarg)) if arg]
    for star, arg, default in pairs:
        value = "" if default is None else f"={ast.unparse(default)}"
        yield f"{name}: argument {star}{arg.arg}{value}"


def assigned(name, function):
    """One line per attribute that a constructor sets on self, in order, each once."""
    nodes = sorted(
        (n for n in ast.walk(function) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)),
        key=lambda n: (n.lineno, n.col_offset),
    )
    owned = [n.attr for n in nodes if isinstance(n.value, ast.Name) and n.value.id == "self"]
    yield from (f"{name}: self.{attribute}" for attribute in dict.fromkeys(owned))


def lines(body, prefix=""):
    for node in body:
        match node:
            case ast.ClassDef():
                bases = ", ".join(map(ast.unparse, node.bases))
                yield f"class {prefix}{node.name}({bases})"
                yield from lines(node.body, f"{prefix}{node.name}.")
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                name = prefix + node.name
                yield name
                yield from arguments(name, node)
                if node.name == "__init__":
                    yield from assigned(name, node)
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield prefix + name
            case ast.Assign():
                yield from (prefix + ast.unparse(target) for target in node.targets)
            case ast.ImportFrom(module=str(module)) if re.match(
                r"(jax_models|torch_models|twinformers)", module
            ):
                yield from (f"from {module} import {a.name}" for a in node.names)


def outline(text):
    result = []
    for line in lines(ast.parse(text).body):
        for pattern, same in SPELLINGS:
            line = re.sub(pattern, same, line)
        result.append(line)
    return result


def differences(stem, jax_text, torch_text):
    """What the outlines do not share, as a diff, and which exceptions were needed."""
    kept, used = {}, set()
    for side, text in zip(SIDES, (jax_text, torch_text), strict=True):
        kept[side] = []
        for line in outline(text):
            if covering := [e for e in EXCEPTIONS if e.covers(side, stem, line)]:
                used.update(covering)
            else:
                kept[side].append(line)
    found = difflib.unified_diff(kept["jax"], kept["torch"], "jax", "torch", lineterm="", n=0)
    return [line for line in found if not line.startswith(("---", "+++", "@@"))], used


def test_every_file_has_a_twin():
    assert STEMS, "no twins found"
    assert stems("jax") == stems("torch")


@pytest.mark.parametrize("stem", STEMS)
def test_outline_of_jax_matches_torch(stem):
    found, _ = differences(stem, source("jax", stem), source("torch", stem))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("side", SIDES)
def test_files_are_short(side):
    lengths = {stem: source(side, stem).count("\n") for stem in stems(side)}
    assert {stem: n for stem, n in lengths.items() if n > LONGEST.get(stem, 250)} == {}


def test_every_exception_is_needed():
    used = set()
    for stem in STEMS:
        used |= differences(stem, source("jax", stem), source("torch", stem))[1]
    assert [e for e in EXCEPTIONS if e not in used] == []


#: A change to torch_models/llama.py, and the line of the outline in which it must show.
PLANTED = {
    "class renamed": ("class MLP(nn.Module)", "class FeedForward(nn.Module)", "+class FeedForward(Module)"),
    "another base": ("class MLP(nn.Module)", "class MLP(Attention)", "+class MLP(Attention)"),
    "submodule renamed": ("self.up_proj", "self.rise_proj", "+MLP.__init__: self.rise_proj"),
    "attribute dropped": ("        self.head_dim = H\n", "", "-Attention.__init__: self.head_dim"),
    "argument renamed": (
        "x: torch.Tensor) -> torch.Tensor:",
        "y) -> torch.Tensor:",
        "+MLP.__call__: argument y",
    ),
    "another default": (" = torch.float32", " = torch.float64", "+Llama.__init__: argument *dtype=float64"),
    "no longer keyword-only": (
        "config: LlamaConfig, *, dtype: torch.dtype = ",
        "config: LlamaConfig, dtype: torch.dtype = ",
        "+Llama.__init__: argument dtype=float32",
    ),
    "method renamed": ("def head(", "def logits(", "+Llama.logits"),
    "function added": ("class Attention", "def helper(x):\n    return x\n\n\nclass Attention", "+helper"),
    "import dropped": ("    constrain,\n", "", "-from models.layers import constrain"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_difference_is_caught(name):
    old, new, line = PLANTED[name]
    text = source("torch", "llama")
    assert old in text
    found, _ = differences("llama", source("jax", "llama"), text.replace(old, new))
    assert line in found


@pytest.mark.parametrize(
    ("stem", "first", "second"),
    [("llama", "        self.up_proj = ", "        self.down_proj = "), ("layers", "    k: ", "    v: ")],
)
def test_planted_order_is_caught(stem, first, second):
    text = source("torch", stem)
    swapped = re.sub(f"({first}.*\n)({second}.*\n)", r"\2\1", text)
    assert swapped != text
    assert differences(stem, source("jax", stem), swapped)[0]
