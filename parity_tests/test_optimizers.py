"""The recipe of `AdamW`: what optax and torch.optim do with it against the paper's formulas in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from twinformers import verify
from twinformers.training.adamw import AdamW, optax_adamw, torch_adamw

# Nothing as the libraries have it by default, and gradients that are clipped in some updates only.
RECIPE = AdamW(
    peak=3e-2, floor=2e-3, warmup=3, steps=8, b1=0.8, b2=0.93, eps=1e-3, weight_decay=0.3, clip=2.5
)
SHAPES = {"matrix": (3, 5), "table": (7, 2), "scale": (5,)}
#: Update 3 ends the warm-up; a cosine of 0, pi/5, ... pi leads from there to the floor.
RATES = [1e-2, 2e-2, 3e-2] + [2e-3 + 2.8e-2 * (1 + np.cos(np.pi * n / 5)) / 2 for n in (1, 2, 3, 4, 5)]


def draw(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def gradients(update):
    """Of norm about 6 in odd updates and below 1 in even ones."""
    return {name: g * (1.0 if update % 2 else 0.1) for name, g in draw(update).items()}


def by_hand():
    """Parameters after each update: Loshchilov & Hutter 2019, algorithm 2, clipped by the global norm."""
    x, first, second = draw(0), dict.fromkeys(SHAPES, 0.0), dict.fromkeys(SHAPES, 0.0)
    for n, rate in enumerate(RATES, 1):
        norm = np.sqrt(sum((g**2).sum() for g in gradients(n).values()))
        assert (norm > RECIPE.clip) == (n % 2 == 1)
        for name, g in gradients(n).items():
            g = g * min(1.0, 2.5 / norm)
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.93 * second[name] + 0.07 * g**2
            step = first[name] / (1 - 0.8**n) / (np.sqrt(second[name] / (1 - 0.93**n)) + 1e-3)
            x[name] = x[name] - rate * (step + (0.3 * x[name] if name != "scale" else 0))
        yield dict(x)


def by_optax():
    optimizer, clip = optax_adamw(RECIPE)
    with jax.enable_x64(True):
        x = {name: jnp.asarray(a) for name, a in draw(0).items()}
        state = optimizer.init(x)
        for n in range(1, len(RATES) + 1):
            state.hyperparams["learning_rate"] = jnp.asarray(RECIPE.rate(n))
            changes, state = optimizer.update(
                clip({k: jnp.asarray(g) for k, g in gradients(n).items()}), state, x
            )
            x = {name: x[name] + changes[name] for name in x}
            yield {name: np.asarray(a) for name, a in x.items()}


def by_torch():
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.tensor(a)) for name, a in draw(0).items()})
    optimizer, clip = torch_adamw(RECIPE, model)
    for n in range(1, len(RATES) + 1):
        for name, g in gradients(n).items():
            model[name].grad = torch.tensor(g)
        clip()
        for group in optimizer.param_groups:
            group["lr"] = RECIPE.rate(n)
        optimizer.step()
        yield {name: p.detach().numpy().copy() for name, p in model.items()}


@pytest.mark.parametrize("updates", [by_optax, by_torch])
def test_updates_match_the_papers_formulas(updates):
    for n, (found, expected) in enumerate(zip(updates(), by_hand(), strict=True), 1):
        for name, x in expected.items():
            assert np.abs(found[name] - x).max() <= 1e-12 * np.abs(x).max(), (n, name)


def test_rates_match_values_computed_by_hand():
    assert np.allclose([RECIPE.rate(n) for n in range(1, 9)], RATES, rtol=1e-14)
    assert AdamW(peak=1e-3, floor=1e-4, warmup=4, steps=20).rate(12) == pytest.approx(5.5e-4, rel=1e-14)


def test_twins_train_alike_from_the_same_state():
    report = verify("preset:llama-tiny", dtypes=["float64"], checks=["training"], steps=3)
    assert [r.path.partition(":")[0] for r in report.checks] == [f"update {n}" for n in (1, 2, 3)]
    assert report.ok and all(r.limit == 1e-10 for r in report.checks)
