"""Meta's tokenizer.model: SentencePiece's for LLaMA 1 and 2, tiktoken's for Llama 3.

Both are put into the terms of GGUF's metadata, which gguf_tokenizer turns into Hugging Face's files.
SentencePiece's file is one protobuf message, of which a few fields are wanted, so its library is not needed:
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from twinformers.checkpoints.gguf_tokenizer import tokenizer_assets as from_gguf
from twinformers.configs.llama import LlamaConfig
from twinformers.errors import FormatError

_BPE = 2  # SentencePiece's number of the algorithm
_NORMAL, _CONTROL = 1, 3  # GGUF took over SentencePiece's types of tokens
#: tiktoken's vocabulary is bytes, which byte-level BPE spells as these characters: themselves if they print.
_PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))
_SPELLING = {b: chr(b) for b in _PRINTED} | {
    b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in _PRINTED)
}
#: How many special tokens follow the vocabulary in the file; 3.1 gave three reserved ones a meaning.
_SPECIAL = 256
_NAMED = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
_NAMED_SINCE_3_1 = {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}


def tokenizer_assets(data: bytes, config: LlamaConfig, where: str) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and generation_config.json from a tokenizer.model.

    Raises FormatError for a file that is malformed, of another kind than LLaMA's, or of another model.
    """
    # A SentencePiece model begins with the tag of its first field, which is a line feed.
    read = _sentencepiece if data[:1] == b"\n" else _tiktoken
    try:
        metadata = read(data, config)
    except (ValueError, IndexError, struct.error) as error:
        raise FormatError(
            "not a tokenizer of LLaMA",
            where=where,
            expected="SentencePiece BPE that leaves text as it is, or lines of base64 and rank",
            found=str(error),
            hint="fetch the file again, or put a tokenizer.json into the folder",
        ) from None
    if (count := len(metadata["tokens"])) > config.vocab_size:
        raise FormatError(
            "the tokenizer has more tokens than the model",
            where=where,
            expected=f"at most {config.vocab_size}",
            found=str(count),
            hint="the file belongs to another model",
        )
    return from_gguf({f"tokenizer.ggml.{key}": value for key, value in metadata.items()}, where)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: numbers as int, everything else as the bytes that it consists of."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            value |= (message[at] & 127) << shift
            at += 1
            if message[at - 1] < 128:
                return value
        raise ValueError("a number is too long")

    while at < len(message):
        tag = varint()
        if (kind := tag & 7) == 0:
            yield tag >> 3, varint()
        else:
            size = {1: 8, 5: 4}.get(kind) or (varint() if kind == 2 else len(message) + 1)
            if at + size > len(message):
                raise ValueError(f"field {tag >> 3} goes beyond the end")
            yield tag >> 3, message[at : at + size]
            at += size


def _get(fields: Mapping[int, int | bytes], number: int, default: Any) -> Any:
    """A field's value, which must be of the default's type."""
    value = fields.get(number, default)
    if not isinstance(value, type(default)):
        raise ValueError(f"field {number} is of a wrong type")
    return value


def _sentencepiece(data: bytes, config: LlamaConfig) -> dict[str, Any]:
    parts = list(_fields(data))
    pieces = [dict(_fields(_get({1: part}, 1, b""))) for number, part in parts if number == 1]
    model = dict(parts)
    trainer, normalizer = (dict(_fields(_get(model, number, b""))) for number in (2, 3))
    demands = {
        "BPE": _get(trainer, 3, 1) == _BPE,
        "spaces before their words": not _get(trainer, 24, 0),
        "no character map": not _get(normalizer, 2, b""),
        "no spaces removed": not _get(normalizer, 4, 1),
        "spaces written as ▁": bool(_get(normalizer, 5, 1)),
    }
    if unmet := [name for name, met in demands.items() if not met]:
        raise ValueError(f"a SentencePiece model without: {', '.join(unmet)}")
    ids = {"unknown": _get(trainer, 40, 0), "bos": _get(trainer, 41, 1), "eos": _get(trainer, 42, 2)}
    return {
        "model": "llama",
        "tokens": [_get(piece, 1, b"").decode("utf-8") for piece in pieces],
        "scores": [struct.unpack("<f", _get(piece, 2, bytes(4)))[0] for piece in pieces],
        "token_type": [_get(piece, 3, _NORMAL) for piece in pieces],
        "add_space_prefix": bool(_get(normalizer, 3, 1)),
        # An absent token has the id -1, which is written as a number of 64 bits.
        **{f"{name}_token_id": i for name, i in ids.items() if i < 1 << 63},
    }


def _tiktoken(data: bytes, config: LlamaConfig) -> dict[str, Any]:
    ranks: dict[str, int] = {}
    for line in data.splitlines():
        token, rank = line.split()
        ranks["".join(_SPELLING[b] for b in base64.b64decode(token, validate=True))] = int(rank)
    tokens = sorted(ranks, key=lambda token: ranks[token])
    if not tokens or [ranks[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError("the ranks do not count the tokens")
    # tiktoken joins the neighbours whose whole has the lowest rank: every way to split a token is a merge.
    splits = ((token, token[:cut], token[cut:]) for token in tokens for cut in range(1, len(token)))
    merges = sorted(
        (ranks[whole], ranks[left], ranks[right], f"{left} {right}")
        for whole, left, right in splits
        if left in ranks and right in ranks
    )
    # What tells 3.1 and its successors from 3 is the scaling of the rotary frequencies.
    names = _NAMED if config.rope_scaling is None else _NAMED | _NAMED_SINCE_3_1
    reserved = iter(range(_SPECIAL))
    special = [f"<|{names.get(i) or f'reserved_special_token_{next(reserved)}'}|>" for i in range(_SPECIAL)]
    ids = {"bos": "begin_of_text", "eos": "end_of_text", "eot": "eot_id", "padding": "finetune_right_pad_id"}
    return {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": tokens + special,
        "token_type": [_NORMAL] * len(tokens) + [_CONTROL] * _SPECIAL,
        "merges": [merge for *_, merge in merges],
        **{
            f"{key}_token_id": len(tokens) + special.index(f"<|{name}|>")
            for key, name in ids.items()
            if name in names.values()
        },
    }
