"""The HTML report shows every figure where it belongs, says what failed, and needs nothing but itself."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

import twinformers.cli.verify
from twinformers import verify
from twinformers.checkpoints import open_checkpoint
from twinformers.cli.app import run
from twinformers.errors import DestinationError
from twinformers.parity import page as module
from twinformers.parity.page import check_destination
from twinformers.parity.report import write_report
from twinformers.parity.verify import CheckResult

SOURCE = "preset:llama-tiny"
VOID = {"meta", "br", "wbr", "link", "img", "hr", "input"}
NAMES = {"Flax": "jax", "PyTorch": "torch"}


class Page(HTMLParser):
    """A page as a browser's parser sees it: elements with their attributes and the text inside them."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements, self.open = [], []
        self.feed(self.source)
        self.close()
        assert not self.open, "an element is never closed"

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "attrs": dict(attrs), "text": ""}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def find(self, tag, **attrs):
        return [
            e
            for e in self.elements
            if e["tag"] == tag and all(e["attrs"].get(k.rstrip("_")) == v for k, v in attrs.items())
        ]

    def verdict(self):
        (section,) = [e for e in self.elements if e["attrs"].get("aria-label") == "Verdict"]
        return " ".join(section["text"].split())

    def tables(self):
        """Each table as rows of cells: (attributes, text)."""
        tables = []
        for e in self.elements:
            if e["tag"] == "table":
                tables.append([])
            elif e["tag"] == "tr":
                tables[-1].append([])
            elif e["tag"] in ("th", "td"):
                tables[-1][-1].append((e["attrs"], " ".join(e["text"].split())))
        return tables

    def figures(self):
        """The table of submodules as {(path, dtype, left, right): text}, in the order of its rows."""
        (_, *dtypes), pairs, *rows = self.tables()[0]
        columns = [d for attrs, d in dtypes for _ in range(int(attrs["colspan"]))]
        keys = [
            (d, *(NAMES.get(side, side) for side in pair.split(" – ")))
            for d, (_, pair) in zip(columns, pairs, strict=True)
        ]
        return {
            (row[0][1], *key): text
            for row in rows
            for key, (_, text) in zip(keys, row[1:], strict=True)
            if text != "·"
        }


@pytest.fixture(scope="module")
def report():
    return verify(SOURCE, dtypes=["float64", "float32"])


def page(report, tmp_path, **options):
    write_report(report, tmp_path / "report.html", **options)
    return Page(tmp_path / "report.html")


def changed(report, wanted, **changes):
    """The report with some results replaced; it fails if one of them does."""
    checks = [replace(r, **changes) if wanted(r) else r for r in report.checks]
    assert checks != report.checks
    return replace(report, checks=checks, ok=all(r.ok for r in checks))


def by_submodule(report):
    return {
        (r.path or "logits", r.dtype, r.left, r.right): r
        for r in report.checks
        if r.check in ("logits", "activations", "reference")
    }


def shown(value):
    return "0" if value == 0 else f"{value:.1e}"


def test_every_figure_stands_in_its_cell(report, tmp_path):
    found = page(report, tmp_path).figures()
    expected = {key: shown(r.max_rel) for key, r in by_submodule(report).items()}
    assert found == expected
    assert len({dtype for _, dtype, _, _ in found}) == 2 and len({key[2:] for key in found}) == 3
    rows = list(dict.fromkeys(path for path, *_ in found))
    executed = [
        r.path for r in report.checks if r.check == "activations" and r.dtype == "float64" and r.left == "jax"
    ]
    assert rows == [*executed, "logits"]


def test_the_other_checks_follow(report, tmp_path):
    header, *rows = [[text for _, text in row] for row in page(report, tmp_path).tables()[1]]
    others = [r for r in report.checks if r.check in ("cache", "generation", "rounding")]
    assert len(rows) == len(others) > 6
    for row, r in zip(rows, others, strict=True):
        assert row[0] == (f"{r.check}, {r.path}" if r.path else r.check) and row[1] == r.dtype
        if r.max_rel is not None:
            assert row[header.index("relative")] == shown(r.max_rel)
            assert row[header.index("verdict")] == ("reported" if r.limit is None else "✓ ok")
    assert sorted({row[4] for row in rows if row[0] == "generation"}) == ["the same"]


