"""Prompt look-up: guess that the text goes on as it did before, and check several guesses in one pass.

Speculative decoding (Leviathan et al. 2023, arXiv:2211.17192) with the text itself as the draft (Yang et al.
2023, arXiv:2304.04487). A pass over a few tokens reads the weights as often as one over one: once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from torch_models.generate import Generator, choose, grow
from torch_models.random import fold_in, key
from twinformers.configs import Sampling
from twinformers.configs._sampling import NGRAMS, bucket, check_guesses, check_lookup


def guess(history: list[int], count: int) -> list[int]:
    """What followed when the text last ended as it ends now: at most `count` tokens.

    The longest of `NGRAMS` that is found decides.
    """
    # vs jax: a list as long as the text, searched by the host
    for n in NGRAMS:
        for start in range(len(history) - n - 1, -1, -1):
            if history[start : start + n] == history[-n:]:
                return history[start + n : start + n + count]
    return []


class LookupGenerator(Generator):
    """Gives the same tokens as `Generator`, several at a time where the text repeats itself. One prompt only.

    `passes` counts those of the model since the prompt; with no guess right there is one for each token.
    """

    def __init__(self, model: Any, guesses: int = 4):
        check_guesses(guesses)
        super().__init__(model)
        self.guesses, self.passes = guesses, 0

    @torch.inference_mode()
    def _ahead(self, guesses, history, cache, key, first, sampling):
        """The last token and the guesses after it; the tokens that are right, and the one after them."""
        device = next(self._model.parameters()).device
        tokens = torch.tensor([[history[-1], *guesses]], dtype=torch.int32, device=device)  # [1, G+1]
        places = len(history) - 1 + torch.arange(tokens.shape[1], dtype=torch.int32, device=device)
        x, cache = self._model.hidden(tokens, places[None], cache)
        logits = self._model.head(x)[0]  # [G+1, V]
        # Each place draws with the key that it would have without guesses.
        counts = range(len(history) - first, len(history) - first + len(logits))
        rows = [choose(row[None], sampling, fold_in(key, n)) for n, row in zip(counts, logits, strict=True)]
        chosen = torch.cat(rows).tolist()
        right = 0
        while right < len(guesses) and guesses[right] == chosen[right]:  # up to the first wrong one
            right += 1
        return chosen[: right + 1], cache

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
        history, new, seed = list(prompt), chosen.tolist(), key(sampling.seed, chosen.device)
        while True:
            for token in new:
                yield [token]
                if token in stop_tokens:
                    return
            history += new
            if len(history) == limit:
                return
            if self.passes == 0:
                cache = grow(cache, self.config.cache_slots(bucket(limit)))
            guesses = guess(history, min(self.guesses, limit - len(history) - 1))
            new, cache = self._ahead(guesses, history, cache, seed, first, sampling)
            self.passes += 1
