"""Beam search for every encoder-decoder twin: the whole search is one compiled loop."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_models.layers import CrossCache, KVCache, at_least_float32
from twinformers.configs._beams import Beams, check_sources
from twinformers.configs._sampling import bucket


class Hypothesis(NamedTuple):
    """A translation: its tokens, the end token included if it came, and its log-probability over penalty."""

    tokens: list[int]
    score: float


class State(NamedTuple):
    """A search after `step` tokens: n beginnings and n finished translations of each of B sources.

    Tokens not written yet are -1. Scores are log-probabilities, those of finished translations over their
    penalty, best first, and -inf where there is none. A source that is no longer open changes no more.
    """

    step: jax.Array  # []
    newest: jax.Array  # [B n, 1]
    tokens: jax.Array  # [B, n, M]
    scores: jax.Array  # [B, n]
    finished: jax.Array  # [B, n, M]
    finished_scores: jax.Array  # [B, n]
    open: jax.Array  # [B]
    cache: KVCache  # rows B n


def reorder(cache: KVCache, rows: jax.Array) -> KVCache:
    """The cache in which row b is what row `rows[b]` was: a beam goes on from where another one stood."""
    return KVCache(cache.k[:, rows], cache.v[:, rows], cache.positions[rows])


def log_probabilities(logits: jax.Array, ends: jax.Array, beams: Beams, eos: int) -> jax.Array:
    """Of each next token. `ends` says whether no token may follow. [B n, V] -> same"""
    result = jax.nn.log_softmax(logits.astype(at_least_float32(logits.dtype)), axis=-1)
    if beams.banned:
        result = result.at[:, np.array(beams.banned)].set(-jnp.inf)
    if beams.force_eos:
        forced = jnp.full_like(result, -jnp.inf).at[:, eos].set(0)
        result = jnp.where(ends, forced, result)
    return jax.nn.log_softmax(result, axis=-1) if beams.renormalize else result


def advance(model: Any, state: State, cross: CrossCache, beams: Beams) -> State:
    """One token more for every beginning; of the 2n best, n go on, and those among the n best may finish."""
    (B, n, M), t, eos = state.tokens.shape, state.step, model.config.eos_token_id
    positions = jnp.full_like(state.newest, t)
    x, cache = model.decode_hidden(state.newest, positions, cross, state.cache)  # [B n, 1, D]
    logits = model.head(x)[:, 0]  # [B n, V]
    V = logits.shape[-1]
    scores = log_probabilities(logits, t == M - 1, beams, eos).reshape(B, n, V)
    scores = (state.scores[:, :, None] + scores).reshape(B, n * V)
    # Each beginning has one way to end, so that at least n of the 2n best go on.
    best, index = jax.lax.top_k(scores, 2 * n)  # 2 x [B, 2n]
    origin, token = index // V, (index % V).astype(jnp.int32)
    tokens = jnp.take_along_axis(state.tokens, origin[:, :, None], axis=1)  # [B, 2n, M]
    tokens = tokens.at[:, :, t].set(token)
    ends = (token == eos) | (t == M - 1)  # [B, 2n]

    scores, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, best), n)  # 2 x [B, n]
    rows = jnp.arange(B)[:, None] * n + jnp.take_along_axis(origin, kept, axis=1)  # [B, n]

    divisors = jnp.asarray(beams.divisors, best.dtype)  # [M]
    done = ends & (jnp.arange(2 * n) < n) & state.open[:, None]  # [B, 2n]
    ranked = jnp.where(done, best / divisors[t], -jnp.inf)
    ranked = jnp.concatenate([state.finished_scores, ranked], axis=1)  # [B, 3n]
    finished_scores, chosen = jax.lax.top_k(ranked, n)  # 2 x [B, n]
    finished = jnp.concatenate([state.finished, tokens], axis=1)  # [B, 3n, M]
    finished = jnp.take_along_axis(finished, chosen[:, :, None], axis=1)  # [B, n, M]

    farthest = beams.early_stopping == "never" and beams.length_penalty > 0
    hope = scores[:, 0] / divisors[M - 1 if farthest else t]  # [B]
    more = state.open & (hope > finished_scores[:, -1])
    if beams.early_stopping is True or n == 1:
        more = more & (finished_scores[:, -1] == -jnp.inf)
    return State(
        step=t + 1,
        newest=jnp.take_along_axis(token, kept, axis=1).reshape(B * n, 1),
        tokens=jnp.take_along_axis(tokens, kept[:, :, None], axis=1),
        scores=scores,
        finished=finished,
        finished_scores=finished_scores,
        open=more,
        cache=reorder(cache, rows.reshape(B * n)),
    )


def search(
    model: Any, source: jax.Array, source_positions: jax.Array, beams: Beams
) -> tuple[jax.Array, jax.Array]:
    """The best translation of each source, -1 after its end, and its score. [B, S] -> [B, M], [B]"""
    B, n, M = source.shape[0], beams.num_beams, beams.max_new_tokens
    cross = model.cross_cache(model.encode(source, source_positions), source_positions)
    cross = CrossCache(
        jnp.repeat(cross.k, n, axis=1), jnp.repeat(cross.v, n, axis=1), jnp.repeat(cross.positions, n, axis=0)
    )
    wide = at_least_float32(cross.k.dtype)
    state = State(
        step=jnp.asarray(0),
        newest=jnp.full((B * n, 1), model.config.decoder_start_token_id, jnp.int32),
        tokens=jnp.full((B, n, M), -1, jnp.int32),
        # All beginnings are the same at first: one of them counts.
        scores=jnp.full((B, n), -jnp.inf, wide).at[:, 0].set(0),
        finished=jnp.full((B, n, M), -1, jnp.int32),
        finished_scores=jnp.full((B, n), -jnp.inf, wide),
        open=jnp.ones(B, bool),
        cache=model.empty_cache(B * n, M),
    )
    # vs torch: the loop is part of the program
    state = jax.lax.while_loop(
        lambda state: (state.step < M) & jnp.any(state.open),
        lambda state: advance(model, state, cross, beams),
        state,
    )
    return state.finished[:, 0], state.finished_scores[:, 0]


class Translator:
    """Holds one model and its compiled search: `Translator(model).translate(sources, beams)`."""

    def __init__(self, model: Any):
        self.config = model.config
        # vs torch: split once and pass pure leaves; see jax_models.functional
        graphdef, state = nnx.split(model)

        @partial(jax.jit, static_argnames="beams")
        def compiled(params, source, source_positions, beams):
            return search(nnx.merge(graphdef, params), source, source_positions, beams)

        self._search = partial(compiled, nnx.to_pure_dict(state))

    def translate(
        self,
        sources: Sequence[Sequence[int]],
        beams: Beams = Beams(),  # noqa: B008  (frozen)
    ) -> list[Hypothesis]:
        """The best translation of each source; they may differ in length.

        Raises UsageError for an empty source, a token outside the vocabulary, or more positions than the
        model was made for.
        """
        check_sources(sources, beams, self.config)
        width = bucket(max(map(len, sources)))
        tokens = np.full((len(sources), width), self.config.pad_token_id, np.int32)
        positions = np.full((len(sources), width), -1, np.int32)
        for row, source in enumerate(sources):
            tokens[row, : len(source)], positions[row, : len(source)] = source, np.arange(len(source))
        found, scores = self._search(tokens, positions, beams=beams)
        rows = zip(np.asarray(found).tolist(), np.asarray(scores).tolist(), strict=True)
        return [Hypothesis([token for token in row if token >= 0], score) for row, score in rows]
