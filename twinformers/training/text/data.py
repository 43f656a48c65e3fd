"""The tokens of a run: one mapped array on the disk, and windows of it in an order that the seed decides."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from twinformers.checkpoints.atomic import sync, sync_all
from twinformers.checkpoints.files import read_file, read_json
from twinformers.checkpoints.manifest import sha256
from twinformers.errors import FormatError, IntegrityError, SourceError, UsageError
from twinformers.training.step import Batch
from twinformers.training.text.settings import Run
from twinformers.training.text.sources import documents, find_files, pieces, token_array
from twinformers.training.text.vocabulary import DEFAULT, end_token, given_tokenizer, train_tokenizer

TOKENS, ABOUT, ASSETS = "tokens.bin", "data.json", "tokenizer"
#: Characters that are encoded together, on all cores; token ids that are copied at a time.
TOGETHER, COPIED = 8 << 20, 1 << 24


@dataclass(frozen=True)
class TokenData:
    """What `data.json` says of the tokens; `largest` is the largest id, `vocab_size` the tokenizer's.

    `vocab_size` is None for token files that came without a tokenizer.
    """

    count: int
    files: int
    dtype: str
    largest: int
    vocab_size: int | None
    sha256: str


def prepare(run: Run, on_tokens: Callable[[int], None] = lambda count: None) -> TokenData:
    """Make the tokens of a run, unless they are there; `on_tokens` is told how many there are so far.

    Raises the errors of the files and of the tokenizer, IntegrityError where the tokens are not those that
    were written.
    """
    if not run.data.exists():
        new = run.folder / ".data.new"
        shutil.rmtree(new, ignore_errors=True)
        (new / ASSETS).mkdir(parents=True)
        try:
            _write(run, new, on_tokens)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        sync_all(new)
        os.rename(new, run.data)
        sync(run.folder)
    about = read_about(run)
    if (found := sha256(run.data / TOKENS)) != about.sha256:
        raise IntegrityError(
            "the tokens are not those that the run began with",
            where=str(run.data / TOKENS),
            expected=f"the sum {about.sha256}",
            found=found,
            hint=f"remove the folder {run.data}: it is made again from the data",
        )
    return about


def read_about(run: Run) -> TokenData:
    """What is said of tokens that are there. Raises SourceError and FormatError where it cannot be read."""
    try:
        return TokenData(**read_json(run.data / ABOUT))
    except TypeError as error:
        raise FormatError("unknown fields", where=str(run.data / ABOUT), found=str(error)) from None


def _write(run: Run, folder: Path, on_tokens: Callable[[int], None]) -> None:
    s = run.settings
    files, ids = find_files(s.data)
    assets: dict[str, bytes] = given_tokenizer(s.tokenizer) if s.tokenizer else {}
    if ids:
        known = run.model.vocab_size if s.config else s.vocab_size
        blocks, dtype = _copied([token_array(path, s.token_dtype) for path in files], known)
    else:
        if not assets:
            # A configuration says how many tokens there are, a preset takes as many as there are.
            own = run.model.vocab_size if s.config else DEFAULT
            texts = (part for text in documents(files) for part in pieces(text))
            assets = train_tokenizer(texts, s.vocab_size or own)
        where = s.tokenizer or "the trained tokenizer"
        backend, end = tokenizers.Tokenizer.from_buffer(assets["tokenizer.json"]), end_token(assets, where)
        dtype = "uint16" if max(backend.get_vocab_size(), end + 1) <= 1 << 16 else "uint32"
        blocks = _encoded(files, backend, end)
    for name, content in assets.items():
        (folder / ASSETS / name).write_bytes(content)
    digest, count, largest = hashlib.sha256(), 0, -1
    with open(folder / TOKENS, "wb") as file:
        for block in blocks:
            content = block.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
            file.write(content)
            digest.update(content)
            count += len(block)
            largest = max(largest, int(block.max()) if len(block) else -1)
            on_tokens(count)
    if count == 0:
        raise SourceError("there is nothing to learn from", where=", ".join(s.data), found="empty files")
    vocabulary = tokenizers.Tokenizer.from_buffer(assets["tokenizer.json"]) if assets else None
    about = TokenData(
        count,
        len(files),
        dtype,
        largest,
        vocabulary.get_vocab_size() if vocabulary else None,
        digest.hexdigest(),
    )
    (folder / ABOUT).write_text(json.dumps(asdict(about), indent=2) + "\n")


def _encoded(files: list[Path], backend: Any, end: int) -> Iterator[np.ndarray]:
    """The documents as tokens, each followed by the token that ends it."""
    held: list[tuple[str, bool]] = []

    def encoded() -> Iterator[np.ndarray]:
        found = backend.encode_batch_fast([text for text, _ in held], add_special_tokens=False)
        for encoding, (_, last) in zip(found, held, strict=True):
            yield np.array([*encoding.ids, end] if last else encoding.ids, np.int64)
        held.clear()

    for text in documents(files):
        *parts, last = pieces(text)
        held += [(part, False) for part in parts] + [(last, True)]
        if sum(len(part) for part, _ in held) >= TOGETHER:
            yield from encoded()
    yield from encoded()


def _copied(arrays: list[np.ndarray], vocab_size: int | None) -> tuple[Iterator[np.ndarray], str]:
    """Token files one after the other, and the type that holds them all."""
    least = min((int(a.min()) for a in arrays if len(a)), default=0)
    most = max((int(a.max()) for a in arrays if len(a)), default=0)
    if least < 0 or most >= 2**32:
        raise FormatError("not token ids", where="data", expected="0 to 2^32 - 1", found=f"{least} to {most}")
    size = max(most + 1, vocab_size or 0)
    parts = (a[n : n + COPIED] for a in arrays for n in range(0, len(a), COPIED))
    return parts, "uint16" if size <= 1 << 16 else "uint32"


def tokenizer_files(run: Run) -> dict[str, bytes]:
    """The files of the run's tokenizer by name; none for token files that came without one."""
    return {path.name: read_file(path) for path in sorted((run.data / ASSETS).iterdir())}


