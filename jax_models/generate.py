"""Generation for every causal twin: prefill in buckets, decoding in a compiled loop, a donated cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_models.layers import KVCache, at_least_float32
from jax_models.layouts import apart
from jax_models.random import fold_in, gumbel, key
from twinformers.configs import Sampling
from twinformers.configs._sampling import bucket, check_prompts

#: Steps of one compiled loop: text appears in pieces of so many tokens.
STEPS = 8


def note(seen: jax.Array, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """Mark each row's tokens as seen. [B, V], [B, T], [B, T] -> [B, V]"""
    # Padding is on the right: it counts as the row's first token, which is marked anyway.
    tokens = jnp.where(positions >= 0, tokens, tokens[:, :1])
    return seen.at[jnp.arange(len(tokens))[:, None], tokens].set(True)


def penalise(logits: jax.Array, seen: jax.Array, penalty: float) -> jax.Array:
    """Divide the logits of seen tokens by the penalty, or multiply those below 0. [B, V], [B, V] -> same

    Keskar et al. 2019 (arXiv:1909.05858), section 4.1; in at least float32, so that no tie arises.
    """
    logits = logits.astype(at_least_float32(logits.dtype))
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def argmax(x: jax.Array) -> jax.Array:
    """Where each row has its maximum, the first one. [B, V] -> [B]; of a row with a NaN, its last place."""
    # vs torch: a CPU finds the maximum eight times faster than its place; see which equals it, then
    place, last = jnp.arange(x.shape[-1], dtype=jnp.int32), x.shape[-1] - 1
    return jnp.min(jnp.where(x == x.max(axis=-1, keepdims=True), place, last), axis=-1)


def choose(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """The next token of each row. [B, V] -> [B]

    Greedy at temperature 0. Otherwise float32 logits over temperature; those below the k-th largest are
    dropped (ties with it stay), then those outside the smallest set whose probability reaches p; what is
    left plus Gumbel noise decides. Row b draws from `fold_in(key, b)`.
    """
    if sampling.temperature == 0:
        return argmax(logits)
    logits = logits.astype(jnp.float32) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]  # [B, 1]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        ranked = -jnp.sort(-logits, axis=-1)  # [B, V]
        weights = jax.nn.softmax(ranked, axis=-1)
        kept = jnp.cumsum(weights, axis=-1) - weights < sampling.top_p  # what precedes has not reached p
        least = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)  # [B, 1]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    # vs torch: vmap writes the loop over rows
    noise = jax.vmap(lambda row: gumbel(fold_in(key, row), logits.shape[1:]))(jnp.arange(logits.shape[0]))
    return argmax(logits + noise)


def grow(cache: KVCache, length: int) -> KVCache:
    """The cache with room for `length` positions per row, if none has come round to its first slot yet.

    A prompt fills a cache of its own size: attention over slots that are empty still would cost as much.
    """
    more = max(0, length + 1 - cache.positions.shape[1])
    k, v = (jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, more), (0, 0)]) for x in (cache.k, cache.v))
    return KVCache(k, v, jnp.pad(cache.positions, [(0, 0), (0, more)], constant_values=-1))


