"""Number names in English and German: pairs, a split, a shared vocabulary, and batches from a seed alone."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np

from twinformers.checkpoints.tokenizer import Tokenizer
from twinformers.configs.transformer import TransformerConfig
from twinformers.errors import ConfigError, MissingDependency

LIMIT = 1_000_000
#: One number in so many is held out.
HELD_OUT = 200
#: The ids of what is no text: padding, end of sequence, start of the translation.
SPECIAL = ("<pad>", "</s>", "<s>")


@cache
def _named(number: int, language: str) -> str:
    try:
        from num2words import num2words
    except ImportError:
        raise MissingDependency(
            "num2words is not installed", hint="pip install 'twinformers[train]'"
        ) from None
    # The American form: no commas, no "and".
    return num2words(number, lang=language).replace(",", "").replace(" and ", " ")


def spell(number: int) -> tuple[str, str]:
    """A number from 0 to 999,999 in English and in German: 254 -> ("two hundred fifty-four", ...).

    The thousands and the rest are named apart, since both languages put one behind the other: 1,999 names
    serve for all numbers, and naming costs a hundred times less.
    """
    rest = number % 1000
    parts = [part for part in (number - rest, rest) if part] or [0]
    return " ".join(_named(n, "en") for n in parts), "".join(_named(n, "de") for n in parts)


def held_out(number: int) -> bool:
    """Whether a number is kept from training. A hash decides: no seed and no version changes the split."""
    digest = hashlib.blake2b(str(number).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT == 0


def held_out_numbers() -> list[int]:
    """All numbers that are kept from training, in order."""
    return [n for n in range(LIMIT) if held_out(n)]


def train_tokenizer(vocab_size: int) -> bytes:
    """tokenizer.json: a byte-pair vocabulary of both languages, from numbers of the training split alone.

    Raises ConfigError where the texts do not yield that many tokens.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    numbers = [n for n in itertools.chain(range(1000), range(1000, LIMIT, 251)) if not held_out(n)]
    result = tokenizers.Tokenizer(models.BPE())
    # The British form is understood too: "two hundred and fifty-four".
    result.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(",", ""), normalizers.Replace(" and ", " ")]
    )
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split("-", "merged_with_previous")]
    )
    result.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False)
    result.train_from_iterator((text for n in numbers for text in spell(n)), trainer)
    if result.get_vocab_size() != vocab_size:
        raise ConfigError(
            "number names do not fill this vocabulary",
            where="source_vocab_size",
            expected=f"at most {result.get_vocab_size()}",
            found=str(vocab_size),
        )
    result.post_processor = processors.TemplateProcessing(
        single=f"$A {SPECIAL[1]}", special_tokens=[(SPECIAL[1], 1)]
    )
    return result.to_str(pretty=True).encode()


class Batch(NamedTuple):
    """Names in both languages, positions -1 at padding. The decoder reads `tokens` and shall say `labels`."""

    source: np.ndarray  # [B, S] int32
    source_positions: np.ndarray  # [B, S] int32
    tokens: np.ndarray  # [B, T] int32, the start token first
    positions: np.ndarray  # [B, T] int32
    labels: np.ndarray  # [B, T] int32, the end token last


def _padded(rows: list[list[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows as one array and their positions. The width is 8, 12, ...: few shapes to compile for."""
    width = max(8, -(-max(map(len, rows)) // 4) * 4)
    tokens, positions = np.full((len(rows), width), pad, np.int32), np.full((len(rows), width), -1, np.int32)
    for n, row in enumerate(rows):
        tokens[n, : len(row)], positions[n, : len(row)] = row, np.arange(len(row))
    return tokens, positions


class Batches:
    """The training batches: `batches[step]` depends on the seed and the step and on nothing else.

    Lengths are mixed as they come. Sorting them into batches of similar length saves little padding, since
    names differ little in length, and was measured to cost a percent of exact match: updates by short names
    alone pull in another direction than all others.
    """

    def __init__(self, tokenizer: Tokenizer, config: TransformerConfig, size: int, seed: int):
        self._tokenizer, self._config, self._size, self._seed = tokenizer, config, size, seed

    def numbers(self, step: int) -> list[int]:
        """What one batch is made of. A quarter has 1 to 6 digits evenly: short names are rare otherwise."""
        generator = np.random.Generator(np.random.Philox(key=[self._seed, step]))

        def draws() -> Iterator[int]:
            while True:
                below = 10 ** generator.integers(1, 7, self._size)
                below = np.where(generator.random(self._size) < 0.25, below, LIMIT)
                yield from (generator.random(self._size) * below).astype(int).tolist()

        return list(itertools.islice((n for n in draws() if not held_out(n)), self._size))

    def __getitem__(self, step: int) -> Batch:
        c, encode = self._config, self._tokenizer.encode
        names = [spell(n) for n in self.numbers(step)]
        sources, targets = [encode(english) for english, _ in names], [encode(german) for _, german in names]
        labels, positions = _padded(targets, c.pad_token_id)
        tokens, _ = _padded([[c.decoder_start_token_id, *row[:-1]] for row in targets], c.pad_token_id)
        return Batch(*_padded(sources, c.pad_token_id), tokens, positions, labels)
