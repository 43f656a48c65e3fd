"""`twinformers new`: files that import, twins that agree, and a test that fails where the work begins."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from twinformers.cli.app import run
from twinformers.configs import architectures, config_class
from twinformers.errors import DestinationError, UsageError
from twinformers.scaffold import PLACES, class_name, new_architecture

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a new architecture is added to."""
    for name in ("jax_models", "torch_models", "twinformers", "parity_tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "test_*"))
    return tmp_path


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if "__pycache__" not in p.parts)


@pytest.mark.slow
def test_the_test_leads_to_what_differs(checkout):
    """Qwen2 is LLaMA with biases on three projections: until those have rows, step 2 fails and says so."""
    new_architecture("qwen2", like="llama", root=checkout)
    environment = {**os.environ, "PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}

    def steps(*arguments):
        command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-n", "0"]
        done = subprocess.run(
            [*command, "parity_tests/test_qwen2.py", *arguments],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
        )
        return {
            line.split("::")[1].split(" ")[0][:6]: line.startswith("PASSED")
            for line in done.stdout.splitlines()
            if line.startswith(("PASSED", "FAILED")) and "::" in line
        }, done.stdout

    passed, said = steps()
    assert passed.pop("test_2") is False and "q_proj.bias" in said
    fields = ("use_sliding_window", "max_window_layers")  # which the configuration has to read or to refuse
    assert passed["test_1"] is False and all(name in said for name in fields)
    # The copies themselves are twins: of a model that transformers has under the old name.
    code = (
        "import twinformers; r = twinformers.verify('preset:qwen2-tiny', dtypes=['float64'], "
        "checks=['logits', 'activations', 'cache']); assert r.ok and r.architecture == 'qwen2'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


@pytest.mark.parametrize("like", architectures())
def test_every_architecture_can_be_begun_from(like, checkout):
    before = set(listing(checkout))
    paths = new_architecture("fresh_one", like=like, root=checkout)
    assert {str(p.relative_to(checkout)) for p in paths} == set(listing(checkout)) - before
    assert [p.parent.relative_to(checkout).as_posix() for p in paths] == [*PLACES, "parity_tests"]
    for path in paths:
        text = path.read_text()
        compile(text, str(path), "exec")
        assert "FreshOne" in text
        if path.name == "fresh_one.py":
            assert config_class(like).model_class not in text.replace("Embedding", "")
    code = (
        "from twinformers.configs import presets, preset; from twinformers.weight_maps import weight_map;"
        "from twinformers.configs import config_class as c;"
        "assert [n for n in presets() if n.startswith('fresh')] == ['fresh_one-tiny'];"
        f"one, other = preset('{like}-tiny').to_dict(), preset('fresh_one-tiny').to_dict();"
        "assert {k for k in one if one[k] != other[k]} <= {'model_type'};"
        "assert weight_map(preset('fresh_one-tiny')).parameters > 1000;"
        "assert c('fresh_one').model_class == 'FreshOne' and c('fresh_one').__module__.endswith('fresh_one')"
    )
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    ruff = Path(sys.executable).with_name("ruff")
    config = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    for check in (["check", "--select", "F,E9"], ["format"]):
        subprocess.run([ruff, *check, *config, *map(str, paths)], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("name", "like", "said"),
    [
        ("Llama", "llama", "small letters"),
        ("../x", "llama", "small letters"),
        ("class", "llama", "small letters"),
        ("llama", "llama", "here already"),
        ("fresh", "qwen9", "no such architecture"),
    ],
)
def test_bad_names_are_refused(name, like, said, checkout):
    before = listing(checkout)
    with pytest.raises(UsageError, match=said):
        new_architecture(name, like=like, root=checkout)
    assert listing(checkout) == before


def test_nothing_is_overwritten_and_nothing_is_half_written(checkout):
    (checkout / "torch_models" / "fresh.py").write_text("precious")
    before = listing(checkout)
    with pytest.raises(DestinationError, match="exists"):
        new_architecture("fresh", root=checkout)
    assert listing(checkout) == before
    assert (checkout / "torch_models" / "fresh.py").read_text() == "precious"


def test_outside_of_a_checkout_it_is_refused(tmp_path):
    with pytest.raises(UsageError, match="checkout"):
        new_architecture("fresh", root=tmp_path)


def test_the_verb_says_what_is_next(monkeypatch, checkout, capsys):
    import twinformers.scaffold as module

    monkeypatch.setattr(module, "__file__", str(checkout / "twinformers" / "scaffold.py"))
    assert run(["new", "fresh", "--like", "gpt2"]) == 0
    assert "scripts/test parity_tests/test_fresh.py" in capsys.readouterr().out
    assert run(["new", "other", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["files"]) == 5
    assert run(["new", "fresh"]) == 2
    assert capsys.readouterr().err.startswith("error:")


def test_class_names():
    assert [class_name(n) for n in ("qwen2", "qwen2_moe", "gpt_neox")] == ["Qwen2", "Qwen2Moe", "GptNeox"]
