"""The comparison shows every figure of its result, marks what really differs, and reads well anywhere."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from decimal import Decimal, localcontext
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from test_report import Page
from tokenizers import Tokenizer, models, pre_tokenizers

import torch_models.llama
import twinformers.cli.compare
from twinformers import compare, load, open_checkpoint, port, write_comparison
from twinformers.cli.app import run
from twinformers.configs import preset
from twinformers.errors import SourceError, UsageError
from twinformers.parity import compare as api
from twinformers.parity import rounding
from twinformers.parity.comparing import sources, speed
from twinformers.parity.comparing.page import CHART, SHADES, heat_maps, histogram
from twinformers.parity.comparing.tokens import agreement, divergence
from twinformers.parity.page import by_submodule
from twinformers.parity.results import CheckResult

SOURCE = "preset:llama-tiny"
ROOT = Path(__file__).parent.parent
CPU = {"jax": None, "torch": torch.device("cpu")}


def speeds():
    """Figures that no other part of a page shows."""
    one = speed.Speed(
        "jax", "float32", 128, 16, 5, 1.25, 7.5, 46853.0, 3021.5, 159 << 20, 308 << 20, None, 2.5
    )
    other = replace(one, framework="torch", prefill_tokens_per_second=9551.0, peak_bytes=616 << 20)
    return [one, other, speed.Speed("transformers", "float32", error="the process was ended by signal 9")]


@pytest.fixture(scope="module")
def result():
    return replace(compare(SOURCE, timing=False, max_new_tokens=8), speed=speeds())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose every token is a word."""
    folder = tmp_path_factory.mktemp("compare") / "model"
    port(SOURCE, folder, to="hf")
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(preset("llama-tiny").vocab_size)}, "w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    return folder


def page(result, tmp_path):
    write_comparison(result, tmp_path / "comparison.html")
    return Page(tmp_path / "comparison.html")


def changed(result, wanted, **changes):
    """The result with some of verify's replaced."""
    checks = [replace(r, **changes) if wanted(r) else r for r in result.report.checks]
    assert checks != result.report.checks
    ok = all(r.ok for r in checks)
    return replace(result, ok=ok, report=replace(result.report, checks=checks, ok=ok))


def shown(value):
    return "no figure" if value is None else f"{value:.1e}" if value else "0"


def tables(found, kind):
    """The tables of a class, or without one: rows of cell texts."""
    classes = [e["attrs"].get("class") for e in found.find("table")]
    return [t for t, c in zip(found.tables(), classes, strict=True) if c == kind]


# Token by token


def exact_divergence(left, right):
    """With fifty digits, by the definition."""
    with localcontext() as context:
        context.prec = 50
        p, q = ([Decimal(float(x)).exp() for x in side] for side in (left, right))
        p, q = ([x / sum(side) for x in side] for side in (p, q))
        return float(sum(a * (a.ln() - b.ln()) for a, b in zip(p, q, strict=True)))


@pytest.mark.parametrize("gap", [0.0, 1e-14, 1e-9, 1e-4, 2e-3, 0.1, 5.0, 200.0])
def test_divergence_matches_the_definition(gap):
    rng = np.random.default_rng(0)
    left = rng.normal(0, 3, (2, 40))
    right = left + gap * rng.normal(0, 1, left.shape)
    exact = [exact_divergence(a, b) for a, b in zip(left, right, strict=True)]
    # Logits of 10 hold differences of 1e-14 to about a tenth.
    assert divergence(left, right) == pytest.approx(exact, rel=0.3 if gap < 1e-12 else 1e-5, abs=1e-31)
    if gap > 1e-2:
        p, q = (torch.from_numpy(x).log_softmax(-1) for x in (left, right))
        theirs = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        assert divergence(left, right) == pytest.approx(theirs.numpy(), rel=1e-9)


