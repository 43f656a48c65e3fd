"""The tokenizer in a GGUF file's metadata, written as Hugging Face's files.

GGUF names a pre-tokenizer (`tokenizer.ggml.pre`) instead of describing it, so each name that is supported
is spelled out here as the model's own tokenizer.json has it; any other is refused, because a wrong split of
the text goes unnoticed. What is not stated follows llama.cpp: a SentencePiece vocabulary and Llama 3's add a
BOS token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from twinformers.errors import FormatError

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = ("gpt-2", "default")
_SMOLLM = ("smollm",)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
#: The pre-tokenizers that differ, by the first of their names.
PRE = (_GPT2[0], _SMOLLM[0], _LLAMA3[0])

#: llama.cpp's token types. Control and unknown tokens are special; no merge makes an unused or a byte token.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
#: GGUF's names of the tokens with a role, and of those that end a turn and so end the generation too.
IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
ENDS = ("eot", "eom")
#: Characters of a token, and of all together; ways to put tokens together (real ones: 0.6 million).
MAX_PIECE, MAX_PIECES, MAX_MERGES = 256, 1 << 22, 3 << 18
#: Tokens that are found in a text before anything else; the library's search for them takes time and memory.
MAX_ADDED = 1 << 14


class _Metadata:
    """Typed access to the keys of the tokenizer."""

    def __init__(self, metadata: Mapping[str, object], where: str):
        self.metadata, self.path = metadata, where

    def where(self, key: str) -> str:
        return f"{self.path}: tokenizer.ggml.{key}"

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            found = type(value).__name__
            raise FormatError(
                "wrong type of a value", where=self.where(key), expected=kind.__name__, found=found
            )
        return value

    def array(self, key: str, kind: type | tuple[type, ...], length: int | None = None) -> list[Any]:
        values = self.get(key, list)
        if values is None:
            raise FormatError("the key is missing", where=self.where(key))
        if not all(isinstance(v, kind) for v in values):
            raise FormatError("wrong type of an element", where=self.where(key), expected=str(kind))
        if length not in (None, len(values)):
            raise FormatError(
                "one element for each token is needed",
                where=self.where(key),
                expected=str(length),
                found=str(len(values)),
            )
        return values

    def token_id(self, key: str) -> int | None:
        """The id under `key`, checked against the vocabulary."""
        value, size = self.get(f"{key}_token_id", int), len(self.array("tokens", str))
        if value is not None and not 0 <= value < size:
            raise FormatError(
                "the token is not in the vocabulary",
                where=self.where(f"{key}_token_id"),
                expected=f"0 to {size - 1}",
                found=str(value),
            )
        return value


def tokenizer_assets(metadata: Mapping[str, object], where: str) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and generation_config.json; nothing if there is no tokenizer.

    Raises FormatError naming the field for a tokenizer that is malformed or of an unsupported kind.
    """
    meta = _Metadata(metadata, where)
    model = meta.get("model", str, "no_vocab")
    if model in ("no_vocab", "none"):
        return {}
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if model not in builders:
        raise FormatError(
            "this kind of tokenizer is not supported",
            where=meta.where("model"),
            expected=" or ".join(builders),
            found=repr(model)[:200],
        )
    tokens = meta.array("tokens", str)
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise FormatError("a token appears twice", where=meta.where("tokens"), found=repr(twice)[:200])
    has_types = "tokenizer.ggml.token_type" in metadata
    types = meta.array("token_type", int, len(tokens)) if has_types else [1] * len(tokens)

    tokenizer, adds_bos = builders[model](meta, vocab, types)
    named = {name: meta.token_id(key) for name, key in IDS.items()}
    if model == "llama":  # the ids that SentencePiece itself has by default
        defaults = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
        named |= {n: vocab[t] for n, t in defaults.items() if named[n] is None and t in vocab}
    special = {i for i in named.values() if i is not None}
    special |= {i for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)}
    added = {i for i, kind in enumerate(types) if kind == USER_DEFINED} | special
    if len(added) > MAX_ADDED:
        raise FormatError(
            "more tokens are special or user-defined than in any model",
            where=meta.where("token_type"),
            expected=f"at most {MAX_ADDED}",
            found=str(len(added)),
        )
    tokenizer.add_tokens(
        [AddedToken(tokens[i], normalized=False, special=i in special) for i in sorted(added)]
    )

    adds = {"bos": meta.get("add_bos_token", bool, adds_bos), "eos": meta.get("add_eos_token", bool, False)}
    for name, wanted in adds.items():
        if wanted and named[name] is None:
            raise FormatError(f"the {name} token to add is not named", where=meta.where(f"{name}_token_id"))
    bos, eos = (tokens[i] if adds[n] and (i := named[n]) is not None else None for n in adds)
    if template := _template(bos, eos, vocab):
        byte_level = tokenizer.post_processor
        tokenizer.post_processor = processors.Sequence([byte_level, template]) if byte_level else template

    config: dict[str, object] = {
        # The class that takes tokenizer.json as it is; a model's own class would rebuild the pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokens[i] for name, i in named.items() if i is not None},
        "add_bos_token": adds["bos"],
        "add_eos_token": adds["eos"],
        "clean_up_tokenization_spaces": False,
    }
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if length is not None:
        config["model_max_length"] = length
    if isinstance(chat_template := metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = chat_template
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json(config),
        "generation_config.json": _json(_generation(meta, named)),
    }


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _generation(meta: _Metadata, named: Mapping[str, int | None]) -> dict[str, int | list[int]]:
    """The ids of bos, eos and pad; what ends a turn ends the generation too."""
    ids: dict[str, int | list[int]] = {
        f"{name}_token_id": i for name in ("bos", "eos", "pad") if (i := named[name]) is not None
    }
    ends = [i for i in (named["eos"], *map(meta.token_id, ENDS)) if i is not None]
    if len(set(ends)) > 1:
        ids["eos_token_id"] = list(dict.fromkeys(ends))
    return ids