class Generator:
    """Holds one model and its compiled functions: `for tokens in Generator(model).stream(prompts, ...)`."""

    def __init__(self, model: Any):
        self.config = model.config
        self._empty_cache = model.empty_cache
        # vs torch: split once and pass pure leaves; see jax_models.functional
        graphdef, state = nnx.split(model)
        self._params = nnx.to_pure_dict(state)

        def step(params, tokens, positions, last, cache, seen, key, count, sampling):
            model = nnx.merge(graphdef, params)
            x, cache = model.hidden(tokens, positions, cache)  # [B, T, D]
            x = jnp.take_along_axis(x, last[:, None, None], axis=1)  # [B, 1, D]
            logits = model.head(x)[:, 0]  # [B, V]
            if seen is not None:
                seen = note(seen, tokens, positions)  # [B, V]
                logits = penalise(logits, seen, sampling.repetition_penalty)
            chosen = choose(logits, sampling, fold_in(key, count))  # [B]
            return chosen.astype(jnp.int32), cache, seen

        def loop(params, chosen, ends, running, stops, cache, seen, key, count, most, sampling):
            """Up to `most` steps from step `count` on, none once every row has met a stop token."""
            first = jnp.zeros_like(ends)

            def more(state):
                n, _, running, *_ = state
                return (n < most) & running.any()

            def once(state):
                n, chosen, running, cache, seen, out = state
                at = ends + count + n - 1  # [B], the position of the token chosen last
                chosen, cache, seen = step(
                    params, chosen[:, None], at[:, None], first, cache, seen, key, count + n, sampling
                )
                running &= ~jnp.isin(chosen, stops)
                return n + 1, chosen, running, cache, seen, out.at[:, n].set(chosen)

            out = jnp.zeros((len(ends), STEPS), jnp.int32)
            state = 0, chosen, running, cache, seen, out
            _, chosen, _, cache, seen, out = jax.lax.while_loop(more, once, state)
            return out, chosen, cache, seen

        self._step = jax.jit(step, static_argnames="sampling", donate_argnames=("cache", "seen"))
        self._loop = jax.jit(loop, static_argnames="sampling", donate_argnames=("cache", "seen"))
        self._grow = jax.jit(lambda cache, length: apart(grow(cache, length)), static_argnames="length")

    def warm_up(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008
    ) -> None:
        """Run two steps of what `stream` will run for these prompts: the first call of a shape compiles."""
        steps = self.stream(prompts, max_new_tokens=max_new_tokens, sampling=sampling)
        for _ in range(2):
            next(steps, None)

    def begin(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling
    ) -> tuple[jax.Array, KVCache, jax.Array | None, np.ndarray]:
        """Read the prompts: the first new token [B], the cache, the tokens seen [B, V], and lengths [B].

        The cache has room for the prompts alone; tokens seen are kept where a penalty needs them. Where the
        cache comes round, the prompts are read in parts, of which none overwrites what it sees.
        """
        check_prompts(prompts, max_new_tokens, self.config.vocab_size, self.config.max_position_embeddings)
        lengths = np.array([len(p) for p in prompts], np.int32)  # [B]
        width = bucket(lengths.max())
        tokens, positions = (
            # Padding is a token that the row has anyway, in whatever part of the prompts it stands.
            np.array([[prompt[0]] * width for prompt in prompts], np.int32),
            np.full((len(prompts), width), -1, np.int32),
        )
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)], positions[row, : len(prompt)] = prompt, np.arange(len(prompt))
        cache = self._empty_cache(len(prompts), width)
        seen = None  # which is no leaf of what the loop carries
        if sampling.repetition_penalty != 1:
            seen = jnp.zeros((len(prompts), self.config.vocab_size), bool)  # [B, V]
        seed = key(sampling.seed)
        most = self.config.longest_call(cache.positions.shape[1] - 1) or width
        chosen: Any = None
        for start in range(0, width, most):
            part = slice(start, start + most)
            last = np.clip(lengths - 1 - start, 0, len(tokens[0, part]) - 1)  # [B]
            new, cache, seen = self._step(
                self._params, tokens[:, part], positions[:, part], last, cache, seen, seed, 0, sampling
            )
            chosen = new if chosen is None else jnp.where(lengths > start, new, chosen)
        return chosen, cache, seen, lengths

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_tokens: Sequence[int] = (),
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    ) -> Iterator[list[int | None]]:
        """Yield one token per row and step, None for rows that have finished.

        A stop token is yielded, then its row is finished. Prompts may differ in length. Raises UsageError
        for an empty prompt, a token outside the vocabulary, or more positions than the model was made for.
        """
        chosen, cache, seen, lengths = self.begin(prompts, max_new_tokens, sampling)
        seed = key(sampling.seed)
        stops = np.full(bucket(len(stop_tokens)), -1, np.int32)  # few lengths, few compilations
        stops[: len(stop_tokens)] = stop_tokens
        running, out, count = np.ones(len(prompts), bool), np.asarray(chosen)[:, None], 1
        while True:
            for tokens in out.T:
                yield [int(token) if alive else None for token, alive in zip(tokens, running, strict=True)]
                running &= ~np.isin(tokens, stops)
                if not running.any():
                    return
            if (left := max_new_tokens - count) == 0:
                return
            if count == 1:
                slots = self.config.cache_slots(bucket(lengths.max() + max_new_tokens))
                cache = self._grow(cache, length=slots)
            most = min(left, STEPS)
            # vs torch: the device takes several steps before it answers
            out, chosen, cache, seen = self._loop(
                self._params, chosen, lengths, running, stops, cache, seen, seed, count, most, sampling
            )
            out, count = np.asarray(out)[:, :most], count + most
