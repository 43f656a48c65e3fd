"""The repetition penalty: against transformers' generation, and the same tokens in both frameworks."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_models.generate
import torch_models.generate
import twinformers
from twinformers.checkpoints import open_checkpoint
from twinformers.errors import UsageError
from twinformers.parity.reference import precise, reference_model

SOURCE = "preset:llama-tiny"
PROMPTS = [[3, 5, 7], [11, 13, 17, 19, 23, 29, 31], [2] * 17 + [40]]
NEW = 40
PENALTY = 1.3


def engine(framework, dtype="float64"):
    module = {"jax": jax_models.generate, "torch": torch_models.generate}[framework]
    return module.Generator(twinformers.load(SOURCE, framework, dtype))


def tokens(framework, prompts=PROMPTS, dtype="float64", new=NEW, **sampling):
    """The new tokens of each row."""
    with jax.enable_x64(dtype == "float64"):
        sampling = twinformers.Sampling(**{"repetition_penalty": PENALTY, **sampling})
        steps = engine(framework, dtype).stream(prompts, max_new_tokens=new, sampling=sampling)
        return [list(row) for row in zip(*steps, strict=True)]


@pytest.fixture(scope="module")
def reference():
    """What transformers continues each prompt with, each alone; without a penalty, and with it."""
    with open_checkpoint(SOURCE) as checkpoint, precise("float64"):
        model = reference_model(checkpoint, "float64")
        model.generation_config.eos_token_id = None  # token 2 is a token like all others
        found = {}
        for penalty in (1.0, PENALTY, 0.8):
            found[penalty] = []
            for prompt in PROMPTS:
                ids = torch.tensor([prompt])
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=NEW,
                    do_sample=False,
                    repetition_penalty=penalty,
                    pad_token_id=0,
                )
                found[penalty].append(out[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("penalty", [1.0, PENALTY, 0.8])
def test_greedy_matches_transformers(framework, penalty, reference):
    assert tokens(framework, repetition_penalty=penalty) == reference[penalty]
    assert reference[penalty] != reference[1.0] or penalty == 1.0


def test_sampling_is_the_same_in_both_frameworks_and_for_each_row_alone():
    for seed in range(3):
        options = {"dtype": "float32", "temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": seed}
        both = tokens("jax", **options)
        assert both == tokens("torch", **options) != tokens("jax", repetition_penalty=1.0, **options)
        # The first row draws as it does alone: what others have seen, or their padding, is not its own.
        assert tokens("jax", PROMPTS[:1], **options) == both[:1] == tokens("torch", PROMPTS[:1], **options)


def check_by_eye(module):
    """Two rows, five tokens, all of it small enough to follow."""
    put = jnp.asarray if module is jax_models.generate else torch.tensor
    prompts, positions = [[4, 2, 2, 0], [1, 3, 0, 0]], [[0, 1, 2, 3], [0, 1, -1, -1]]
    seen = module.note(put(np.zeros((2, 5), bool)), put(np.int32(prompts)), put(np.int32(positions)))
    # Token 0 was seen in the first row; in the second it is padding.
    assert np.asarray(seen).astype(int).tolist() == [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0]]
    logits = np.float32([[3, 3, -3, -3, 0], [3, 3, -3, -3, 0]])
    found = module.penalise(put(logits), seen, 1.5)
    assert np.asarray(found).tolist() == [[2, 3, -4.5, -3, 0], [3, 2, -3, -4.5, 0]]
    half = torch.bfloat16 if module is torch_models.generate else jnp.bfloat16
    assert "float32" in str(module.penalise(put(logits, dtype=half), seen, 1.5).dtype)


@pytest.mark.parametrize("module", [jax_models.generate, torch_models.generate])
def test_seen_tokens_are_divided_above_zero_and_multiplied_below(module):
    check_by_eye(module)


def test_without_a_penalty_nothing_is_carried(monkeypatch):
    def never(*args):
        raise AssertionError("a mask was kept")

    for module in (jax_models.generate, torch_models.generate):
        monkeypatch.setattr(module, "note", never)
    for framework in ("jax", "torch"):
        assert len(tokens(framework, dtype="float32", new=10, repetition_penalty=1.0)[0]) == 10
        with pytest.raises(AssertionError, match="a mask was kept"):
            tokens(framework, dtype="float32", new=10)


@pytest.mark.parametrize("penalty", [0.0, -1.0, float("inf"), float("nan")])
def test_a_bad_penalty_is_refused(penalty):
    with pytest.raises(UsageError, match=r"^repetition_penalty: bad value"):
        twinformers.Sampling(repetition_penalty=penalty)


#: A mistake: where, what stands there, what is put in its place.
MISTAKES = {
    "padding is seen": ("jax", "note", "jnp.where(positions >= 0, tokens, tokens[:, :1])", "tokens"),
    "the sign is ignored": (
        "torch",
        "penalise",
        "torch.where(logits < 0, logits * penalty, logits / penalty)",
        "logits / penalty",
    ),
    "the prompt is not seen": ("torch", "note", "tokens.long(), True", "tokens[:, -1:].long(), True"),
    "only the newest token is seen": ("jax", "note", "seen.at", "jnp.zeros_like(seen).at"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistake_is_caught(name, monkeypatch, reference):
    framework, function, old, new = MISTAKES[name]
    module = {"jax": jax_models.generate, "torch": torch_models.generate}[framework]
    text = inspect.getsource(getattr(module, function))
    assert old in text
    wrong = dict(vars(module))
    exec(text.replace(old, new), wrong)
    monkeypatch.setattr(module, function, wrong[function])
    with pytest.raises(AssertionError):
        check_by_eye(module)
        assert tokens(framework) == reference[PENALTY]
