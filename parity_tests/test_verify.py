"""`verify` passes on equal twins, and fails, at the right submodule, when a mistake is planted in one."""

from __future__ import annotations

import pytest

import jax_models.layers
import jax_models.llama
import torch_models.llama
from twinformers import verify
from twinformers.errors import UsageError


def failures(**options):
    report = verify("preset:llama-tiny", dtypes=["float64"], **options)
    assert report.ok == all(r.ok for r in report.checks)
    return [(r.check, r.path) for r in report.checks if not r.ok]


def test_twins_match_each_other_and_transformers():
    report = verify("preset:llama-tiny", dtypes=["float64", "float32"])
    assert report.ok
    exact = [r for r in report.checks if r.dtype == "float64" and r.check != "generation"]
    assert all(r.limit == 1e-12 and r.max_rel <= r.limit for r in exact)
    # every submodule is compared, containers included
    paths = {r.path for r in report.checks if r.check == "activations"}
    assert {"embed", "layers.0.attn.q_proj", "layers.2.mlp.down_proj", "norm", "lm_head"} <= paths
    assert {r.path for r in report.checks if r.check == "reference" and r.left == "jax"} - {""} == paths


def test_planted_epsilon_is_located(monkeypatch):
    original = jax_models.layers.RMSNorm.__init__
    monkeypatch.setattr(
        jax_models.layers.RMSNorm,
        "__init__",
        lambda self, size, eps, *, dtype: original(self, size, eps * 10, dtype=dtype),
    )
    assert failures(checks=["activations"])[0] == ("activations", "layers.0.attn_norm")


def test_planted_rotary_sign_is_located(monkeypatch):
    original = torch_models.llama.rotate
    monkeypatch.setattr(
        torch_models.llama, "rotate", lambda x, cos, sin: original(x, cos, -sin[..., :1] + sin)
    )
    found = failures(checks=["logits", "activations"])
    assert found[0] == ("logits", "") and found[1][1] == "layers.0.attn.o_proj"


def test_mistake_in_both_twins_is_caught_by_the_reference(monkeypatch):
    for module in (jax_models.llama, torch_models.llama):
        monkeypatch.setattr(module, "rotate", lambda x, cos, sin: x)
    assert {check for check, _ in failures(checks=["activations", "reference"])} == {"reference"}


def test_not_a_number_fails(monkeypatch):
    monkeypatch.setattr(jax_models.llama, "constrain", lambda x, name: x * float("nan"))
    assert ("logits", "") in failures(checks=["logits"])


@pytest.mark.parametrize("bad", [{"checks": ["taste"]}, {"dtypes": ["float8"]}])
def test_unknown_names_are_refused(bad):
    with pytest.raises(UsageError, match="expected"):
        verify("preset:llama-tiny", **bad)
