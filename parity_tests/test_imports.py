"""Import rules: each side without the other framework, the shared parts without either, `--help` at once."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
JAX, TORCH = ("jax", "jaxlib", "flax", "optax"), ("torch",)
#: What costs more to import than `--help` may take.
HEAVY = (*JAX, *TORCH, "numpy", "transformers", "safetensors", "tokenizers", "einops", "orbax")

#: Each package, and what importing all of it must do without. The command's verbs are imported when called.
RULES = {
    "jax_models": TORCH,
    "torch_models": JAX,
    "twinformers.configs": (*JAX, *TORCH, "numpy"),
    "twinformers.weight_maps": (*JAX, *TORCH),
    "twinformers.checkpoints": (*JAX, *TORCH),
    "twinformers.cli": (*JAX, *TORCH),
    "twinformers": (),
}

#: What a model file may import, besides the standard library: nothing of checkpoints, hubs or optimizers.
ALLOWED = {
    "jax": ("jax", "flax", "numpy", "jax_models", "twinformers.configs", "twinformers.errors"),
    "torch": ("torch", "numpy", "torch_models", "twinformers.configs", "twinformers.errors"),
}

BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Blocker())
"""


def run(code, blocked=()):
    """Run code in a fresh interpreter in which some packages cannot be imported; its output, or its error."""
    program = BLOCK.format(blocked=tuple(blocked)) + textwrap.dedent(code)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode:
        raise ImportError(done.stderr)
    return done.stdout


def modules(package):
    """Every module of a package, by listing its files; what starts a program is no module to import."""
    folder = ROOT / package.replace(".", "/")
    files = sorted(folder.glob("*.py" if package == "twinformers" else "**/*.py"))
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files if p.stem != "__main__"]
    return [n.removesuffix(".__init__") for n in names]


def import_all(package, blocked):
    names = modules(package)
    assert names
    return run(f"import importlib\nfor name in {names!r}: importlib.import_module(name)", blocked)


@pytest.mark.parametrize("package", RULES)
def test_package_imports_without(package):
    import_all(package, RULES[package])


@pytest.mark.parametrize(("package", "blocked"), [("jax_models", "jax"), ("torch_models", "torch")])
def test_blocking_blocks(package, blocked):
    with pytest.raises(ImportError, match=f"{blocked}.* is blocked"):
        import_all(package, [blocked])


@pytest.mark.parametrize("statement", ["import twinformers", "import twinformers.cli.app"])
def test_nothing_heavy_is_loaded_by(statement):
    loaded = json.loads(run(f"{statement}\nimport json; print(json.dumps(sorted(sys.modules)))"))
    assert "twinformers" in loaded
    assert [name for name in loaded if name in HEAVY] == []


def test_every_public_name_is_found():
    run("import twinformers\nfor name in twinformers.__all__: getattr(twinformers, name)")


def test_help_needs_no_framework():
    code = "from twinformers.cli.app import run\nsys.exit(run(['--help']))"
    assert "Usage: twinformers" in run(code, HEAVY)


def test_help_takes_less_than_half_a_second():
    """User and system time of the child, the best of three: other work on the machine does not count."""
    times = []
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", "from twinformers.cli import main; main()", "--help"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        times.append(usage.ru_utime + usage.ru_stime)
    print(f"twinformers --help: {min(times):.3f} s of CPU time")
    assert min(times) < 0.5


def imported(text):
    """Every module that a file imports, anywhere in it, `from a import b` as a.b."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, since the notebook builder strips them by name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def strangers(text, side):
    def allowed(name):
        return name.partition(".")[0] in sys.stdlib_module_names or any(
            name == a or name.startswith(f"{a}.") for a in ALLOWED[side]
        )

    return [name for name in imported(text) if not allowed(name)]


@pytest.mark.parametrize("side", ALLOWED)
def test_model_files_import_nothing_else(side):
    files = sorted((ROOT / f"{side}_models").glob("**/*.py"))
    assert files
    found = {f.name: strangers(f.read_text(), side) for f in files}
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "statement",
    [
        "import optax",
        "def f():\n    import transformers",
        "from twinformers import checkpoints",
        "from twinformers.checkpoints import port",
        "import twinformers",
        "from torch import nn",
    ],
)
def test_planted_import_is_caught(statement):
    text = (ROOT / "jax_models" / "llama.py").read_text()
    assert strangers(f"{text}\n{statement}\n", "jax") != []
