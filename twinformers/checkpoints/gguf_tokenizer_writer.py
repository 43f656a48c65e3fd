"""A tokenizer.json in the terms of GGUF's metadata: the inverse of gguf_tokenizer.

GGUF names the kind of a tokenizer and lists its vocabulary; for much of what tokenizer.json can say it has no
words. So what is to be written is read back first, and must be the same tokenizer, part by part.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from itertools import groupby, zip_longest
from typing import Any

import tokenizers

from twinformers.checkpoints.gguf_tokenizer import (
    BYTE,
    CONTROL,
    ENDS,
    IDS,
    NORMAL,
    PRE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    merges_from_scores,
    pre_tokenizer,
    tokenizer_assets,
)
from twinformers.checkpoints.tokenizer import Tokenizer
from twinformers.errors import FormatError

log = logging.getLogger(__name__)

#: Files of tokenizers that have no tokenizer.json, which alone says everything.
_OTHERS = ("tokenizer.model", "vocab.json", "source.spm", "vocab-src.json")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def tokenizer_metadata(assets: Mapping[str, bytes], size: int, where: str) -> dict[str, object]:
    """The keys that describe the tokenizer among a checkpoint's assets, for a model of `size` tokens.

    A text encodes to the same ids by them, and the same tokens begin, end and fill up sequences; two texts
    encoded as a pair are unknown to GGUF. Without a tokenizer, the keys say so. Raises FormatError that names
    the part of the tokenizer which GGUF cannot express, or that is malformed.
    """
    if "tokenizer.json" not in assets:
        if others := [name for name in _OTHERS if name in assets]:
            raise FormatError(
                "the tokenizer is in a form that is not read here",
                where=where,
                expected="tokenizer.json",
                found=", ".join(others),
                hint="let transformers write one: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
            )
        log.warning("%s: there is no tokenizer, so the GGUF has none either", where)
        return {"tokenizer.ggml.model": "no_vocab"}
    given, state = _read(assets, where)
    model, added = state["model"], state["added_tokens"]
    if model["type"] != "BPE":
        raise _inexpressible("model.type", "BPE", model["type"], where)
    vocab = model["vocab"] | {token["content"]: token["id"] for token in added}
    tokens = {i: token for token, i in vocab.items()}
    if len(tokens) != len(vocab) or max(tokens, default=size) >= size:
        ids = f"{len(vocab)} tokens of {len(tokens)} ids, up to {max(tokens, default=None)}"
        raise _inexpressible("model.vocab", f"a token for each id, below {size}", ids, where)
    if not model["merges"]:  # GGUF's arrays are not empty
        raise _inexpressible("model.merges", "at least one", "none", where)

    special = {token["id"]: token["special"] for token in added}

    def kind(i: int) -> int:
        if i not in tokens:
            return UNUSED
        if tokens[i] == model["unk_token"]:
            return UNKNOWN
        if i in special:
            return CONTROL if special[i] else USER_DEFINED
        return BYTE if model["byte_fallback"] and _BYTE_TOKEN.fullmatch(tokens[i]) else NORMAL

    parts = _parts(given, state)
    # llama.cpp wants a token for each row of the embedding, and calls those that it lacks so.
    filled = [tokens.get(i, f"[PAD{i}]") for i in range(size)]
    types = [kind(i) for i in range(size)]
    around = parts["post_processor"]
    raw: dict[str, object] = {
        "tokens": filled,
        "token_type": types,
        "merges": [" ".join(merge) for merge in model["merges"]],
        "add_bos_token": around[0] is not None,
        "add_eos_token": around[-1] is not None,
        **_ids(given, vocab),
    }
    if model["byte_fallback"]:
        raw |= {
            "model": "llama",
            "pre": "default",
            "scores": _scores(model["merges"], filled, types, where),
            "add_space_prefix": any(part["type"] == "Prepend" for part in parts["normalizer"]),
        }
    else:
        raw |= {"model": "gpt2", "pre": _pre(parts["pre_tokenizer"], where)}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in raw.items()}
    if given.template is not None:
        if re.search("[\ud800-\udfff]", given.template):
            raise _inexpressible("chat_template", "Unicode", "half a surrogate pair", where)
        metadata["tokenizer.chat_template"] = given.template

    expected = _parts(*_read(tokenizer_assets(metadata, where), where))
    # Reading names more tokens than the files did, where they left a role to the id alone.
    expected["special tokens"] = [
        pair for pair in expected["special tokens"] if pair in parts["special tokens"]
    ]
    for part, found in parts.items():
        if expected[part] != found:
            pairs = zip_longest(expected[part], found, fillvalue="nothing")
            raise _inexpressible(part, *next((e, f) for e, f in pairs if e != f), where)
    return metadata


def _inexpressible(part: str, expected: object, found: object, where: str) -> FormatError:
    return FormatError(
        f"GGUF has no words for this part of the tokenizer: {part}",
        where=f"{where}: tokenizer.json",
        expected=str(expected)[:400],
        found=str(found)[:400],
        hint="write another format: the text would be split otherwise, or the generation end elsewhere",
    )


def _read(assets: Mapping[str, bytes], where: str) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, and its tokenizer.json as the library spells it: older files abbreviate."""
    tokenizer = Tokenizer.from_assets(assets, where)
    return tokenizer, json.loads(tokenizers.Tokenizer.from_buffer(assets["tokenizer.json"]).to_str())


