"""Every planted mistake makes a test of the ordinary suite fail, and `diverge` finds those in a model.

Importing costs more than most of the tests, so one process runs them one after the other (`python -m
mutations`), and the tests below read what it said.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys

import pytest
from mutations.models import LOGITS
from mutations.mutation import Found, Mutation
from mutations.planting import Edit, planted
from mutations.running import MUTATIONS, NOTICED, TESTS, Outcome, run


@pytest.fixture(scope="module")
def outcomes():
    """The outcomes by the mistake's name or, of a test without a mistake, by the test's."""
    # The process is none of pytest-xdist's.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(
        [sys.executable, "-m", "mutations", *MUTATIONS], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = (Outcome(**json.loads(line)) for line in done.stdout.splitlines())
    return {o.mutation or o.test: o for o in lines}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_mistake_is_caught(name, outcomes):
    mutation = MUTATIONS[name]
    assert outcomes[mutation.caught_by].error is None, "the test fails without the mistake"
    assert outcomes[name].error in NOTICED, f"{mutation.caught_by}: {outcomes[name].message}"


@pytest.mark.slow
def test_mistakes_in_models_are_located(outcomes):
    mutations = [m for m in MUTATIONS.values() if m.located]
    wrong = {
        m.name: (outcomes[m.name].path, m.located.path)
        for m in mutations
        if outcomes[m.name].path != m.located.path
    }
    assert 20 * len(wrong) <= len(mutations), wrong


@pytest.mark.slow
def test_a_change_that_is_no_mistake_is_not_caught(monkeypatch):
    """Without this, a runner that takes every mistake for caught would pass all of the above."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    edit = Edit("jax_models.layers:rotate", "second * cos + first * sin", "first * sin + second * cos")
    found = []
    run(
        [Mutation("harmless", "the terms of a sum exchanged", (edit,), LOGITS, Found("llama", ""))],
        found.append,
    )
    assert [(o.mutation, o.error, o.path) for o in found] == [(None, None, None), ("harmless", None, None)]


def test_planting_reaches_every_importer_and_leaves_no_trace():
    import numpy as np

    import jax_models.attention
    import jax_models.layers
    import twinformers.weight_maps.llama as table
    from twinformers.configs.llama import LlamaConfig

    x = np.ones((1, 1), np.int32)
    assert jax_models.attention.visible is jax_models.layers.visible
    rows, defaults = table.ROWS, dict(LlamaConfig.HF_DEFAULTS)
    with planted(
        [
            Edit("jax_models.layers:visible", "distance >= 0", "distance > 0"),
            Edit("twinformers.weight_maps.llama", '"model.norm.weight"', '"model.norm.wait"'),
            Edit("twinformers.configs.llama:LlamaConfig", '"vocab_size": 32000', '"vocab_size": 5'),
        ]
    ):
        assert not jax_models.attention.visible(x, x).any()
        assert rows != table.ROWS and LlamaConfig.HF_DEFAULTS["vocab_size"] == 5
    assert jax_models.attention.visible(x, x).all()
    assert table.ROWS is rows and defaults == LlamaConfig.HF_DEFAULTS


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (Edit("jax_models.layers:rotate", "no such text", ""), "occurs 0 times"),
        (Edit("jax_models.layers:visible", "key_positions", "x"), "times, not once"),
        (
            Edit("jax_models.layers:visible", "# [B, T, S]\n    seen", "# [B, S, T]\n    seen"),
            "changes nothing",
        ),
    ],
)
def test_a_mistake_that_is_none_is_refused(edit, said):
    with pytest.raises(ValueError, match=said), planted([edit]):
        pass


def test_report_says_what_was_not_caught_and_not_located():
    from mutations.report import page

    right = {
        n: Outcome(n, m.caught_by, "AssertionError", "", m.located and m.located.path, 0)
        for n, m in MUTATIONS.items()
    }
    count, models = len(MUTATIONS), sum(m.located is not None for m in MUTATIONS.values())
    assert f"**{count} of {count} caught; {models} of the {models} to be located" in page(right)
    assert "**not** by" not in page(right) and "** instead of" not in page(right)
    name = "rotary-pairs-swapped"
    text = page({**right, name: Outcome(name, LOGITS, None, "", "embed", 0)})
    assert f"**{count - 1} of {count} caught; {models - 1} of the {models} to be located" in text
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {name}:"))
    assert f"**not** by `{LOGITS}`" in row and "**`embed`** instead of `layers.0.attn`" in row


@pytest.mark.parametrize("name", MUTATIONS)
def test_its_place_is_still_there(name):
    """In seconds what the long run says after minutes: a source has changed and the mistake has not."""
    texts = {}
    for edit in MUTATIONS[name].edits:  # one after the other, as they are planted
        before = texts.get(edit.module) or inspect.getsource(importlib.import_module(edit.module))
        texts[edit.module] = edit.applied(before)
        assert texts[edit.module] != before


def test_names_are_unique_and_there_are_enough():
    from mutations.around import AROUND
    from mutations.models import MODELS
    from mutations.others import OTHERS

    assert len(MUTATIONS) == len(MODELS + OTHERS + AROUND) >= 25
    assert sum(m.located is not None for m in MUTATIONS.values()) >= 25
