"""The documentation: the gallery is what the code says, no page is lost, no link is dead, examples run.

That it builds without a warning is a step of `.ci/run`; what is here needs no Sphinx.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.util
import io
import re
import sys
from pathlib import Path

import pytest

import twinformers
from twinformers.configs import architectures
from twinformers.errors import UsageError

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
#: Folders that a build makes, and one whose files a script puts together.
OTHERS = {"course", "files", "gallery"}
FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1`*\s*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?![a-z]+:)([^)\s#]*)(?:#([^)\s]+))?\)")


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def builder():
    return load(ROOT / "scripts" / "build_gallery.py")


@pytest.fixture(scope="module")
def drawn(builder):
    """The panels of each architecture, by the names of their classes."""
    found = {name: builder.draw(name)[1] for name in builder.order()}
    return {name: {panel.name: panel.nodes for panel in panels} for name, panels in found.items()}


def pages():
    return [p for p in sorted(DOCS.rglob("*.md")) if p.relative_to(DOCS).parts[0] not in OTHERS]


# --- the gallery


def test_gallery_is_what_the_code_and_the_figures_say(builder):
    files = builder.outputs()
    assert {f"gallery-{name}.svg" for name in architectures()} <= {p.name for p in files}
    stale = [str(p.relative_to(ROOT)) for p, text in files.items() if not p.exists() or p.read_text() != text]
    assert stale == [], "run scripts/build-gallery"


def test_gallery_has_no_drawing_of_what_is_gone(builder):
    assert {p.stem for p in (DOCS / "images").glob("gallery-*.svg")} == {
        f"gallery-{n}" for n in builder.order()
    }


def test_an_architecture_without_a_story_is_an_error_that_names_its_file(builder, monkeypatch):
    monkeypatch.setattr(builder, "architectures", lambda: ("llama", "newcomer"))
    with pytest.raises(UsageError, match=r"docs/gallery/newcomer\.md"):
        builder.order()


def test_figures_hold_the_limits_and_cover_twins_and_others(builder):
    import json

    figures = json.loads(builder.FIGURES.read_text())["architectures"]
    assert figures.keys() == set(builder.order())
    for name, rows in figures.items():
        assert all(r["largest"] is None or r["largest"] <= r["limit"] for r in rows), name
        between = {r["between"] for r in rows}
        assert "Flax and PyTorch" in between, name
        assert any(b.startswith("both and") for b in between), f"{name}: nothing independent"
        assert any("gradient" in r["what"] for r in rows), name


def chain(nodes):
    """The steps in their order, by the last part of their names."""
    return [n.label.rpartition(".")[2] for n in nodes if n.kind != "in"]


def test_drawings_tell_norms_before_from_norms_after(drawn):
    for name in ("llama", "mistral", "gpt2"):
        assert chain(drawn[name]["Block"]) == ["attn_norm", "attn", "+", "mlp_norm", "mlp", "+"], name
    assert chain(drawn["bert"]["Block"]) == ["attn", "+", "attn_norm", "mlp", "+", "mlp_norm"]
    assert chain(drawn["transformer"]["EncoderLayer"]) == [
        *("self_attn", "+", "self_attn_norm"),
        *("mlp", "+", "mlp_norm"),
    ]


def test_drawings_have_the_residual_connections(drawn):
    nodes = drawn["llama"]["Block"]
    first, second = (n for n in nodes if n.kind == "add")
    assert [nodes[p].label for p in first.parents] == ["x", "attn"]
    assert [nodes[p].label for p in second.parents] == ["+", "mlp"]


def test_drawings_tell_what_is_rotated_kept_and_gated(drawn):
    nodes = drawn["llama"]["Attention"]
    rotated = [nodes[p].label for n in nodes if n.label == "rotary" for p in n.parents]
    assert rotated == ["q_proj", "k_proj"]
    assert any(n.label == "key-value cache" for n in nodes)
    assert not any(n.label == "rotary" for n in drawn["gpt2"]["Attention"])
    assert not any("cache" in n.label for n in drawn["bert"]["Attention"])
    assert chain(drawn["llama"]["MLP"]) == ["gate_proj", "silu", "up_proj", "×", "down_proj"]
    assert chain(drawn["gpt2"]["MLP"]) == ["fc1", "gelu_new", "fc2"]


def test_drawings_tell_who_sees_whom(drawn):
    masks = {name: [n.note for n in next(iter(panels.values())) if n.note] for name, panels in drawn.items()}
    assert "sees its past" in masks["llama"] and "sees all" in masks["bert"]
    assert "sees the last 4,096" in masks["mistral"]
    assert {"sees all", "sees its past"} <= set(masks["transformer"])


def test_a_drawing_follows_the_code(builder, monkeypatch):
    import jax

    import jax_models.llama

    def post_norm(self, x: jax.Array, context, cache, i) -> tuple[object, object]:
        mixed, cache = self.attn(x, context, cache, i)
        return self.attn_norm(x + self.mlp(x + mixed)), cache

    monkeypatch.setattr(jax_models.llama.Block, "__call__", post_norm)
    panels = {p.name: p.nodes for p in builder.draw("llama")[1]}
    assert chain(panels["Block"]) == ["attn", "+", "mlp", "+", "attn_norm"]


def test_tracing_leaves_the_models_as_they_were(builder):
    import jax_models.llama

    before = {name: value for name, value in vars(jax_models.llama).items() if not name.startswith("__")}
    calls = [vars(c)["__call__"] for c in (jax_models.llama.Block, jax_models.llama.MLP)]
    builder.draw("llama")
    after = {name: value for name, value in vars(jax_models.llama).items() if not name.startswith("__")}
    assert before == after
    assert calls == [vars(c)["__call__"] for c in (jax_models.llama.Block, jax_models.llama.MLP)]


@pytest.mark.parametrize("path", sorted(DOCS.glob("images/*.svg")), ids=lambda p: p.stem)
def test_drawings_are_well_formed_and_stand_alone(path):
    import xml.etree.ElementTree as ElementTree

    root = ElementTree.fromstring(path.read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "http" not in path.read_text().replace("http://www.w3.org/2000/svg", "")


# --- pages and links


def toctree(page):
    """The pages that one page's tables of contents name."""
    found = set()
    others = {p.relative_to(page.parent).with_suffix("").as_posix(): p for p in below(page.parent)}
    for body in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in body.splitlines():
            if not line.strip() or line.startswith(":"):
                continue
            entry = re.sub(r".*<(.+)>", r"\1", line.strip())
            names = fnmatch.filter(others, entry) if "*" in entry else [entry]
            assert "*" in entry or entry in others, f"{page.name} names {entry}, which is no page"
            found |= {others[name] for name in names}
    return found


