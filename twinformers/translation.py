"""Text in another language from a source: tokenizer, model and beam search put together."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from twinformers.checkpoints import opened
from twinformers.checkpoints.files import json_object
from twinformers.configs._beams import Beams
from twinformers.errors import UsageError
from twinformers.loading import FRAMEWORKS, Source, load, load_tokenizer


@dataclass(frozen=True)
class TranslateResult:
    """One text's translation by one framework; `tokens` include the end token, if it came.

    `score` is the log-probability over the length penalty, `seconds` what all texts took together, with
    compiling.
    """

    framework: str
    source: str
    text: str
    tokens: list[int]
    score: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def translate(
    source: Source,
    text: str | Sequence[str],
    *,
    framework: str = "jax",
    dtype: str = "float32",
    device: Any = None,
    **beams: Any,
) -> list[TranslateResult]:
    """Translate a text, or several at once, with "jax", "torch" or "both"; results by framework, then text.

    `beams` are fields of `Beams`; what is not given comes from the source's generation settings. Raises
    UsageError for bad options and for a source that is no encoder-decoder model, SourceError where it has no
    tokenizer.json, and the errors of loading.
    """
    frameworks: Sequence[str] = FRAMEWORKS if framework == "both" else (framework,)
    if not set(frameworks) <= set(FRAMEWORKS):
        raise UsageError(
            "unknown framework", where="framework", expected="jax, torch or both", found=repr(framework)
        )
    texts = [text] if isinstance(text, str) else list(text)
    with opened(source) as checkpoint:
        config: Any = checkpoint.config
        if config.kind != "encoder-decoder":
            raise UsageError(
                "this model continues texts and translates none",
                where=checkpoint.source,
                expected="an encoder-decoder model",
                found=config.architecture,
                hint="use `twinformers generate`",
            )
        tokenizer = load_tokenizer(checkpoint)
        name = "generation_config.json"
        raw = json_object(checkpoint.assets.get(name, b"{}"), f"{checkpoint.source}: {name}")
        kept = replace(
            Beams.from_generation(raw, config.eos_token_id, f"{checkpoint.source}: {name}"), **beams
        )
        sources = [tokenizer.encode(t) for t in texts]
        for t, tokens in zip(texts, sources, strict=True):
            if not tokenizer.decode(tokens).strip():
                raise UsageError(
                    "nothing in the text is known to the tokenizer",
                    where="text",
                    expected="words of the source language",
                    found=repr(t)[:200],
                )
        results = []
        for side in frameworks:
            model = load(checkpoint, side, dtype, device)
            started = time.perf_counter()
            found = importlib.import_module(f"{side}_models.beam").Translator(model).translate(sources, kept)
            seconds = time.perf_counter() - started
            results += [
                TranslateResult(side, t, tokenizer.decode(h.tokens), h.tokens, h.score, seconds)
                for t, h in zip(texts, found, strict=True)
            ]
    return results
