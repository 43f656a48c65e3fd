"""The cache where it is tight: padding between tokens, a ring that overflows, a call that is too long."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from test_attention import (
    FRAMEWORKS,
    LAYERS,
    SHAPES,
    WIDTH,
    WINDOW,
    Module,
    by_hand,
    check,
    draw,
    put,
    slices,
)

SHAPE = SHAPES["cached"]


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_padding_between_tokens_takes_no_slot(framework, window, chunk, jax_device, torch_device):
    """As in a batch whose prompts are given in chunks: short ones end in padding, then go on."""
    positions = np.full((2, 40), -1, np.int32)
    positions[0] = np.arange(40)
    # Eleven slots for a window and chunks of 5: position 10 lies in the last one when padding comes.
    positions[1, :11], positions[1, 23:] = np.arange(11), 11 + np.arange(17)
    x = np.random.default_rng(7).standard_normal((2, 40, WIDTH))
    module = Module(framework, SHAPE, {"jax": jax_device, "torch": torch_device}[framework], window=window)
    length = 64 if window is None else window + chunk - 1
    found, _ = module.cached(x, positions, slices(40, chunk), length)
    expected, _ = by_hand(SHAPE, draw(SHAPE.table(True)), x, positions, True, window)
    check(found, expected, positions)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_call_longer_than_its_cache_leaves_the_last_positions(framework, jax_device, torch_device):
    """Eight slots, thirteen tokens: which of them are kept does not depend on the order of writing."""
    layers, device = LAYERS[framework], {"jax": jax_device, "torch": torch_device}[framework]
    positions = np.array([np.arange(13), np.r_[-np.ones(4), 230 + np.arange(9)]], np.int32)
    cache = Module(framework, SHAPE, device).module.empty_cache(2, 8)
    slots, cache = layers.place(put(positions, framework, device), cache)
    slots, noted = (np.array(x.tolist()) for x in (slots, cache.positions))
    for row, places in enumerate(positions):
        kept = {int(p) % 8: int(p) for p in places[-8:]}
        assert noted[row].tolist() == [kept[slot] for slot in range(8)] + [-1]
        assert slots[row].tolist() == [p % 8 if p in kept.values() else 8 for p in places.tolist()]
