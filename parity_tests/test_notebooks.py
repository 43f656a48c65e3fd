"""The course: it is what its sources and the packages say, and it runs where the repository is absent."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from twinformers.errors import FormatError

ROOT = Path(__file__).parent.parent
REPOSITORY = {"jax_models", "torch_models", "twinformers", "scripts", "parity_tests"}
#: Where the definitions of a %%twin cell may come from.
PACKAGES = {
    "jax": ("jax_models", "twinformers"),
    "torch": ("torch_models", "twinformers"),
    "both": ("twinformers",),
}

spec = importlib.util.spec_from_file_location("build_notebooks", ROOT / "scripts" / "build_notebooks.py")
assert spec is not None and spec.loader is not None
builder = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = builder  # dataclasses look their module up
spec.loader.exec_module(builder)

NAMES = sorted(p.stem for p in (ROOT / "notebooks").glob("[0-9]*.ipynb"))

#: How closely a head of the attention maps in 02 follows the reversal, as the key of max or min.
FOLLOWS = "np.ndindex(2, 4), key=lambda i: sum(heard[3 + 2 * i[0]][0, i[1], t, 5 - t] for t in range(6)))"
#: For each exercise, in order: an answer that is right, and one that is not.
ANSWERS = {
    "01_Attention-Mechanisms": [
        ('"the same"', '"shuffled"'),
        ("-jnp.eye(24)", "jnp.eye(24)"),
        ("21", "36"),
        ("slice(12, 18)", "slice(18, 24)"),
        ("524288", "262144"),
        ("0", "1"),
        ("131040", "131072"),
    ],
    "02_Original_Transformer": [
        ("256", "512"),
        ("0.343", "0.3"),
        ("0", "1"),
        ("3152384", "3150336"),
        ("0", "1"),
        ("-(0.9 + 0.1 / 29) * np.log(0.9 + 0.1 / 29) - 2.8 / 29 * np.log(0.1 / 29)", "0.1"),
        ("0.0006988", "0.0007988"),
        ('"long"', '"short"'),
        (
            f"max({FOLLOWS}",
            f"min({FOLLOWS}",
        ),
    ],
    "03_GPT-2": [
        ("1557611200 + 50257 * 1600", "1557611200"),
        ("256 + 50000 + 1", "50000"),
        ("300", "150"),
        ('"mask"', '"norms"'),
    ],
    "04_LLaMA_2": [
        ("80 * 2 * 8192 * 56 * 128", "80 * 8192 * 56 * 128"),
        ("1", "10"),
        ("2 * np.pi * 10000 ** (126 / 128)", "10000"),
        ("11008", "16384"),
        ("False", "True"),
        ("(8192, 3584)", "(1024, 28672)"),
    ],
    "05_BERT": [
        ("512 * 511 // 2", "512 * 512"),
        ("3", "2"),
        ("768 * 768 + 768 + 2 * 768 + 30522", "768 * 768 + 768 + 30522 * 768"),
        ("0.12", "0.15"),
        ('"right"', '"wrong"'),
        ("(768, 3072)", "(3072, 768)"),
    ],
}
QUESTION = re.compile(r"^answer = None.*$", re.MULTILINE)


def stored(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code(name):
    return [cell for cell in stored(name).cells if cell.cell_type == "code"]


def build(tmp_path, *cells):
    source = tmp_path / "source.py"
    source.write_text("\n\n".join(cells) + "\n")
    return builder.build(source)


def run(*sources):
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    builder.execute(notebook, "planted", timeout=120)
    return "".join(o.text for cell in notebook.cells for o in cell.outputs if o.output_type == "stream")


def test_all_notebooks_are_there():
    assert set(NAMES) == set(builder.sources()) == set(ANSWERS)


@pytest.mark.parametrize("name", NAMES)
def test_stored_notebook_matches_its_source(name):
    built = builder.build(builder.sources()[name])
    assert builder.differences(built, stored(name)) == []
    nbformat.validate(stored(name))


def test_building_twice_gives_the_same_bytes():
    """In processes whose sets are ordered differently."""
    program = (
        "import build_notebooks as b\nfor s in b.sources().values(): print(b.nbformat.writes(b.build(s)))"
    )
    outputs = set()
    for seed in ("1", "2", "3"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT / "scripts")}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        outputs.add(done.stdout)
    assert len(outputs) == 1 and len(outputs.pop()) > 100_000


def pieces(text):
    """What must stand in a package word for word: definitions, but of classes and dictionaries each part."""
    for node in ast.parse(text).body:
        value = getattr(node, "value", None)
        if isinstance(node, ast.ClassDef):
            yield from (ast.get_source_segment(text, child) for child in node.body)
        elif isinstance(value, ast.Dict):
            yield from (ast.get_source_segment(text, item) for item in value.values)
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            yield ast.get_source_segment(text, node)


@pytest.mark.parametrize("name", NAMES)
def test_twin_cells_match_the_packages(name):
    """Read with other eyes than the builder's: by searching the text of the packages."""
    found = {side: 0 for side in PACKAGES}
    for cell in code(name):
        if (magic := re.match(r"%%twin (\w+)\n", cell.source)) is None:
            continue
        files = [p.read_text() for folder in PACKAGES[magic[1]] for p in (ROOT / folder).glob("**/*.py")]
        for piece in pieces(cell.source[magic.end() :]):
            found[magic[1]] += 1
            assert any(piece in text for text in files), f"not in {PACKAGES[magic[1]]}:\n{piece}"
    assert min(found.values()) > 0, found


