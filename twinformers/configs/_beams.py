"""How beam search chooses a translation; one description for both frameworks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twinformers.configs._sampling import check_prompts
from twinformers.errors import ConfigError, UsageError

PENALTIES = ("length", "wu")
#: Settings of generation_config.json that would change a translation, with the value that does not.
UNSUPPORTED = {
    "begin_suppress_tokens": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "repetition_penalty": 1.0,
    "sequence_bias": None,
    "suppress_tokens": None,
}


@dataclass(frozen=True, kw_only=True)
class Beams:
    """The `num_beams` likeliest beginnings are carried on; 1 is greedy decoding.

    A finished translation of n tokens, the end token among them, is ranked by its log-probability over
    n^a for the penalty "length" (as transformers does), ((5+n)/6)^a for "wu" (Wu et al. 2016,
    arXiv:1609.08144, eq. 14), with `length_penalty` as a. A source is done once `num_beams` translations are
    finished and, unless `early_stopping`, the best beginning could not overtake the worst of them at its
    present length (with "never": at any length up to `max_new_tokens`).
    `banned` tokens are never chosen; `force_eos` ends what reaches `max_new_tokens`; `renormalize` makes
    log-probabilities of what these two leave over.
    """

    num_beams: int = 4
    max_new_tokens: int = 128
    length_penalty: float = 1.0
    penalty: str = "length"
    early_stopping: bool | str = False
    banned: tuple[int, ...] = ()
    force_eos: bool = False
    renormalize: bool = False

    def __post_init__(self):
        for name, ok, expected in (
            ("num_beams", self.num_beams >= 1, "an integer >= 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "an integer >= 1"),
            ("length_penalty", math.isfinite(self.length_penalty), "a finite number"),
            ("penalty", self.penalty in PENALTIES, " or ".join(PENALTIES)),
            ("early_stopping", self.early_stopping in (False, True, "never"), "true, false or never"),
        ):
            if not ok:
                raise UsageError("bad value", where=name, expected=expected, found=str(getattr(self, name)))

    @property
    def divisors(self) -> tuple[float, ...]:
        """What the log-probability of a translation of 1, 2, ... `max_new_tokens` tokens is divided by."""
        bases = [n if self.penalty == "length" else (5 + n) / 6 for n in range(1, self.max_new_tokens + 1)]
        return tuple(float(base) ** self.length_penalty for base in bases)

    @classmethod
    def from_generation(cls, raw: Mapping[str, Any], eos_token_id: int, where: str) -> Beams:
        """What a generation_config.json, given as its dictionary, asks for; four beams where it is silent.

        Raises ConfigError by name for what would change the translation and is not implemented.
        """

        def refuse(name: str, expected: object) -> None:
            raise ConfigError(
                "the generation settings ask for what is not implemented",
                where=f"{where}: {name}",
                expected=repr(expected),
                found=repr(raw[name])[:200],
                hint="translating without it would give another text; remove it to accept that",
            )

        for name, neutral in UNSUPPORTED.items():
            if raw.get(name) not in (None, neutral):
                refuse(name, neutral)
        banned = raw.get("bad_words_ids") or []
        if not all(isinstance(word, list) and len(word) == 1 for word in banned):
            refuse("bad_words_ids", "single tokens, each in a list of its own")
        if raw.get("forced_eos_token_id") not in (None, eos_token_id):
            refuse("forced_eos_token_id", eos_token_id)
        values = {
            name: raw[name] for name in ("num_beams", "length_penalty", "early_stopping") if name in raw
        }
        if raw.get("max_new_tokens") is not None:
            values["max_new_tokens"] = raw["max_new_tokens"]
        elif raw.get("max_length") is not None:
            values["max_new_tokens"] = raw["max_length"] - 1  # the start token counts there
        return cls(
            **{name: value for name, value in values.items() if value is not None},
            banned=tuple(word[0] for word in banned if word[0] != eos_token_id),
            force_eos=raw.get("forced_eos_token_id") is not None,
            renormalize=bool(raw.get("renormalize_logits")),
        )


def check_sources(sources: Sequence[Sequence[int]], beams: Beams, config: Any) -> None:
    """Raise UsageError for what a model cannot translate, or a token to ban that it does not have."""
    longest = max(map(len, sources), default=0)
    check_prompts(sources, beams.max_new_tokens, config.source_vocab_size, longest + beams.max_new_tokens)
    most = config.max_position_embeddings
    for name, length in (("sources", longest), ("max_new_tokens", beams.max_new_tokens)):
        if length > most:
            raise UsageError(
                "more positions than the model was made for",
                where=name,
                expected=f"at most {most}",
                found=str(length),
            )
    if beams.banned and not 0 <= min(beams.banned) <= max(beams.banned) < config.target_vocab_size:
        raise UsageError(
            "token outside the vocabulary",
            where="banned",
            expected=f"0 to {config.target_vocab_size - 1}",
            found=str(beams.banned),
        )
