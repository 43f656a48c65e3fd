"""Generation for every causal twin: prefill in buckets, one decoding step, a cache written in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from torch_models.layers import KVCache, at_least_float32
from torch_models.random import fold_in, gumbel, key
from twinformers.configs import Sampling
from twinformers.configs._sampling import bucket, check_prompts


def note(seen: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Mark each row's tokens as seen. [B, V], [B, T], [B, T] -> [B, V]"""
    # Padding is on the right: it counts as the row's first token, which is marked anyway.
    tokens = torch.where(positions >= 0, tokens, tokens[:, :1])
    return seen.scatter_(1, tokens.long(), True)


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divide the logits of seen tokens by the penalty, or multiply those below 0. [B, V], [B, V] -> same

    Keskar et al. 2019 (arXiv:1909.05858), section 4.1; in at least float32, so that no tie arises.
    """
    logits = logits.to(at_least_float32(logits.dtype))
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def choose(logits: torch.Tensor, sampling: Sampling, key: torch.Tensor) -> torch.Tensor:
    """The next token of each row. [B, V] -> [B]

    Greedy at temperature 0. Otherwise float32 logits over temperature; those below the k-th largest are
    dropped (ties with it stay), then those outside the smallest set whose probability reaches p; what is
    left plus Gumbel noise decides. Row b draws from `fold_in(key, b)`.
    """
    if sampling.temperature == 0:
        return torch.argmax(logits, dim=-1)
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = torch.topk(logits, sampling.top_k).values[:, -1:]  # [B, 1]
        logits = torch.where(logits < least, -torch.inf, logits)
    if sampling.top_p < 1:
        ranked = torch.sort(logits, dim=-1, descending=True).values  # [B, V]
        weights = torch.softmax(ranked, dim=-1)
        kept = torch.cumsum(weights, dim=-1) - weights < sampling.top_p  # what precedes has not reached p
        least = torch.where(kept, ranked, torch.inf).amin(dim=-1, keepdim=True)  # [B, 1]
        logits = torch.where(logits < least, -torch.inf, logits)
    # vs jax: the loop over rows is written out
    noise = torch.stack([gumbel(fold_in(key, row), logits.shape[1:]) for row in range(logits.shape[0])])
    return torch.argmax(logits + noise, dim=-1)


def grow(cache: KVCache, length: int) -> KVCache:
    """The cache with room for `length` positions per row, if none has come round to its first slot yet.

    A prompt fills a cache of its own size: attention over slots that are empty still would cost as much.
    """
    more = max(0, length + 1 - cache.positions.shape[1])
    k, v = (nn.functional.pad(x, (0, 0, 0, more)) for x in (cache.k, cache.v))
    return KVCache(k, v, nn.functional.pad(cache.positions, (0, more), value=-1))


class Generator:
    """Holds one model: `for tokens in Generator(model).stream(prompts, ...)`."""

    def __init__(self, model: Any):
        self.config = model.config
        self._empty_cache = model.empty_cache
        self._model = model

    @torch.inference_mode()
    def _step(self, tokens, positions, last, cache, seen, key, count, sampling):
        x, cache = self._model.hidden(tokens, positions, cache)  # [B, T, D]
        x = torch.take_along_dim(x, last[:, None, None], dim=1)  # [B, 1, D]
        logits = self._model.head(x)[:, 0]  # [B, V]
        if seen is not None:
            seen = note(seen, tokens, positions)  # [B, V]
            logits = penalise(logits, seen, sampling.repetition_penalty)
        chosen = choose(logits, sampling, fold_in(key, count))  # [B]
        return chosen.to(torch.int32), cache, seen

    def warm_up(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008
    ) -> None:
        """Run two steps of what `stream` will run for these prompts: the first call of a shape sets up."""
        steps = self.stream(prompts, max_new_tokens=max_new_tokens, sampling=sampling)
        for _ in range(2):
            next(steps, None)

    def begin(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling
    ) -> tuple[torch.Tensor, KVCache, torch.Tensor | None, np.ndarray]:
        """Read the prompts: the first new token [B], the cache, the tokens seen [B, V], and lengths [B].

        The cache has room for the prompts alone; tokens seen are kept where a penalty needs them. Where the
        cache comes round, the prompts are read in parts, of which none overwrites what it sees.
        """
        check_prompts(prompts, max_new_tokens, self.config.vocab_size, self.config.max_position_embeddings)
        device = next(self._model.parameters()).device
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
        seen = None
        if sampling.repetition_penalty != 1:
            size = len(prompts), self.config.vocab_size
            seen = torch.zeros(size, dtype=torch.bool, device=device)  # [B, V]
        most = self.config.longest_call(cache.positions.shape[1] - 1) or width
        chosen: Any = None
        for start in range(0, width, most):
            part = slice(start, start + most)
            last = np.clip(lengths - 1 - start, 0, len(tokens[0, part]) - 1)  # [B]
            new, cache, seen = self._step(
                torch.from_numpy(tokens[:, part]).to(device),
                torch.from_numpy(positions[:, part]).to(device),
                torch.from_numpy(last).to(device).long(),
                cache,
                seen,
                key(sampling.seed, device),
                0,
                sampling,
            )
            later = torch.from_numpy(lengths > start).to(device)  # [B]
            chosen = new if chosen is None else torch.where(later, new, chosen)
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
        seed = key(sampling.seed, chosen.device)
        ends = torch.from_numpy(lengths).to(chosen.device)
        first = torch.zeros_like(ends, dtype=torch.int64)
        running = np.ones(len(prompts), bool)
        for count in range(1, max_new_tokens + 1):
            out = chosen.tolist()
            yield [token if alive else None for token, alive in zip(out, running, strict=True)]
            running &= ~np.isin(out, list(stop_tokens))
            if count == max_new_tokens or not running.any():
                return
            if count == 1:
                cache = grow(cache, self.config.cache_slots(bucket(lengths.max() + max_new_tokens)))
            chosen, cache, seen = self._step(
                chosen[:, None], (ends + count - 1)[:, None], first, cache, seen, seed, count, sampling
            )
