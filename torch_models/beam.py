"""Beam search for every encoder-decoder twin: one step after another, the cache's rows gathered anew."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from torch_models.layers import CrossCache, KVCache, at_least_float32
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

    step: int
    newest: torch.Tensor  # [B n, 1]
    tokens: torch.Tensor  # [B, n, M]
    scores: torch.Tensor  # [B, n]
    finished: torch.Tensor  # [B, n, M]
    finished_scores: torch.Tensor  # [B, n]
    open: torch.Tensor  # [B]
    cache: KVCache  # rows B n


def reorder(cache: KVCache, rows: torch.Tensor) -> KVCache:
    """The cache in which row b is what row `rows[b]` was: a beam goes on from where another one stood."""
    return KVCache(cache.k[:, rows], cache.v[:, rows], cache.positions[rows])


def log_probabilities(logits: torch.Tensor, ends: bool, beams: Beams, eos: int) -> torch.Tensor:
    """Of each next token. `ends` says whether no token may follow. [B n, V] -> same"""
    result = torch.log_softmax(logits.to(at_least_float32(logits.dtype)), dim=-1)
    if beams.banned:
        result[:, list(beams.banned)] = -torch.inf
    if beams.force_eos and ends:
        result = torch.full_like(result, -torch.inf)
        result[:, eos] = 0
    return torch.log_softmax(result, dim=-1) if beams.renormalize else result


def advance(model: Any, state: State, cross: CrossCache, beams: Beams) -> State:
    """One token more for every beginning; of the 2n best, n go on, and those among the n best may finish."""
    (B, n, M), t, eos = state.tokens.shape, state.step, model.config.eos_token_id
    positions = torch.full_like(state.newest, t)
    x, cache = model.decode_hidden(state.newest, positions, cross, state.cache)  # [B n, 1, D]
    logits = model.head(x)[:, 0]  # [B n, V]
    V = logits.shape[-1]
    scores = log_probabilities(logits, t == M - 1, beams, eos).reshape(B, n, V)
    scores = (state.scores[:, :, None] + scores).reshape(B, n * V)
    # Each beginning has one way to end, so that at least n of the 2n best go on.
    best, index = torch.topk(scores, 2 * n)  # 2 x [B, 2n]
    origin, token = index // V, (index % V).to(torch.int32)
    tokens = torch.take_along_dim(state.tokens, origin[:, :, None], dim=1)  # [B, 2n, M]
    tokens[:, :, t] = token
    ends = (token == eos) | (t == M - 1)  # [B, 2n]

    scores, kept = torch.topk(torch.where(ends, -torch.inf, best), n)  # 2 x [B, n]
    rows = torch.arange(B, device=kept.device)[:, None] * n + torch.take_along_dim(origin, kept, dim=1)

    divisors = torch.tensor(beams.divisors, dtype=best.dtype, device=best.device)  # [M]
    done = ends & (torch.arange(2 * n, device=ends.device) < n) & state.open[:, None]  # [B, 2n]
    ranked = torch.where(done, best / divisors[t], -torch.inf)
    ranked = torch.cat([state.finished_scores, ranked], dim=1)  # [B, 3n]
    finished_scores, chosen = torch.topk(ranked, n)  # 2 x [B, n]
    finished = torch.cat([state.finished, tokens], dim=1)  # [B, 3n, M]
    finished = torch.take_along_dim(finished, chosen[:, :, None], dim=1)  # [B, n, M]

    farthest = beams.early_stopping == "never" and beams.length_penalty > 0
    hope = scores[:, 0] / divisors[M - 1 if farthest else t]  # [B]
    more = state.open & (hope > finished_scores[:, -1])
    if beams.early_stopping is True or n == 1:
        more = more & (finished_scores[:, -1] == -torch.inf)
    return State(
        step=t + 1,
        newest=torch.take_along_dim(token, kept, dim=1).reshape(B * n, 1),
        tokens=torch.take_along_dim(tokens, kept[:, :, None], dim=1),
        scores=scores,
        finished=finished,
        finished_scores=finished_scores,
        open=more,
        cache=reorder(cache, rows.reshape(B * n)),
    )


def search(
    model: Any, source: torch.Tensor, source_positions: torch.Tensor, beams: Beams
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best translation of each source, -1 after its end, and its score. [B, S] -> [B, M], [B]"""
    B, n, M = source.shape[0], beams.num_beams, beams.max_new_tokens
    device = next(model.parameters()).device
    source, source_positions = source.to(device), source_positions.to(device)
    cross = model.cross_cache(model.encode(source, source_positions), source_positions)
    cross = CrossCache(
        cross.k.repeat_interleave(n, 1),
        cross.v.repeat_interleave(n, 1),
        cross.positions.repeat_interleave(n, 0),
    )
    wide = at_least_float32(cross.k.dtype)
    state = State(
        step=0,
        newest=torch.full((B * n, 1), model.config.decoder_start_token_id, dtype=torch.int32, device=device),
        tokens=torch.full((B, n, M), -1, dtype=torch.int32, device=device),
        # All beginnings are the same at first: one of them counts.
        scores=torch.tensor([0.0] + [-torch.inf] * (n - 1), dtype=wide, device=device).repeat(B, 1),
        finished=torch.full((B, n, M), -1, dtype=torch.int32, device=device),
        finished_scores=torch.full((B, n), -torch.inf, dtype=wide, device=device),
        open=torch.ones(B, dtype=torch.bool, device=device),
        cache=model.empty_cache(B * n, M),
    )
    # vs jax: the loop looks at a value after each step
    while state.step < M and state.open.any():
        state = advance(model, state, cross, beams)
    return state.finished[:, 0], state.finished_scores[:, 0]


class Translator:
    """Holds one model: `Translator(model).translate(sources, beams)`."""

    def __init__(self, model: Any):
        self.config = model.config
        self._search = torch.inference_mode()(partial(search, model))

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
        found, scores = self._search(torch.from_numpy(tokens), torch.from_numpy(positions), beams=beams)
        rows = zip(found.tolist(), scores.tolist(), strict=True)
        return [Hypothesis([token for token in row if token >= 0], score) for row, score in rows]