def test_choices_match_the_engines_and_torch(result):
    for dtype, t in zip(("float64", "float32"), result.tokens, strict=True):
        assert t.ok and t.dtype == dtype and t.prompt is None and t.prompt_tokens == 24
        assert [s.generated for s in t.steps] == [False] * 24 + [True] * 7
        model = load(SOURCE, "torch", dtype)
        tokens = torch.tensor([[s.token for s in t.steps]])
        with torch.inference_mode():
            logits = model(tokens, torch.arange(tokens.shape[1])[None])[0][0]
        probabilities, chosen = logits.double().softmax(-1).max(-1)
        assert [s.choices["torch"].token for s in t.steps] == chosen.tolist()
        assert [s.choices["torch"].probability for s in t.steps] == pytest.approx(
            probabilities.numpy(), rel=1e-6
        )
        from torch_models.generate import Generator

        stream = Generator(model).stream([tokens[0, :24].tolist()], max_new_tokens=8)
        continued = [row[0] for row in stream]
        assert [s.choices["jax"].token for s in t.steps[23:]] == continued
        assert t.agreement == {"jax-torch": 1, "jax-transformers": 1, "torch-transformers": 1}
        for pair, largest in t.max_divergence.items():
            assert largest == max(s.divergence[pair] for s in t.steps)
            assert 0 < largest < {"float64": 1e-26, "float32": 1e-9}[dtype]


@pytest.fixture
def unrotated(monkeypatch):
    monkeypatch.setattr(torch_models.llama, "rotate", lambda x, cos, sin: x)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_another_choice_fails_unless_rounding_explains_it(dtype, unrotated, monkeypatch):
    prompt = list(range(1, 25))
    with open_checkpoint(SOURCE) as checkpoint:
        t = agreement(checkpoint, dtype, prompt, 4, CPU, reference=False)
        assert not t.ok and re.match(r"position \d+: float64 puts the two choices .* apart", t.note)
        assert 0 < t.agreement["jax-torch"] < 1 and t.max_divergence["jax-torch"] > 1e-3
        monkeypatch.setattr(rounding.Rounding, "limit", rounding.RoundingLimit(1e9, 1e9))
        assert agreement(checkpoint, dtype, prompt, 4, CPU, reference=False).ok is (dtype == "float32")


def test_what_is_not_finite_fails_and_has_no_figure(monkeypatch):
    monkeypatch.setattr(torch_models.llama, "rotate", lambda x, cos, sin: x * float("nan"))
    with open_checkpoint(SOURCE) as checkpoint:
        t = agreement(checkpoint, "float32", [1, 2, 3], 2, CPU, reference=False)
    assert not t.ok and t.note == "position 0: not finite" and t.max_divergence == {"jax-torch": None}
    json.dumps(asdict(t), allow_nan=False)


def test_a_prompt_is_continued_in_its_own_words(folder):
    found = compare(folder, dtypes=["float32"], prompt="w7 w8 w9", max_new_tokens=3, timing=False)
    (t,) = found.tokens
    assert t.prompt == "w7 w8 w9" and [s.text for s in t.steps[:3]] == ["w7", "w8", "w9"]
    assert all(c.text == f"w{c.token}" for s in t.steps for c in s.choices.values())


@pytest.mark.parametrize("alike", [True, False])
def test_verdict_takes_the_tokens_and_speed_the_working_dtype(result, monkeypatch, alike):
    asked = []
    measured = replace(speeds()[0], framework="any")
    monkeypatch.setattr(api, "verify", lambda *_, **__: result.report)
    monkeypatch.setattr(api, "agreement", lambda *_, **__: replace(result.tokens[0], ok=alike))
    monkeypatch.setattr(api, "measure", lambda *given: asked.append(given) or measured)
    found = compare(SOURCE, dtypes=["bfloat16", "float64"], jax_device=jax.devices("cpu")[0])
    assert found.ok is alike and found.speed == [measured] * 3
    assert asked == [
        (SOURCE, "jax", "bfloat16", "cpu:0"),
        (SOURCE, "torch", "bfloat16", None),
        (SOURCE, "transformers", "bfloat16", None),
    ]
    assert compare(SOURCE, timing=False).speed == [] and len(asked) == 3