@pytest.mark.parametrize("name", NAMES)
def test_no_cell_imports_the_repository(name):
    allowed = {"jax", "flax", "optax", "torch", "numpy", "matplotlib", "IPython", "jx", "pt", "shared"}
    for cell in code(name):
        for node in ast.walk(ast.parse(re.sub(r"^%%.*", "", cell.source))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                top = module.partition(".")[0]
                assert top not in REPOSITORY
                assert top in allowed or top in sys.stdlib_module_names, module


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs_are_whole_and_small(name):
    """Executed with the exercises open, without an error, and light enough for a repository."""
    texts = [o.text for cell in code(name) for o in cell.outputs if o.output_type == "stream"]
    assert sum(t.count("not answered yet") for t in texts) == len(ANSWERS[name])
    assert not any("right!" in t or "try again" in t for t in texts)
    pictures = [
        o.data["image/png"] for cell in code(name) for o in cell.outputs if "image/png" in o.get("data", {})
    ]
    assert len(pictures) >= 8
    assert max(len(p) * 3 // 4 for p in pictures) <= 60_000
    assert len((ROOT / "notebooks" / f"{name}.ipynb").read_bytes()) < 900_000


def edit_code(notebook):
    cell = next(c for c in notebook.cells if c.source.startswith("%%twin torch"))
    cell.source = cell.source.replace("torch", "t0rch", 1)


def drop_cell(notebook):
    del notebook.cells[-1]


def run_out_of_order(notebook):
    next(c for c in notebook.cells if c.cell_type == "code").execution_count = 7


def record_error(notebook):
    cell = next(c for c in notebook.cells if c.cell_type == "code")
    cell.outputs.append(nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[]))


@pytest.mark.parametrize("change", [edit_code, drop_cell, run_out_of_order, record_error])
def test_planted_change_is_caught(change):
    name = NAMES[0]
    built, changed = builder.build(builder.sources()[name]), stored(name)
    change(changed)
    assert builder.differences(built, changed) != []


def test_changed_package_is_caught(monkeypatch, tmp_path):
    """The text in a notebook follows the package: after an edit there, `--check` fails."""
    for folder in ("jax_models", "torch_models", "twinformers"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "jax_models").unlink()
    (tmp_path / "jax_models").mkdir()
    for file in (ROOT / "jax_models").glob("*.py"):
        text = file.read_text()
        if file.stem == "layers":
            assert "distance < 0" not in text and "(distance >= 0)" in text
            text = text.replace("(distance >= 0)", "(distance > 0)")
        (tmp_path / "jax_models" / file.name).write_text(text)
    monkeypatch.setattr(builder, "ROOT", tmp_path)
    built = builder.build(builder.sources()["01_Attention-Mechanisms"])
    found = builder.differences(built, stored("01_Attention-Mechanisms"))
    assert [line for line in found if "distance > 0" in line and line.startswith("+")]


def test_selected_parts_come_alone(tmp_path):
    notebook = build(
        tmp_path,
        "# %% both: errors.TwinformersError, errors.ConfigError, configs._rope.rotary_frequencies",
        "# %% both: configs.llama.LlamaConfig[rotary_frequencies]\n"
        "# configs.llama.PRESETS[llama2-70b,\n# llama2-7b]",
    )
    text = notebook.cells[1].source
    assert text.startswith(
        "%%twin both\nfrom dataclasses import dataclass\n\n\n@dataclass(frozen=True, kw_only=True)"
    )
    assert "class LlamaConfig:\n" in text  # the base is not in the notebook
    assert "    hidden_size: int  # D\n" in text
    assert "def rotary_frequencies(self)" in text
    assert "def validate" not in text and "from_gguf" not in text and "ClassVar" not in text
    assert text.index('"llama2-70b"') < text.index('"llama2-7b"') and "llama3" not in text


def test_what_a_definition_needs_comes_along(tmp_path):
    _, torch = build(tmp_path, "# %% twin: random.bits").cells
    assert torch.source.startswith("%%twin torch\nimport math\nimport torch\n\n\nMASK = ")
    assert (
        torch.source.index("ROTATIONS =")
        < torch.source.index("def _threefry")
        < torch.source.index("def bits")
    )


@pytest.mark.parametrize(
    ("directive", "message"),
    [
        ("twin: layers.attend", "no earlier cell defines"),  # dropout needs bits, of another file
        ("twin: layers.nothing", "no such definition"),
        ("twin: nowhere.attend", "no such file"),
        ("both: configs.llama.LlamaConfig[nothing]", "no such definition"),
        ("both: configs.llama.PRESETS[llama9]", "no such definition"),
        ("twin: attend", "not a name"),
        ("twins: layers.visible", "unknown directive"),
    ],
)
def test_bad_directive_is_refused(tmp_path, directive, message):
    with pytest.raises(FormatError, match=message):
        build(tmp_path, f"# %% {directive}")


MAGIC = (ROOT / "notebooks" / "src" / "_magic.py").read_text()
DEFINE = (
    "%%twin {}\nclass Part:\n    side = '{}'\n\n\nclass Whole:\n    def part(self):\n        return Part()\n"
)


def test_twin_modules_keep_apart():
    """Classes of one name, each finding its own; source and tracebacks as in a file."""
    shown = run(
        MAGIC,
        "%%twin both\nfrom typing import NamedTuple\n\nclass Pair(NamedTuple):\n    a: Missing",
        DEFINE.format("jax", "jax"),
        DEFINE.format("torch", "torch"),
        "%%twin torch\ndef fail(x: Missing):\n    raise ValueError(Pair(x))",
        "import inspect, traceback\nimport jx, pt, shared\n"
        "print(jx.Whole().part().side, pt.Whole().part().side)\n"
        "print(inspect.getsource(pt.Whole))\n"
        "try:\n    pt.fail(3)\nexcept ValueError:\n    print(traceback.format_exc().splitlines()[-3:])\n"
        "print(shared.Pair is jx.Pair is pt.Pair, pt.Whole.__module__)",
    )
    assert "jax torch\n" in shown
    assert "class Whole:\n    def part(self):\n        return Part()" in shown
    # seven lines of the cell before, then the line within this one
    assert 'File "<pt>", line 9, in fail' in shown and "raise ValueError(Pair(x))" in shown
    assert "True pt" in shown


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("import jax_models", "a notebook stands alone"),
        ("import twinformers.configs", "a notebook stands alone"),
        ("from scripts import build_notebooks", "No module named"),
        ("1 / 0", "ZeroDivisionError"),
        ("import sys; print('a warning', file=sys.stderr)", "stderr"),
        ("import os, sys; print(sys.prefix)", "place on this machine"),
        (
            "import numpy as np\nimport matplotlib.pyplot as plt\nplt.imshow(np.random.rand(400, 400))",
            "60000 bytes",
        ),
    ],
)
@pytest.mark.slow
def test_planted_output_is_refused(cell, message):
    with pytest.raises(FormatError, match=message):
        run(cell)