def _template(bos: str | None, eos: str | None, vocab: Mapping[str, int]) -> Any:
    if bos is None and eos is None:
        return None

    def around(sequence: str, type_id: int) -> list[str]:
        return [f"{token}:{type_id}" for token in (bos, sequence, eos) if token is not None]

    return processors.TemplateProcessing(
        single=around("$A", 0),
        pair=around("$A", 0) + around("$B", 1),
        special_tokens=[(token, vocab[token]) for token in dict.fromkeys((bos, eos)) if token is not None],
    )


def _bpe(meta: _Metadata, vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
    try:
        return Tokenizer(BPE(vocab=vocab, merges=merges, **options))
    except Exception as error:  # tokenizers raises nothing more specific
        problem = f"the merges do not fit the vocabulary: {error}"
        raise FormatError(problem, where=meta.where("merges")) from error


def _merges(meta: _Metadata) -> list[tuple[str, str]]:
    merges = []
    for i, merge in enumerate(meta.array("merges", str)):
        left, _, right = merge.partition(" ")
        if not left or not right:
            raise FormatError(f"merge {i} is no pair", where=meta.where("merges"), found=repr(merge)[:200])
        merges.append((left, right))
    return merges


def _byte_level(meta: _Metadata, vocab: dict[str, int], types: list[int]) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, as GPT-2 has it. Returns the tokenizer and whether it adds a BOS token by default."""
    pre = meta.get("pre", str, "default")
    if pre not in _GPT2 + _SMOLLM + _LLAMA3:
        raise FormatError(
            "this pre-tokenizer is not supported",
            where=meta.where("pre"),
            expected=f"one of {', '.join(_GPT2 + _SMOLLM + _LLAMA3)}",
            found=repr(pre)[:200],
        )
    tokenizer = _bpe(meta, vocab, _merges(meta), ignore_merges=pre in _LLAMA3)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
    if pre in _LLAMA3:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer, pre in _LLAMA3


def pre_tokenizer(pre: str) -> Any:
    """How the byte-level tokenizers of that name split a text before any merge."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _LLAMA3)
    if pre in _SMOLLM:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, byte_level])
    if pre in _LLAMA3:
        split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated")
        return pre_tokenizers.Sequence([split, byte_level])
    return byte_level


def _sentencepiece(meta: _Metadata, vocab: dict[str, int], types: list[int]) -> tuple[Tokenizer, bool]:
    """SentencePiece BPE with byte fallback, as Llama 2's tokenizer.json has it; adds BOS by default."""
    tokens = list(vocab)
    if "tokenizer.ggml.merges" in meta.metadata:
        merges = _merges(meta)
    else:
        scores = meta.array("scores", (float, int), len(tokens))
        merges = merges_from_scores(vocab, scores, types, meta.where("tokens"))
    unknown = meta.token_id("unknown")
    if unknown is None:
        unknown = next((i for i, kind in enumerate(types) if kind == UNKNOWN), None)
    tokenizer = _bpe(
        meta,
        vocab,
        merges,
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    space: list[Any] = [normalizers.Replace(" ", "▁")]
    decoder: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if meta.get("add_space_prefix", bool, True):
        space.insert(0, normalizers.Prepend("▁"))
        decoder.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(space)
    tokenizer.decoder = decoders.Sequence(decoder)
    return tokenizer, True


def merges_from_scores(
    vocab: Mapping[str, int], scores: list[float], types: list[int], where: str
) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, the best token first.

    SentencePiece merges whichever neighbours form the token of the highest score; ranking the pairs by that
    score does the same, and is how Hugging Face converted Llama 2's tokenizer. Raises FormatError where that
    would take all time and memory.
    """
    # Every string is the vocabulary's own: copies of the parts would take most of the memory.
    parts = {
        token: (i, token) for token, i in vocab.items() if types[i] not in (UNKNOWN, CONTROL, UNUSED, BYTE)
    }
    longest, characters = max(map(len, parts), default=0), sum(map(len, parts))
    pairs: list[tuple[float, int, int, str, str]] = []
    for token, (i, _) in parts.items():
        if longest > MAX_PIECE or characters > MAX_PIECES or len(pairs) > MAX_MERGES:
            raise FormatError(
                "the tokens are longer, or have more ways to be put together, than any model's",
                where=where,
                expected=f"{MAX_PIECE} characters, {MAX_PIECES} in all, {MAX_MERGES} ways",
                found=f"{longest}, {characters} in all, {len(pairs)} ways or more",
            )
        splits = ((parts.get(token[:cut]), parts.get(token[cut:])) for cut in range(1, len(token)))
        known = sorted((left, right) for left, right in splits if left and right)
        pairs += [(scores[i], len(left), len(right), left, right) for (_, left), (_, right) in known]
    pairs.sort(key=lambda pair: pair[:3], reverse=True)
    return [(left, right) for *_, left, right in pairs]