def below(folder):
    return [p for p in pages() if p.is_relative_to(folder)]


def test_every_page_is_in_a_table_of_contents():
    reached, waiting = set(), [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            waiting += toctree(page)
    assert sorted(str(p.relative_to(DOCS)) for p in set(pages()) - reached) == []


def slugs(page):
    """The anchors of a page's headings, as they are made of them."""
    text = FENCE.sub("", page.read_text())
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in heads}


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(DOCS)))
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(FENCE.sub("", page.read_text())):
        other = (page.parent / target).resolve() if target else page
        assert other.is_file(), f"{target} is no file"
        assert other.is_relative_to(ROOT)
        if anchor and other.suffix == ".md":
            assert anchor in slugs(other), f"{target} has no heading {anchor}"


def test_pages_name_no_machine():
    for page in pages():
        assert not re.search(r"/(work|home|root|tmp)/", page.read_text()), page


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "api" / "python.md").read_text()
    documented = set(re.findall(r"auto(?:function|class):: twinformers\.(\w+)$", text, re.MULTILINE))
    assert documented == set(twinformers.__all__)


# --- examples


def test_examples_of_the_first_page_run_and_print_what_it_says():
    text = (DOCS / "start.md").read_text()
    blocks = re.findall(r"^```(python|text)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks].count("text") == 2
    names, printed = {}, io.StringIO()
    for kind, code in blocks:
        if kind == "python":
            with contextlib.redirect_stdout(printed):
                exec(compile(code, "docs/start.md", "exec"), names)
        else:
            assert printed.getvalue() == code
            printed.seek(0)
            printed.truncate()


def test_docstrings_become_paragraphs_lists_and_code():
    conf = load(DOCS / "conf.py")
    lines = ["A `name`, *kept* and x_.", "", "- one `a`", "- two", "", "    code *here*", ""]
    conf.rewrite(None, "function", "f", None, None, lines)
    assert lines == [
        r"A \ ``name``\ , \*kept\* and x\_.",
        *("", r"- one \ ``a``\ ", "- two", ""),
        *("::", "", "    code *here*", ""),
    ]