def test_a_pass_says_so_first(report, tmp_path):
    assert report.ok
    with open_checkpoint(SOURCE) as checkpoint:
        found = page(report, tmp_path, checkpoint=checkpoint)
    headings = [e["tag"] for e in found.elements if e["tag"] in ("section", "h2", "table", "svg")]
    assert headings[0] == "section" and found.verdict().startswith("✓ Passed")
    judged = [r for r in report.checks if r.limit is not None or r.check == "generation"]
    assert f"All {len(judged)} comparisons" in found.verdict()
    facts = {e["text"] for e in found.find("dd")}
    assert {SOURCE, "llama", "85,488", "preset"} <= facts
    import jax
    import torch

    assert {jax.__version__, torch.__version__} <= facts


def test_a_failure_is_named_and_marked(report, tmp_path):
    start = ("layers.1.mlp.up_proj", "layers.1.mlp")
    failing = changed(
        report,
        lambda r: r.check == "activations" and r.dtype == "float64" and r.path in start,
        max_rel=3.21e-5,
        ok=False,
    )
    found = page(failing, tmp_path)
    assert found.verdict().startswith("✗ Failed") and "Passed" not in found.source
    assert f"2 of {len(report.checks)} comparisons failed" in found.verdict()
    assert "activations, float64, Flax – PyTorch: 2 of 39" in found.verdict()
    assert "first at layers.1.mlp.up_proj: 3.2e-05, limit 1e-12" in found.verdict()
    marked = {key for key, text in found.figures().items() if "✗" in text}
    assert marked == {(path, "float64", "jax", "torch") for path in start}
    assert len(found.find("path", class_="cross")) == 2


def test_failures_without_a_figure_are_named_too(report, tmp_path):
    failing = changed(
        report,
        lambda r: r.path == "norm" and r.left == "torch" and r.dtype == "float64",
        max_abs=None,
        max_rel=None,
        ok=False,
        note="shapes [2, 3] and [2, 4]",
    )
    failing = changed(failing, lambda r: r.check == "generation", ok=False, note="the tokens differ")
    found = page(failing, tmp_path)
    assert "first at norm: shapes [2, 3] and [2, 4]" in found.verdict()
    assert (
        "generation, float32, Flax – PyTorch: 1 of 1, first at logits: the tokens differ" in found.verdict()
    )
    assert found.figures()["norm", "float64", "torch", "transformers"] == "✗ no figure"


def test_the_first_failure_is_the_first_in_execution(report, tmp_path):
    failing = changed(
        report, lambda r: r.check == "reference" and r.path in ("", "norm", "lm_head"), ok=False
    )
    verdict = page(failing, tmp_path).verdict()
    assert verdict.count("first at norm") == 4 and "first at logits" not in verdict


def test_a_failure_beside_a_figure_takes_the_cell(report, tmp_path):
    wrong = CheckResult(
        "activations",
        "float32",
        "jax",
        "torch",
        "norm",
        None,
        None,
        None,
        False,
        "float64 in a float32 model",
    )
    found = page(replace(report, checks=[wrong, *report.checks], ok=False), tmp_path)
    cells = found.figures()
    assert cells["norm", "float32", "jax", "torch"] == "✗ no figure"
    assert list(dict.fromkeys(path for path, *_ in cells))[-3:] == ["norm", "lm_head", "logits"]
    assert "first at norm: float64 in a float32 model" in found.verdict()


def test_figures_without_limits_prove_nothing(report, tmp_path):
    checks = [r for r in report.checks if r.dtype == "float32" and r.check == "activations"]
    found = page(replace(report, checks=checks), tmp_path)
    assert found.verdict().startswith("Not judged") and "Passed" not in found.source
    assert "limit" not in found.find("svg")[0]["text"]


def test_the_plot_has_each_point_at_its_height(report, tmp_path):
    found = page(report, tmp_path)
    text = [(float(e["attrs"]["y"]), e["text"]) for e in found.find("text")]
    ticks = {int(t[2:]): y - 4 for y, t in text if re.fullmatch(r"1e-?\d+", t)}
    assert len(ticks) >= 4
    (low, bottom), (high, top) = min(ticks.items()), max(ticks.items())

    def exponent(y):
        return low + (bottom - y) / (bottom - top) * (high - low)

    # SVG's <title> inside a point is what the pointer shows, and what the point claims to be.
    points = [e for e in found.find("circle") if not e["text"].endswith(": 0")]
    assert len(points) > 70
    for e in points:
        value = float(e["text"].rpartition(": ")[2])
        assert exponent(float(e["attrs"]["cy"])) == pytest.approx(math.log10(value), abs=0.05)
    (limit,) = found.find("line", class_="limit")
    assert exponent(float(limit["attrs"]["y1"])) == pytest.approx(-12, abs=0.02)
    # the worst of the pairs is what is drawn
    cells = by_submodule(report)
    for path, dtype in (("layers.2", "float64"), ("logits", "float32")):
        worst = max(r.max_rel for (p, d, _, _), r in cells.items() if (p, d) == (path, dtype))
        (point,) = [e for e in points if e["text"].startswith(f"{path}, {dtype},")]
        assert point["text"].endswith(shown(worst))