@pytest.mark.parametrize(
    ("options", "error", "problem"),
    [
        ({"prompt": "some text"}, SourceError, "has no tokenizer"),
        ({"max_new_tokens": 0}, UsageError, "max_new_tokens"),
        ({"dtypes": ["float8"]}, UsageError, "float8"),
        ({"torch_device": "abacus", "timing": False}, UsageError, "no such device"),
    ],
)
def test_bad_options_are_refused(options, error, problem):
    with pytest.raises(error, match=problem):
        compare(SOURCE, **options)


@pytest.mark.parametrize(("prompt", "problem"), [("", "has no tokens"), ("w1 " * 5000, "5000 \\+ 32")])
def test_bad_prompts_are_refused(folder, prompt, problem):
    with pytest.raises(UsageError, match=problem):
        compare(folder, prompt=prompt, timing=False)


# Heat maps and histograms


def test_each_submodule_has_its_cell_and_deeper_is_worse(result):
    checks = [r for r in result.report.checks if r.check in ("logits", "activations", "reference")]
    maps = heat_maps(by_submodule(checks))
    assert [(m.dtype, m.stack) for m in maps] == [
        (d, s) for d in ("float64", "float32") for s in ("", "layers")
    ]
    for dtype in ("float64", "float32"):
        cells = [c for m in maps if m.dtype == dtype for _, row in m.rows for c in row]
        worst = {}
        for r in checks:
            if r.dtype == dtype:
                worst[r.path or "logits"] = max(worst.get(r.path or "logits", 0), r.max_rel)
        assert {c.path: c.result.max_rel for c in cells} == worst and len(cells) == len(worst)
        ordered = sorted(cells, key=lambda c: c.result.max_rel)
        shades = [c.shade for c in ordered]
        assert shades == sorted(shades) and shades[0] == 0 and shades[-1] > shades[0]
        edges = next(m.edges for m in maps if m.dtype == dtype)
        for c in cells:
            if c.result.max_rel:
                assert edges[c.shade] - 1e-9 <= math.log10(c.result.max_rel) <= edges[c.shade + 1] + 1e-9
    layers = maps[1]
    at = layers.columns.index("mlp.up_proj")
    assert [row[at].path for _, row in layers.rows] == [f"layers.{n}.mlp.up_proj" for n in range(3)]


def test_two_stacks_have_a_map_each():
    paths = ["encoder.0.mlp", "encoder.1.mlp", "decoder.0.cross_attn", "decoder.0", "embed"]
    checks = [
        CheckResult("activations", "float64", "jax", "torch", p, 1e-15, 1e-15, 1e-12, True) for p in paths
    ]
    maps = {m.stack: m for m in heat_maps(by_submodule(checks))}
    assert maps.keys() == {"encoder", "decoder", ""}
    assert maps["decoder"].columns == ["cross_attn", "the layer"] and len(maps["encoder"].rows) == 2


def test_histogram_counts_every_gradient():
    values = [0.0, 0.0, 1.5e-15, 1.7e-15, 1.9e-15, 4e-14, None]
    results = [
        CheckResult("gradients", "float64", "jax", "torch", f"p{n}", v, v, 1e-10, v is not None)
        for n, v in enumerate(values)
    ]
    found = histogram("float64", results)
    assert [b.number for b in found.bars if b.number] == [2, 2, 1, 1, 1]  # 1.9 lies in the next quarter
    assert sum(b.number for b in found.bars) == found.total == 7
    assert found.bars[0].label == "0" and found.bars[-1].label == "none"
    heights = [CHART["floor"] - b.y for b in found.bars]
    assert heights == pytest.approx([b.number / 2 * max(heights) for b in found.bars], abs=0.1)
    assert [r.path for r in found.worst[:2]] == ["p6", "p5"]
    assert histogram("float64", []).bars == []