def write_checkpoint(folder):
    """Meta's layout, one rank, bfloat16: a model that says 3681 ("Paris") whatever it is asked."""
    import torch

    V, D, F = 7500, 16, 24
    shapes = {"tok_embeddings": (V, D), "output": (V, D), "norm": (D,)}
    shapes |= {f"layers.0.attention.{name}": (D, D) for name in ("wq", "wk", "wv", "wo")}
    shapes |= {f"layers.0.feed_forward.w{i}": (D, F) if i == 2 else (F, D) for i in (1, 2, 3)}
    shapes |= {f"layers.0.{name}": (D,) for name in ("attention_norm", "ffn_norm")}
    torch.manual_seed(0)
    state = {f"{name}.weight": 0.02 * torch.randn(shape) for name, shape in shapes.items()}
    for name in ("tok_embeddings", "norm"):
        state[f"{name}.weight"] += 1
    state["output.weight"][3681] += 1
    torch.save({name: x.bfloat16() for name, x in state.items()}, folder / "consolidated.00.pth")
    params = {"dim": D, "n_layers": 1, "n_heads": 2, "norm_eps": 1e-5, "vocab_size": -1, "multiple_of": 8}
    (folder / "params.json").write_text(json.dumps(params))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_without_the_repository(name, tmp_path, monkeypatch):
    """From top to bottom, and each exercise tells a right answer from a wrong one."""
    write_checkpoint(tmp_path)
    monkeypatch.setenv("LLAMA_CHECKPOINT", str(tmp_path))  # what a reader of 04 may have
    notebook, cells, answers = builder.build(builder.sources()[name]), [], iter(ANSWERS[name])
    for cell in notebook.cells:
        if not QUESTION.search(cell.source):
            cells.append(cell)
            continue
        for answer in reversed(next(answers)):  # the wrong one first: what follows meets the right state
            text = QUESTION.sub(lambda _, answer=answer: f"answer = {answer}", cell.source)
            cells.append(new_code_cell(text))
    notebook.cells = cells
    builder.execute(notebook, name, timeout=900)
    texts = [o.text for c in cells for o in c.get("outputs", []) if o.output_type == "stream"]
    said = [t for text in texts for t in re.findall(r"not yet, try again|right!|not answered yet", text)]
    assert said == ["not yet, try again", "right!"] * len(ANSWERS[name])
    first = re.findall(r"^(?:Flax|PyTorch) +\[(\d+)", texts[-1], re.MULTILINE)
    assert name != "04_LLaMA_2" or first == ["3681", "3681"]


