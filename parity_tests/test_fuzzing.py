"""A bounded run of the differential fuzzing (`scripts/fuzz` is the long one), and whether it would notice."""

from __future__ import annotations

import json
import shlex

import fuzzing
import pytest
from hypothesis import HealthCheck, given, settings
from mutations.planting import Edit, planted

pytestmark = pytest.mark.slow
BOUNDED = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@BOUNDED
@given(fuzzing.llama())
def test_random_llamas_match_each_other_and_transformers(case):
    assert len(fuzzing.check(case)) == 3


@settings(BOUNDED, max_examples=10)  # what it has besides LLaMA is its window
@given(fuzzing.mistral())
def test_random_mistrals_match_each_other_and_transformers(case):
    assert len(fuzzing.check(case)) == 3


@BOUNDED
@given(fuzzing.gpt2())
def test_random_gpt2s_match_each_other_and_transformers(case):
    assert len(fuzzing.check(case)) == 3


@BOUNDED
@given(fuzzing.bert())
def test_random_berts_match_each_other_and_transformers(case):
    assert len(fuzzing.check(case)) == 3


@BOUNDED
@given(fuzzing.transformer())
def test_random_transformers_match_each_other_and_transformers(case):
    assert len(fuzzing.check(case)) == (1 if case["config"]["model_type"] == "transformer" else 3)


@BOUNDED
@given(fuzzing.attention())
def test_random_attention_matches_each_other_and_plain_numpy(case):
    assert len(fuzzing.check(case)) == 3


MISTAKES = {
    # In one twin; and in both, which transformers alone can tell.
    "llama": [Edit("jax_models.layers:rotate", "second * cos + first * sin", "second * cos - first * sin")],
    "transformer": [
        Edit("jax_models.layers:LayerNorm.__call__", "+ self.eps", "+ 2 * self.eps"),
        Edit("torch_models.layers:LayerNorm.forward", "+ self.eps", "+ 2 * self.eps"),
    ],
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_disagreement_names_the_command_that_repeats_it(kind, capsys):
    with planted(MISTAKES[kind]):
        assert fuzzing.main(["--examples", "40", "--seed", "3", "--kind", kind]) == 1
        said = capsys.readouterr().out
        program, *arguments = shlex.split(said.rpartition("repeat with: ")[2])
        assert program == "scripts/fuzz" and arguments[0] == "--repeat"
        assert json.loads(arguments[1])["kind"] == kind
        assert fuzzing.main(arguments) == 1
        assert capsys.readouterr().out == said
    assert fuzzing.main(arguments) == 0
    assert "jax and torch: " in capsys.readouterr().out