# Sources


@pytest.mark.parametrize("architecture", ["llama", "transformer"])
def test_both_files_stand_there_whole_and_in_order(architecture):
    for pair in sources.twin_sources(architecture):
        for side, pick in (("jax", lambda r: r.left), ("torch", lambda r: r.right)):
            lines = [line for row in pair.rows for line in pick(row)]
            text = (ROOT / f"{side}_models" / f"{pair.name}.py").read_text().splitlines()
            assert [line.text + line.note for line in lines] == text
            assert [line.number for line in lines] == list(range(1, len(text) + 1))
    assert [p.name for p in sources.twin_sources("llama")][:2] == ["llama", "layers"]


def really_different(pair):
    return [
        ("".join(line.text.strip() for line in r.left), "".join(line.text.strip() for line in r.right))
        for r in pair.rows
        if r.kind == "different"
    ]


def test_spelling_is_no_difference():
    left = """class A(nnx.Module):
    def __call__(self, x: jax.Array):
        return jnp.concatenate([x, x], axis=-1)
"""
    right = """class A(nn.Module):
    def forward(self, x: torch.Tensor):
        super().__init__()
        return torch.cat(
            [x, x],
            dim=-1,
        )
"""
    pair = sources.compare_sources("a", left, right)
    assert pair.different == 0 and pair.statements == 6 and not really_different(pair)
    assert {r.kind for r in pair.rows} == {"spelling"}
    assert {r.kind for r in sources.compare_sources("a", left, left).rows} == {"same"}


