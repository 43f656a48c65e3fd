"""Gradients and training as checks: parameter by parameter, step by step, and able to fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import torch_models.llama
from twinformers import verify
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.configs import preset
from twinformers.parity.limits import limit
from twinformers.training import adamw
from twinformers.weight_maps import weight_map

TINY = preset("llama-tiny")
SOURCES = {
    "llama": TINY,
    "llama-tied": TINY.replace(tie_word_embeddings=True, num_key_value_heads=1),
    "transformer": preset("transformer-tiny"),
}


def run(name, checks, **options):
    report = verify(PresetCheckpoint(name, SOURCES[name]), dtypes=["float64"], checks=checks, **options)
    assert report.ok == all(r.ok for r in report.checks)
    return report


@pytest.mark.parametrize("name", ["llama", pytest.param("llama-tied", marks=pytest.mark.slow)])
def test_gradients_match_twin_and_transformers(name):
    report = run(name, ["gradients", "reference"])
    assert report.ok
    for right in ("torch", "transformers"):
        found = {r.path for r in report.checks if r.check == "gradients" and r.right == right}
        # every parameter, and the output of every submodule, the embeddings among them
        assert set(weight_map(SOURCES[name]).leaves("torch")) <= found
        assert {"embed", "layers.0.attn", "layers.2.mlp.up_proj", "norm"} <= found
    assert all(r.limit == 1e-10 for r in report.checks if r.check == "gradients")


def test_gradients_match_in_the_transformer():
    report = run("transformer", ["gradients"])
    assert report.ok and {r.path for r in report.checks} >= set(
        weight_map(SOURCES["transformer"]).leaves("torch")
    )


def test_parameter_without_gradient_fails(monkeypatch):
    def detached(self, x):
        up = self.up_proj(x).detach()
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * up)

    monkeypatch.setattr(torch_models.llama.MLP, "forward", detached)
    failed = {r.path for r in run("llama", ["gradients"]).checks if not r.ok}
    assert "layers.2.mlp.up_proj.weight" in failed


@pytest.mark.parametrize("name", SOURCES)
def test_every_update_and_a_free_run_match(name):
    report = run(name, ["training", "training-run"], steps=6)
    assert report.ok
    for check in ("training", "training-run"):
        results = [r for r in report.checks if r.check == check]
        assert [r.path.split(":")[0] for r in results] == [f"update {n}" for n in range(1, 7)]
        assert all(r.limit == limit(check, "float64") and "AdamW(peak=" in r.note for r in results)


def test_dropout_is_on_in_training():
    from twinformers.parity.kinds import kind
    from twinformers.parity.training import FlaxRun
    from twinformers.parity.twins import jax_precision

    losses = []
    for rate in (0.1, 0.3):
        config = SOURCES["transformer"].replace(dropout=rate)
        batch = kind(config).batch(config, 1)
        with jax_precision("float64"):
            flax = FlaxRun(PresetCheckpoint("test", config), "float64", None, adamw.AdamW())
            losses.append(flax.update(batch, *kind(config).targets(batch), 1, 1e-3))
    assert losses[0] != losses[1]


MISTAKES = {
    "epsilon": ("eps", 1e-6),
    "second moment's decay": ("b2", 0.999),
    "weight decay": ("weight_decay", 0.01),
    "clipping": ("clip", 0.9),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_another_setting_in_one_optimizer_fails(mistake, monkeypatch):
    import dataclasses

    field, value = MISTAKES[mistake]
    original = adamw.torch_adamw
    monkeypatch.setattr(
        "twinformers.parity.training.torch_adamw",
        lambda recipe, model: original(dataclasses.replace(recipe, **{field: value}), model),
    )
    assert not run("llama", ["training"], steps=3).ok


def test_decay_of_norms_fails(monkeypatch):
    original = adamw.torch_adamw

    def everything(recipe, model):
        with monkeypatch.context() as planted:
            planted.setattr(adamw, "decays", lambda shape: True)
            return original(recipe, model)

    monkeypatch.setattr("twinformers.parity.training.torch_adamw", everything)
    failed = [r for r in run("llama", ["training"], steps=2).checks if not r.ok]
    assert failed and all("norm" in r.path for r in failed)


def test_rate_is_linear_then_a_cosine():
    recipe = adamw.AdamW(peak=1.0, floor=0.1, warmup=4, steps=12)
    rates = [recipe.rate(n) for n in range(1, 13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    expected = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(1, 9) / 8)) / 2
    np.testing.assert_allclose(rates[4:], expected, rtol=1e-15)
