"""Prompt look-up: what is guessed, by hand; the same tokens as without, in fewer passes; and refusals."""

from __future__ import annotations

from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_models.generate
import jax_models.lookup
import torch_models.generate
import torch_models.lookup
import twinformers
from twinformers.cli.app import run
from twinformers.errors import UsageError

SOURCE = "preset:llama-tiny"
MODULES = {
    "jax": (jax_models.generate, jax_models.lookup),
    "torch": (torch_models.generate, torch_models.lookup),
}
AGAIN = [5, 6, 7, 8, 9, 10, 11, 5, 6, 7]
PROMPTS = ([3], AGAIN, [2] * 14 + [40])
NEW = 48


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ([1, 2, 3, 4, 9, 1, 2, 3], 2, [4, 9]),  # the last three, seen before
        ([1, 2, 3, 4, 7, 2, 3, 5, 9, 1, 2, 3], 2, [4, 7]),  # three tokens say more than two that came later
        ([8, 2, 3, 5, 9, 2, 3, 6, 7, 0, 2, 3], 2, [6, 7]),  # of two places the later one
        ([1, 2, 3, 4, 1, 2, 3], 9, [4, 1, 2, 3]),  # no more than there is
        ([4, 4, 4, 4], 3, [4]),
        ([1, 2, 3, 3], 3, []),  # one token alone is no reason
        ([1, 2], 3, []),
        ([1], 3, []),
    ],
)
def test_guesses_by_hand(text, count, expected):
    assert torch_models.lookup.guess(text, count) == expected
    history = jnp.asarray(text + [-1] * 9, jnp.int32)
    found = jax_models.lookup.guess(history, jnp.int32(len(text)), count)
    assert found.tolist() == expected + [-1] * (count - len(expected))


def test_both_frameworks_guess_the_same():
    rng, found = np.random.default_rng(0), 0
    guess = jax.jit(jax_models.lookup.guess, static_argnums=2)
    for _ in range(300):
        text = rng.integers(0, 4, rng.integers(1, 24)).tolist()
        history = jnp.asarray(text + [-1] * (30 - len(text)), jnp.int32)
        expected = torch_models.lookup.guess(text, 4)
        assert guess(history, jnp.int32(len(text)), 4).tolist() == expected + [-1] * (4 - len(expected)), text
        found += bool(expected)
    assert 50 < found < 290


@pytest.fixture(scope="module")
def engines():
    """For each framework one that goes token by token, and one that guesses; the model likes to go round.

    Its head knows each token's embedding as that of the next in a circle of nine.
    """
    with jax.enable_x64(True):
        flax, torch_ = (twinformers.load(SOURCE, name, "float64") for name in MODULES)
        table = np.array(flax.embed.embedding[...])  # [V, D]
        table *= 4 / table.std()  # heard above the layers
        last = np.array([t - 1 if t % 9 else min(t + 8, len(table) - 1) for t in range(len(table))])
        head = 4 * table[last] / np.linalg.norm(table[last], axis=1, keepdims=True)  # [V, D]
        flax.embed.embedding[...], torch_.embed.weight.data = jnp.asarray(table), torch.from_numpy(table)
        flax.lm_head.kernel[...] = jnp.asarray(head.T)
        torch_.lm_head.weight.data = torch.from_numpy(head)
        found = {}
        for name, model in (("jax", flax), ("torch", torch_)):
            plain, lookup = MODULES[name]
            found[name] = plain.Generator(model), lookup.LookupGenerator(model, 4)
        yield found


@pytest.mark.parametrize("framework", MODULES)
@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "top_k": 100, "top_p": 0.98, "seed": 3}])
def test_the_same_tokens_in_fewer_passes(framework, options, engines):
    sampling = twinformers.Sampling(**options)
    plain, guessing = engines[framework]
    passes = []
    for prompt in PROMPTS:
        expected = list(plain.stream([prompt], max_new_tokens=NEW, sampling=sampling))
        assert list(guessing.stream([prompt], max_new_tokens=NEW, sampling=sampling)) == expected
        assert len({token for (token,) in expected}) > 3 and len(expected) == NEW
        passes.append(guessing.passes)
    # Guesses are right often and not always: both ways were taken.
    assert min(passes) > 10 and sum(passes) < 0.8 * len(PROMPTS) * (NEW - 1), passes


@pytest.mark.parametrize("framework", MODULES)
def test_it_ends_where_it_must(framework, engines):
    plain, guessing = engines[framework]
    whole = [token for (token,) in plain.stream([AGAIN], max_new_tokens=NEW)]
    most = plain.config.max_position_embeddings
    for new in (1, 2, *range(15, 22)):  # where all guesses are right
        steps = islice(guessing.stream([AGAIN], max_new_tokens=new), new + 9)
        assert [t for (t,) in steps] == whole[:new]
    for stop in dict.fromkeys(whole):
        found = [t for (t,) in guessing.stream([AGAIN], max_new_tokens=NEW, stop_tokens=[255, stop])]
        assert found == whole[: whole.index(stop) + 1]
    # A guess beyond the last position would come round to the first slot of the cache.
    long = (AGAIN * most)[: most - 4]
    assert list(guessing.stream([long], max_new_tokens=4)) == list(plain.stream([long], max_new_tokens=4))


@pytest.mark.parametrize("framework", MODULES)
def test_what_it_is_not_made_for_is_refused(framework, engines):
    _, lookup = MODULES[framework]
    guessing = engines[framework][1]
    with pytest.raises(UsageError, match="one prompt"):
        next(guessing.stream([[1], [2]], max_new_tokens=4))
    with pytest.raises(UsageError, match="repetition_penalty"):
        sampling = twinformers.Sampling(repetition_penalty=1.2)
        next(guessing.stream([[1]], max_new_tokens=4, sampling=sampling))
    with pytest.raises(UsageError, match="one guess"):
        lookup.LookupGenerator(twinformers.load(SOURCE, framework), -1)


def test_command(capsys, monkeypatch):
    asked = []

    def noted(*_, **options):
        asked.append(options)
        return []

    monkeypatch.setattr("twinformers.cli.generate.generate", noted)
    assert run(["generate", SOURCE, "--prompt", "x", "--lookup", "3"]) == 0 and asked[0]["lookup"] == 3
    assert run(["generate", SOURCE, "--prompt", "x"]) == 0 and asked[1]["lookup"] == 0
    monkeypatch.undo()
    assert run(["generate", SOURCE, "--prompt", "x", "--lookup", "-1"]) == 2
    assert "lookup: bad value" in capsys.readouterr().err