@pytest.mark.parametrize("value", [0.0, 5e-324, 1.7e308, math.inf, None])
def test_any_figure_can_be_drawn(report, tmp_path, value):
    odd = changed(report, lambda r: r.path == "layers.1", max_rel=value, ok=value == 0)
    found = page(odd, tmp_path)
    width, height = map(float, found.find("svg")[0]["attrs"]["viewbox"].split()[2:])
    for line in found.find("polyline"):
        points = [tuple(map(float, point.split(","))) for point in line["attrs"]["points"].split()]
        assert len(points) == 40 and all(0 < x < width and 0 < y < height for x, y in points)
    alone = replace(odd, checks=[r for r in odd.checks if r.path == "layers.1"][:1])
    assert len(page(alone, tmp_path).find("polyline")) == 1


def test_foreign_text_stays_text(report, tmp_path):
    hostile = "\"'></title></section><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7*7 }}"
    bad = changed(report, lambda r: r.path == "embed" or r.check == "cache", ok=False, note=hostile)
    bad = changed(bad, lambda r: r.path == "norm", path=hostile)
    found = page(replace(bad, source=hostile, architecture=hostile), tmp_path)
    assert not found.find("script") and not found.find("img") and len(found.find("title")) > 1
    assert not any(name.startswith("on") for e in found.elements for name in e["attrs"])
    assert hostile in {e["text"] for e in found.find("dd")} and hostile in found.find("title")[0]["text"]


def test_the_page_asks_for_nothing_from_elsewhere(report, tmp_path):
    found = page(report, tmp_path)
    assert not {e["tag"] for e in found.elements} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "image",
        "use",
    }
    assert not {a for e in found.elements for a in e["attrs"]} & {
        "src",
        "href",
        "xlink:href",
        "srcset",
        "data",
    }
    (style,) = found.find("style")
    assert "url(" not in style["text"] and "@import" not in style["text"] and "://" not in found.source
    (policy,) = found.find("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["attrs"]["content"].startswith("default-src 'none'")


def test_a_bad_destination_is_refused_and_nothing_changes(tmp_path):
    other = tmp_path / "weights.safetensors"
    other.write_bytes(b"\x08not a page")
    (tmp_path / "folder").mkdir()
    for path, problem in {
        tmp_path / "missing" / "report.html": "found:    nothing",
        other / "report.html": "found:    a file",
        other: "found:    a file that is no HTML page",
        tmp_path / "folder": "found:    a folder",
        tmp_path / f"{'x' * 300}.html": "cannot be written",
    }.items():
        with pytest.raises(DestinationError, match=problem) as error:
            check_destination(path)
        assert str(path) in str(error.value) and "to do:" in str(error.value)
    assert other.read_bytes() == b"\x08not a page" and len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_leaves_the_earlier_report(report, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_report(report, path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(DestinationError, match="No space left"):
        write_report(replace(report, source="another"), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    write_report(replace(report, source="another"), path)
    assert b"another" in path.read_bytes()


def test_the_command_asks_for_the_destination_before_it_works(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(twinformers.cli.verify, "verify", lambda *_, **__: pytest.fail("the work began"))
    assert run(["verify", SOURCE, "--report", str(tmp_path / "no" / "report.html")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("ok", [True, False])
def test_the_command_writes_page_and_json(report, tmp_path, monkeypatch, capsys, ok):
    if not ok:
        report = changed(report, lambda r: r.path == "layers.2.mlp", ok=False)
    monkeypatch.setattr(twinformers.cli.verify, "verify", lambda *_, **__: report)
    path = tmp_path / "report.html"
    assert run(["verify", SOURCE, "--json", "--report", str(path)]) == (0 if ok else 1)
    assert json.loads(capsys.readouterr().out)["ok"] is ok
    assert Page(path).verdict().startswith("✓" if ok else "✗")
    assert run(["verify", SOURCE, "--report", str(path)]) == (0 if ok else 1)
    out = capsys.readouterr().out
    assert str(path) in out and ("layers.2.mlp" in out.partition("FAILED")[2]) is not ok
