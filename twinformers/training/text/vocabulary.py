"""The tokenizer of a run: one that is given, or a byte-level BPE trained on the data (Sennrich et al. 2016,
arXiv:1508.07909, over bytes as in GPT-2)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from twinformers.checkpoints import opened
from twinformers.checkpoints.files import read_file
from twinformers.checkpoints.tokenizer import Tokenizer
from twinformers.errors import SourceError, UsageError

#: Ends every document, and is all that this tokenizer has besides bytes and what they merge to.
END = "<|endoftext|>"
LEAST = 257
DEFAULT = 4096
#: The files of a source that belong to its tokenizer and travel with the trained model.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)


def given_tokenizer(source: str) -> dict[str, bytes]:
    """The files of a source's tokenizer, or of a tokenizer.json by its path.

    Raises SourceError where there is none, and the errors of the source.
    """
    path = Path(source).expanduser()
    if path.suffix == ".json" and path.is_file():
        beside = {n: path.with_name(n) for n in FILES if n != "tokenizer.json"}
        beside["generation_config.json"] = path.with_name("generation_config.json")
        found = {"tokenizer.json": read_file(path)}
        found |= {name: read_file(file) for name, file in beside.items() if file.is_file()}
        return found
    with opened(source) as checkpoint:
        assets = checkpoint.assets
    if "tokenizer.json" not in assets:
        raise SourceError("the source has no tokenizer", where=source, expected="tokenizer.json")
    return {n: assets[n] for n in (*FILES, "generation_config.json") if n in assets}


def train_tokenizer(texts: Iterable[str], size: int) -> dict[str, bytes]:
    """A byte-level BPE of exactly `size` tokens, the first of them the end of a document: its files.

    Raises UsageError for a size below that of the bytes, or beyond what the texts fill.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if size < LEAST:
        raise UsageError(
            "the vocabulary is too small",
            where="vocab_size",
            expected=f"at least {LEAST}: all bytes and the end of a document",
            found=str(size),
        )
    result = tokenizers.Tokenizer(models.BPE())
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    result.train_from_iterator(texts, trainer)
    if (count := result.get_vocab_size()) != size:
        raise UsageError(
            "the text does not fill this vocabulary",
            where="vocab_size",
            expected=f"at most {count}",
            found=str(size),
            hint="give more text, or a smaller --vocab-size",
        )
    named = {"bos_token": END, "eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return {
        "tokenizer.json": result.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(named, indent=2) + "\n").encode(),
        "generation_config.json": (json.dumps(ids, indent=2) + "\n").encode(),
    }


def end_token(assets: Mapping[str, bytes], where: str) -> int:
    """The token that ends a document. Raises SourceError where the tokenizer's files name none."""
    ids = Tokenizer.from_assets(assets, where).eos_ids
    if not ids:
        raise SourceError(
            "the tokenizer has no token that ends a document",
            where=where,
            expected="eos_token in tokenizer_config.json, or eos_token_id in generation_config.json",
        )
    return ids[0]
