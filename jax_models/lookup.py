"""Prompt look-up: guess that the text goes on as it did before, and check several guesses in one pass.

Speculative decoding (Leviathan et al. 2023, arXiv:2211.17192) with the text itself as the draft (Yang et al.
2023, arXiv:2304.04487). A pass over a few tokens reads the weights as often as one over one: once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_models.generate import STEPS, Generator, choose
from jax_models.random import fold_in, key
from twinformers.configs import Sampling
from twinformers.configs._sampling import NGRAMS, bucket, check_guesses, check_lookup


def guess(history: jax.Array, end: jax.Array, count: int) -> jax.Array:
    """What followed when the text last ended as it ends now, -1 for no guess. [S], [] -> [count]

    `history` holds `end` tokens, then -1. The longest of `NGRAMS` that is found decides.
    """
    place, found = jnp.arange(len(history)), jnp.int32(-1)
    for n in NGRAMS:
        tail = history[end - n + jnp.arange(n)]
        same = jnp.stack([jnp.roll(history, -i) == tail[i] for i in range(n)]).all(axis=0)  # [S]
        same &= (place + n < end) & (n < end)
        found = jnp.where(found < 0, jnp.max(jnp.where(same, place + n, -1)), found)
    guesses = history.at[found + jnp.arange(count)].get(mode="fill", fill_value=-1)
    return jnp.where(found < 0, -1, guesses)


class LookupGenerator(Generator):
    """Gives the same tokens as `Generator`, several at a time where the text repeats itself. One prompt only.

    `passes` counts those of the model since the prompt; with no guess right there is one for each token.
    """

    def __init__(self, model: Any, guesses: int = 4):
        check_guesses(guesses)
        super().__init__(model)
        self.guesses, self.passes = guesses, 0
        graphdef, _ = nnx.split(model)

        def ahead(params, guesses, history, end, cache, key, first, sampling):
            """The last token and the guesses; what is chosen while they are right, then -1. [G] -> [G+1]"""
            model = nnx.merge(graphdef, params)
            tokens = jnp.concatenate([history[end - 1][None], guesses])  # [G+1]
            places = end - 1 + jnp.arange(len(tokens), dtype=jnp.int32)
            positions = jnp.where(tokens < 0, -1, places)  # what is no guess is padding
            x, cache = model.hidden(jnp.maximum(tokens, 0)[None], positions[None], cache)
            logits = model.head(x)[0]  # [G+1, V]
            # Each place draws with the key that it would have without guesses.
            keys = jax.vmap(lambda place: fold_in(key, place + 1 - first))(places)
            chosen = jax.vmap(lambda row, key: choose(row[None], sampling, key)[0])(logits, keys)
            right = jnp.cumprod(guesses == chosen[:-1]).sum()  # up to the first wrong one
            return jnp.where(jnp.arange(len(chosen)) <= right, chosen, -1).astype(jnp.int32), cache

        def loop(params, history, start, stops, cache, key, first, limit, sampling):
            """Passes until there are `STEPS` tokens more, `limit` tokens in all, or a stop token."""

            def more(state):
                _, end, running, *_ = state
                return (end < limit) & (end - start < STEPS) & running

            def once(state):
                history, end, _, cache, passes = state
                room = end + 1 + jnp.arange(self.guesses) < limit
                guesses = jnp.where(room, guess(history, end, self.guesses), -1)

                def alone(cache):
                    token, cache = ahead(params, guesses[:0], history, end, cache, key, first, sampling)
                    return jnp.pad(token, (0, self.guesses), constant_values=-1), cache

                def together(cache):
                    return ahead(params, guesses, history, end, cache, key, first, sampling)

                new, cache = jax.lax.cond(guesses[0] < 0, alone, together, cache)
                history = jax.lax.dynamic_update_slice(history, new, (end,))
                stopped = (jnp.isin(new, stops) & (new >= 0)).any()
                return history, end + (new >= 0).sum(dtype=jnp.int32), ~stopped, cache, passes + 1

            state = history, start, jnp.bool(True), cache, jnp.int32(0)
            history, end, _, cache, passes = jax.lax.while_loop(more, once, state)
            return history, end, cache, passes

        self._ahead = jax.jit(loop, static_argnames="sampling", donate_argnames=("history", "cache"))

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_tokens: Sequence[int] = (),
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    ) -> Iterator[list[int | None]]:
        """As `Generator.stream`. Raises UsageError too for several prompts and a repetition penalty."""
        check_lookup(prompts, sampling)
        (prompt,) = prompts
        first, limit, self.passes = len(prompt), len(prompt) + max_new_tokens, 0
        chosen, cache, _, _ = self.begin(prompts, max_new_tokens, sampling)
        history = np.full(bucket(limit) + self.guesses + 1, -1, np.int32)
        history[:first], history[first] = prompt, chosen[0]
        stops = np.full(bucket(len(stop_tokens)), -1, np.int32)
        stops[: len(stop_tokens)] = stop_tokens
        seed, start, end = key(sampling.seed), first, first + 1
        while True:
            for token in np.asarray(history)[start:end]:
                yield [int(token)]
                if token in stop_tokens:
                    return
            if end >= limit:
                return
            if self.passes == 0:
                cache = self._grow(cache, length=self.config.cache_slots(bucket(limit)))
            start = end
            history, end, cache, passes = self._ahead(
                self._params, history, np.int32(start), stops, cache, seed, first, limit, sampling
            )
            end = int(end)
            self.passes += int(passes)