def _parts(tokenizer: Tokenizer, state: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What decides about ids and texts, part by part; what has no effect is left out."""
    model = state["model"]
    options = {name: value or None for name, value in model.items() if name not in ("vocab", "merges")}
    if options["unk_token"] is None:
        del options["fuse_unk"]
    # Without a normalizer, it makes no difference whether a token is searched before or after it.
    flags = {"normalized": False} if state["normalizer"] is None else {}
    return {
        "model": sorted(options.items()),
        "model.merges": model["merges"],
        "normalizer": _flat(state["normalizer"]),
        "pre_tokenizer": _flat(state["pre_tokenizer"]),
        "post_processor": _around(state["post_processor"]),
        "decoder": [
            {"type": "ByteLevel"} if part["type"] == "ByteLevel" else part for part in _flat(state["decoder"])
        ],
        "added_tokens": sorted((token | flags for token in state["added_tokens"]), key=lambda t: t["id"]),
        "special tokens": sorted((n, t) for n, t in tokenizer.named.items() if n.partition("_")[0] in IDS),
        "the token that begins": [tokenizer.bos_id],
        "the tokens that end": sorted(set(tokenizer.eos_ids)),
        "the token that fills up": [tokenizer.pad_id],
        "chat_template": [tokenizer.template],
    }


def _flat(part: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The members of a sequence, without what only concerns the offsets into the text."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        (members,) = (value for value in part.values() if isinstance(value, list))
        return [member for each in members for member in _flat(each)]
    return [{name: value for name, value in part.items() if name != "trim_offsets"}]


def _around(post_processor: Mapping[str, Any] | None) -> list[Any]:
    """What a text becomes: ids before it, its place ("A"), ids after it; None where there are none."""
    parts = [part for part in _flat(post_processor) if part["type"] != "ByteLevel"]
    if [part["type"] for part in parts] != ["TemplateProcessing"]:
        return [None, *parts, None]
    ids = parts[0]["special_tokens"]
    pieces = [
        ids[piece["SpecialToken"]["id"]]["ids"] if "SpecialToken" in piece else piece["Sequence"]["id"]
        for piece in parts[0]["single"]
    ]
    at = pieces.index("A") if "A" in pieces else 0
    return [pieces[:at] or None, pieces[at : at + 1], pieces[at + 1 :] or None]


def _ids(tokenizer: Tokenizer, vocab: Mapping[str, int]) -> dict[str, int]:
    """The tokens with a role; of several that end a text, the one that is named comes first."""
    named = {name: vocab.get(tokenizer.named.get(f"{name}_token", "")) for name in IDS}
    found = {"bos": tokenizer.bos_id, "unk": named["unk"], "pad": tokenizer.pad_id}
    ends = sorted(tokenizer.eos_ids, key=lambda i: i != named["eos"])
    ids = {IDS[name]: i for name, i in found.items()} | dict(zip((IDS["eos"], *ENDS), ends, strict=False))
    return {f"{name}_token_id": i for name, i in ids.items() if i is not None}


def _pre(found: list[Any], where: str) -> str:
    """The name under which llama.cpp knows a pre-tokenizer."""
    for name in PRE:
        empty = tokenizers.Tokenizer(tokenizers.models.BPE())
        empty.pre_tokenizer = pre_tokenizer(name)
        if _flat(json.loads(empty.to_str())["pre_tokenizer"]) == found:
            return name
    raise _inexpressible("pre_tokenizer", f"that of {', '.join(PRE)}", found, where)


def _scores(merges: Sequence[Sequence[str]], tokens: list[str], types: list[int], where: str) -> list[float]:
    """Scores by which SentencePiece, whose algorithm llama.cpp runs, merges in the order of these merges.

    It joins whichever neighbours form the token of the highest score, so it needs no other merges than all
    that its vocabulary allows, those of one token together.
    """
    wholes = [whole for whole, _ in groupby(left + right for left, right in merges)]
    ranks = {whole: float(-n) for n, whole in enumerate(wholes)}
    scores = [ranks.get(token, 0.0) for token in tokens]
    # User-defined tokens are cut out of the text beforehand, so no merge makes one.
    kinds = [CONTROL if kind == USER_DEFINED else kind for kind in types]
    allowed = merges_from_scores({token: i for i, token in enumerate(tokens)}, scores, kinds, where)
    if len(ranks) != len(wholes) or sorted(map(tuple, merges)) != sorted(allowed):
        expected = "every way to put a token of the vocabulary together, those of the best token first"
        raise _inexpressible("model.merges", expected, "others, or in another order", where)
    return scores