#: A change to torch_models/llama.py that the page must mark, and that alone.
PLANTED = {
    "the gate and the value exchanged": (
        "silu(self.gate_proj(x)) * self.up_proj(x)",
        "silu(self.up_proj(x)) * self.gate_proj(x)",
    ),
    "another epsilon": (
        "RMSNorm(config.hidden_size, config.rms_norm_eps",
        "RMSNorm(config.hidden_size, 1e-5",
    ),
    "another order of axes": (
        ".reshape(B, T, -1, self.head_dim)  # [B, T, N, H]",
        ".reshape(B, -1, T, self.head_dim)",
    ),
    "a statement dropped": ("        self.head_dim = H\n", ""),
    "in another block": ("        return x, cache\n", "            return x, cache\n"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_real_difference_is_marked(name):
    old, new = PLANTED[name]
    left, right = ((ROOT / f"{side}_models/llama.py").read_text() for side in ("jax", "torch"))
    assert old in right
    before = really_different(sources.compare_sources("llama", left, right))
    after = really_different(sources.compare_sources("llama", left, right.replace(old, new, 1)))
    assert len(before) == 3  # the imports (of Linear), the head, the device of the cache
    more = [pair for pair in after if pair not in before]
    assert len(more) == 1 and set(before) < set(after)
    assert new.partition("#")[0].strip() in more[0][1] and (new or not more[0][1])


def test_a_note_is_no_difference_and_is_kept():
    pair = sources.compare_sources(
        "a", "# vs torch: kernels\nx = 1  # vs torch: one\n", "# vs jax: weights\nx = 1\n"
    )
    assert pair.different == 0
    assert [line.note for r in pair.rows for line in r.left] == ["# vs torch: kernels", "# vs torch: one"]
    assert [line.note for r in pair.rows for line in r.right] == ["# vs jax: weights", ""]


# Speed


def test_each_framework_is_measured_in_a_process_of_its_own():
    found = speed.measure(SOURCE, "torch", "float32", "cpu")
    assert found.error == "" and (found.framework, found.dtype) == ("torch", "float32")
    assert (found.prompt_tokens, found.new_tokens, found.repeats) == (128, 16, 5)
    assert min(found.load_seconds, found.prefill_tokens_per_second, found.decode_tokens_per_second) > 0
    assert 50 << 20 < found.imported_bytes < found.peak_bytes < 4 << 30
    assert found.device_bytes is None and found.compile_seconds >= 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak apart")
def test_the_memory_of_the_parent_is_not_counted():
    # The parent holds 512 MiB when it starts the child, which `getrusage` of the child would report.
    code = (
        "import subprocess, sys, numpy\n"
        "held = numpy.ones(64 << 20)\n"
        "child = 'from twinformers.parity.comparing.speed import resident; print(resident(peak=True))'\n"
        "print(subprocess.run([sys.executable, '-c', child], capture_output=True, text=True).stdout)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert 10 << 20 < int(done.stdout) < 400 << 20


@pytest.mark.parametrize(
    ("source", "device", "said"),
    [("./nowhere", None, "no such source"), (SOURCE, "abacus", "no such device")],
)
def test_what_cannot_be_measured_says_why(source, device, said):
    found = speed.measure(source, "torch", "float32", device)
    assert said in found.error and found.peak_bytes is None


def test_a_killed_process_says_so(monkeypatch):
    monkeypatch.setattr(speed.sys, "executable", shutil.which("sh"))
    real = subprocess.run
    monkeypatch.setattr(speed.subprocess, "run", lambda command, **k: real(["sh", "-c", "kill -9 $$"], **k))
    assert speed.measure(SOURCE, "jax", "float32", None).error == "the process was ended by signal 9"


# The page


def test_the_sections_come_in_order(result, tmp_path):
    found = page(result, tmp_path)
    assert found.verdict().startswith("✓ Passed")
    headings = [e["attrs"]["id"] for e in found.find("h2")]
    assert headings == ["heat", "growth", "tokens", "gradients", "others", "speed", "sources", "compared"]
    judged = [r for r in result.report.checks if r.limit is not None or r.check == "generation"]
    assert f"All {len(judged) + 2} comparisons" in found.verdict()
    facts = {e["text"] for e in found.find("dd")}
    assert {SOURCE, "llama", "85,488", torch.__version__} <= facts


def test_figures_of_the_heat_map_are_those_of_the_result(result, tmp_path):
    found = tables(page(result, tmp_path), "heat")
    maps = heat_maps(by_submodule([r for r in result.report.checks if r.check != "gradients"]))
    assert len(found) == len(maps) == 4
    for rows, m in zip(found, maps, strict=True):
        assert [text for _, text in rows[0][1:]] == m.columns
        for row, (number, cells) in zip(rows[1:], m.rows, strict=True):
            assert row[0][1] == number
            for (attrs, text), cell in zip(row[1:], cells, strict=True):
                assert text == shown(cell.result.max_rel) and attrs["class"] == f"h{cell.shade}"
                assert attrs["title"].startswith(f"{cell.path}, ")


def test_figures_of_the_tokens_are_those_of_the_result(result, tmp_path):
    totals, *positions = tables(page(result, tmp_path), None)[:3]
    expected = [
        [t.dtype, f"{100 * share:.1f}%", shown(t.max_divergence[pair])]
        for t in result.tokens
        for pair, share in t.agreement.items()
    ]
    assert [[row[0][1], row[2][1], row[3][1]] for row in totals[1:]] == expected
    for rows, t in zip(positions, result.tokens, strict=True):
        assert len(rows) - 1 == len(t.steps) == 31
        for row, s in zip(rows[1:], t.steps, strict=True):
            cells = [text for _, text in row]
            assert cells[:3] == [str(s.position), str(s.token), "Flax" if s.generated else "prompt"]
            chosen = [x for c in s.choices.values() for x in (str(c.token), f"{c.probability:.4f}")]
            assert cells[3:] == chosen + [shown(d) for d in s.divergence.values()]


def test_figures_of_the_gradients_are_those_of_the_result(result, tmp_path):
    found = page(result, tmp_path)
    worst = tables(found, None)[3:5]
    for dtype, rows in zip(("float64", "float32"), worst, strict=True):
        ours = [
            r.max_rel
            for r in result.report.checks
            if r.check == "gradients" and r.dtype == dtype and r.path.endswith(".weight")
        ]
        assert len(ours) == 60 and len(rows) == 13
        assert [row[2][1] for row in rows[1:]] == [shown(v) for v in sorted(ours, reverse=True)[:12]]
    titles = [e["text"] for e in found.find("title") if e["text"].startswith("How many of 60")]
    assert len(titles) == 2
    assert all(sum(map(int, re.findall(r"(\d+) from", t))) == 60 for t in titles)


def test_figures_of_the_speed_are_those_of_the_result(result, tmp_path):
    found = page(result, tmp_path)
    (rows,) = tables(found, "speed")
    cells = {row[0][1]: [text for _, text in row[1:]] for row in rows}
    assert cells["prompt, tokens/s"] == ["46,853", "9,551", "–"]
    assert cells["memory at its peak, MiB"] == ["308", "616", "–"]
    assert "accelerator at its peak, MiB" not in cells
    bars = [e["attrs"]["style"] for e in found.find("span", class_="bar")]
    assert bars[:2] == ["--share: 100.0%", "--share: 20.4%"] and bars[-2:] == [
        "--share: 50.0%",
        "--share: 100.0%",
    ]
    assert "transformers was not measured: the process was ended by signal 9" in found.source
    assert "speed" not in {e["attrs"].get("id") for e in page(replace(result, speed=[]), tmp_path).elements}


def test_a_failure_is_marked_everywhere(result, tmp_path):
    failing = changed(
        result,
        lambda r: r.path == "layers.1.mlp" and r.check == "activations" and r.dtype == "float64",
        max_rel=3.21e-5,
        ok=False,
    )
    t = replace(failing.tokens[0], ok=False, note="position 3: float64 puts the two choices far apart")
    found = page(replace(failing, tokens=[t, *failing.tokens[1:]]), tmp_path)
    verdict = found.verdict()
    assert verdict.startswith("✗ Failed") and "Passed" not in found.source
    assert "first at layers.1.mlp: 3.2e-05, limit 1e-12" in verdict and "position 3" in verdict
    failed = [(a, text) for m in tables(found, "heat") for row in m for a, text in row if "✗" in text]
    assert [(a["class"], text) for a, text in failed] == [(f"h{SHADES - 1} failed-cell", "✗ 3.2e-05")]


def test_foreign_text_stays_text(result, tmp_path):
    hostile = "\"'></title></section><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7*7 }}\u202e\x00"
    bad = changed(result, lambda r: r.path in ("embed", "layers.0.mlp") or r.check == "cache", note=hostile)
    bad = changed(bad, lambda r: r.path == "norm", path=hostile)
    bad = changed(bad, lambda r: r.check == "gradients" and r.path == "norm.weight", path=hostile, ok=False)
    t = bad.tokens[1]
    s = t.steps[0]
    choices = {name: replace(c, text=hostile) for name, c in s.choices.items()}
    t = replace(t, prompt=hostile, steps=[replace(s, text=hostile, choices=choices), *t.steps[1:]])
    row = sources.Row("different", [sources.Line(1, hostile, hostile)], [])
    found = page(
        replace(
            bad,
            source=hostile,
            report=replace(bad.report, source=hostile, architecture=hostile),
            tokens=[t],
            speed=[replace(bad.speed[0], error=hostile), *bad.speed[1:]],
            sources=[sources.SourcePair("a", [row], 1, 1)],
            parameters=[*bad.parameters, hostile],
            facts={hostile: hostile},
            config={hostile: hostile},
        ),
        tmp_path,
    )
    assert not found.find("script") and not found.find("img")
    assert not any(name.startswith("on") for e in found.elements for name in e["attrs"])
    assert found.source.count("alert(1)") > 20 and "49" not in found.find("title")[0]["text"]
    code = [e["text"] for e in found.find("code") if "␣src" in e["text"]]  # the tokens' text
    assert len(code) == 4 and all("\u202e" not in c and "\\u202e" in c and "\\u0000" in c for c in code)


def test_the_page_asks_for_nothing_from_elsewhere(result, tmp_path):
    found = page(result, tmp_path)
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
        "srcset",
        "xlink:href",
        "data",
        "action",
    }
    (style,) = found.find("style")
    assert "url(" not in style["text"] and "@import" not in style["text"]
    assert not re.search(r"(?<!arXiv)://", found.source)
    (policy,) = found.find("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["attrs"]["content"].startswith("default-src 'none'")


def test_every_reference_inside_the_page_resolves(result, tmp_path):
    found = page(result, tmp_path)
    ids = [e["attrs"]["id"] for e in found.elements if "id" in e["attrs"]]
    assert len(ids) == len(set(ids))
    links = [e["attrs"]["href"] for e in found.find("a")]
    assert len(links) > 10 and all(link[0] == "#" and link[1:] in ids for link in links)
    for e in found.elements:
        assert set(e["attrs"].get("aria-labelledby", "").split()) <= set(ids)
    regions = [e["attrs"] for e in found.elements if e["attrs"].get("class") == "scroll"]
    assert len(regions) > 10
    assert all(a["role"] == "region" and a["tabindex"] == "0" for a in regions)
    names = [a.get("aria-label") or a["aria-labelledby"] for a in regions]
    assert len(names) == len(set(names))


# In a browser

CHROMIUM = next(
    (p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None
)
browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

#: Looks at a page inside a frame as wide as a screen; the page itself may run no script.
LOOK = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe src="{page}" style="border:0;width:{width}px;height:900px"></iframe><pre id="seen"></pre>
<script>
const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
onload = () => {{
  const d = frames[0].document, seen = {{headings: [], contrasts: {{}}}};
  for (const e of d.querySelectorAll("details")) e.open = true;
  for (const e of d.querySelectorAll("h1,h2,h3,h4,h5,h6")) seen.headings.push(+e.tagName[1]);
  const walker = d.createTreeWalker(d.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {{
    const text = walker.currentNode, e = text.parentElement;
    if (!text.data.trim() || e.closest("title,desc")) continue;
    let ground = e;
    const paint = () => rgb(frames[0].getComputedStyle(ground).backgroundColor);
    while (ground.parentElement && (paint()[3] ?? 1) == 0) ground = ground.parentElement;
    const style = frames[0].getComputedStyle(e), colour = e.closest("svg") ? style.fill : style.color;
    const found = ratio(light(rgb(colour)), light(paint()));
    const name = `${{colour}} on ${{paint()}}: ${{text.data.trim().slice(0, 30)}}`;
    if (!(found > 4.5)) seen.contrasts[name] = found;
    seen.least = Math.min(seen.least ?? 99, found);
  }}
  seen.width = frames[0].innerWidth;
  seen.page = Math.max(d.documentElement.scrollWidth, d.body.scrollWidth);
  seen.ground = frames[0].getComputedStyle(d.body).backgroundColor;
  const columns = [...d.querySelectorAll(".twins .different td")].slice(0, 2);
  seen.columns = columns.map(e => e.getBoundingClientRect().left);
  document.getElementById("seen").textContent = JSON.stringify(seen);
}};
</script>"""


def look(path, width, *, dark=False):
    """What a browser of that width says about a page, and what it writes to its console."""
    frame = path.parent / "frame.html"
    frame.write_text(LOOK.format(page=path.name, width=width), encoding="utf-8")
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",  # it runs as root in containers, on pages that these tests wrote
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--allow-file-access-from-files",
            "--enable-logging=stderr",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--user-data-dir={path.parent / 'profile'}",
            f"--window-size={width},900",
            "--virtual-time-budget=20000",
            "--dump-dom",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    seen = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert seen, done.stderr
    text = seen[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return json.loads(text), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@browser
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False), (390, True)])
def test_a_browser_finds_nothing_wrong(result, tmp_path, width, dark):
    t = result.tokens[1]
    s = t.steps[0]
    apart = replace(s, choices=s.choices | {"torch": replace(s.choices["torch"], token=1, text="␣" * 30)})
    path = tmp_path / "comparison.html"
    write_comparison(replace(result, tokens=[replace(t, steps=[apart, *t.steps[1:]])]), path)
    seen, console = look(path, width, dark=dark)
    assert not console
    assert seen["width"] == width and seen["page"] <= width
    assert seen["contrasts"] == {} and seen["least"] >= 4.5
    headings = seen["headings"]
    assert headings[0] == 1 and headings.count(1) == 1 and 3 in headings
    assert all(b <= a + 1 for a, b in itertools.pairwise(headings))
    assert seen["ground"] == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
    left, right = seen["columns"]
    assert left == right if width == 390 else right > left + 300  # one below the other on a phone


@browser
def test_a_failed_page_is_as_readable(result, tmp_path):
    failing = changed(
        result, lambda r: r.path in ("layers.1.mlp", "norm.weight") or r.check == "cache", ok=False
    )
    for dark in (False, True):
        write_comparison(failing, tmp_path / "comparison.html")
        seen, console = look(tmp_path / "comparison.html", 390, dark=dark)
        assert not console and seen["page"] <= 390 and seen["contrasts"] == {}


@browser
def test_a_browser_would_find_what_is_wrong(result, tmp_path):
    path = tmp_path / "comparison.html"
    write_comparison(result, path)
    planted = path.read_text().replace(
        "</main>",
        '<h4>skipped</h4><p style="color:#999">pale</p><div style="width:3000px">wide</div>'
        '<img src="picture.png" alt=""></main>',
    )
    path.write_text(planted)
    seen, console = look(path, 390)
    assert any("picture.png" in line for line in console) and seen["page"] >= 3000
    assert [name.rpartition(": ")[2] for name in seen["contrasts"]] == ["pale"]
    assert seen["headings"][-2:] == [2, 4]


# The command


def test_the_command_asks_for_the_destination_before_it_works(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(twinformers.cli.compare, "compare", lambda *_, **__: pytest.fail("the work began"))
    assert run(["compare", SOURCE, "--report", str(tmp_path / "no" / "report.html")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("ok", [True, False])
def test_the_command_writes_page_and_json(result, tmp_path, monkeypatch, capsys, ok):
    if not ok:
        result = changed(result, lambda r: r.path == "layers.2.mlp", ok=False)
    options = {}
    monkeypatch.setattr(
        twinformers.cli.compare, "compare", lambda _, **given: options.update(given) or result
    )
    path = tmp_path / "report.html"
    assert run(["compare", SOURCE, "--json", "--no-timing", "--report", str(path)]) == (0 if ok else 1)
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(result.to_dict())) and found["ok"] is ok
    assert options["timing"] is False and options["prompt"] is None and options["max_new_tokens"] == 32
    assert Page(path).verdict().startswith("✓" if ok else "✗")
    assert run(["compare", SOURCE, "--prompt", "w1", "--report", str(path)]) == (0 if ok else 1)
    out = capsys.readouterr().out
    assert str(path) in out and "46,853" in out and ("layers.2.mlp" in out.partition("FAILED")[2]) is not ok
    assert options["timing"] is True and options["prompt"] == "w1"


def test_a_planted_mistake_fails_the_comparison(unrotated, tmp_path, capsys):
    arguments = ["compare", SOURCE, "--no-timing", "--dtype", "float64", "--report", str(tmp_path / "a.html")]
    assert run(arguments) == 1
    assert "FAILED tokens, float64, jax-torch. position" in capsys.readouterr().out
    verdict = Page(tmp_path / "a.html").verdict()
    assert "first at layers.0.attn.o_proj" in verdict and "gradients" in verdict and "tokens" in verdict