def token_map(run: Run, about: TokenData) -> np.ndarray:
    """All tokens, mapped and not read. [count]"""
    array = np.memmap(run.data / TOKENS, np.dtype(about.dtype).newbyteorder("<"), "r")
    if len(array) != about.count:
        raise FormatError(
            "the files of the run disagree",
            where=str(run.data / TOKENS),
            expected=f"{about.count} tokens",
            found=str(len(array)),
        )
    return array


class Windows:
    """Training batches by number: `windows[step]` depends on tokens, seed and step, and on nothing else.

    The tokens before the held-out end are cut into windows of `sequence` tokens, each with the token that
    follows as its last target. An epoch takes every window once, in the order of a Philox permutation
    (Salmon et al. 2011) of its own. Raises UsageError where there is too little text for one window.
    """

    def __init__(
        self, tokens: np.ndarray, *, sequence: int, batch_size: int, seed: int, eval_share: float = 0.0
    ):
        cut = len(tokens) - int(len(tokens) * eval_share)
        self._tokens, self._held_out = tokens[:cut], tokens[cut:]
        self._sequence, self._size, self._seed = sequence, batch_size, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        for part, name in ((self._tokens, "to learn from"), (self._held_out, "held out")):
            if len(part) <= sequence and (name != "held out" or eval_share):
                raise UsageError(
                    f"too little text {name}",
                    where="data",
                    expected=f"at least {sequence + 1} tokens, one window",
                    found=f"{len(part)} of {len(tokens)} tokens",
                    hint="give more text, a smaller --sequence"
                    + (", or --eval-share 0" if name == "held out" else ""),
                )
        self.count = (cut - 1) // sequence

    def __getitem__(self, step: int) -> Batch:
        """The batch of update step + 1. int32, each [B, T]"""
        return self._batch(self._tokens, [self.window(step * self._size + n) for n in range(self._size)])

    def window(self, number: int) -> int:
        """Which window is the `number`-th to be read, counted over all epochs."""
        epoch, place = divmod(number, self.count)
        if self._order[0] != epoch:
            # Apart from the keys of the initial weights, which have 32 bits of seed.
            generator = np.random.Generator(np.random.Philox(key=[(1 << 32) + self._seed, epoch]))
            self._order = epoch, generator.permutation(self.count)
        return int(self._order[1][place])

    def held_out(self, rows: int, most: int) -> list[Batch]:
        """The held-out windows in order, at most `most`; what fills the last batch is padding."""
        count = max(0, min((len(self._held_out) - 1) // self._sequence, most))
        return [
            self._batch(self._held_out, list(range(n, min(n + rows, count))), rows)
            for n in range(0, count, rows)
        ]

    def _batch(self, tokens: np.ndarray, windows: list[int], rows: int = 0) -> Batch:
        T, missing = self._sequence, max(0, rows - len(windows))
        read = np.stack([tokens[w * T : w * T + T + 1] for w in windows]).astype(np.int32)  # [B, T+1]
        positions = np.tile(np.arange(T, dtype=np.int32), (len(windows), 1))
        parts = (read[:, :-1], 0), (positions, -1), (read[:, 1:], -1)
        filled = (np.pad(x, ((0, missing), (0, 0)), constant_values=empty) for x, empty in parts)
        return Batch(*map(np.ascontiguousarray, filled))