@pytest.mark.slow
def test_twin_modules_compile(tmp_path):
    """`jax.jit`, `torch.compile` and autograd work on what %%twin defines."""
    notebook = build(
        tmp_path,
        "# %% magic",
        "# %% both: errors.UsageError",
        "# %% twin: random.bits, layers.Linear, layers.dropout, layers.visible",
        "# %% twin: layers.attend, attention.MultiHeadAttention",
        "# %%\nimport jax, jx, pt, torch\nfrom flax import nnx\n"
        "x, p = torch.randn(1, 5, 8), torch.arange(5)[None]\n"
        "m = pt.MultiHeadAttention(8, 2, 4, causal=True)\n"
        "fast = torch.compile(m, backend='eager', fullgraph=True)\n"
        "assert torch.equal(fast(x, p), m(x, p))\n"
        "fast(x, p).sum().backward(); assert m.q_proj.weight.grad is not None\n"
        "j = jx.MultiHeadAttention(8, 2, 4, causal=True, rngs=nnx.Rngs(0))\n"
        "f = jax.jit(jax.grad(lambda m, x: m(x, p.numpy()).sum()))\n"
        "print(f(j, x.numpy()).q_proj.kernel.shape)",
    )
    builder.execute(notebook, "compiled", timeout=300)
    assert notebook.cells[-1].outputs[0].text == "(8, 8)\n"
