"""BERT's tensors, one row each. Below a head, Hugging Face's names begin with `bert.`."""

from __future__ import annotations

from dataclasses import replace

from twinformers.configs.bert import BertConfig
from twinformers.weight_maps.base import (
    Bias,
    Buffer,
    Embedding,
    Linear,
    Norm,
    Row,
    Tied,
    WeightMap,
    with_flax,
)

HF = "bert.encoder.layer.{i}"


def _linear(path: str, out: str, into: str, hf: str) -> tuple[Row, Row]:
    return Linear(path, f"{out} {into}", hf=f"{hf}.weight"), Bias(path, out, hf=f"{hf}.bias")


def _norm(path: str, hf: str) -> tuple[Row, Row]:
    return Norm(path, "D", hf=f"{hf}.weight"), Bias(path, "D", hf=f"{hf}.bias")


ENCODER: tuple[Row | Buffer, ...] = (
    Embedding("embed", "V D", hf="bert.embeddings.word_embeddings.weight"),
    Embedding("position_embed", "P D", hf="bert.embeddings.position_embeddings.weight"),
    Embedding("segment_embed", "U D", hf="bert.embeddings.token_type_embeddings.weight"),
    *_norm("embed_norm", "bert.embeddings.LayerNorm"),
    *_linear("layers.{i}.attn.q_proj", "(N H)", "D", f"{HF}.attention.self.query"),
    *_linear("layers.{i}.attn.k_proj", "(N H)", "D", f"{HF}.attention.self.key"),
    *_linear("layers.{i}.attn.v_proj", "(N H)", "D", f"{HF}.attention.self.value"),
    *_linear("layers.{i}.attn.o_proj", "D", "(N H)", f"{HF}.attention.output.dense"),
    *_norm("layers.{i}.attn_norm", f"{HF}.attention.output.LayerNorm"),
    *_linear("layers.{i}.mlp.fc1", "F", "D", f"{HF}.intermediate.dense"),
    *_linear("layers.{i}.mlp.fc2", "D", "F", f"{HF}.output.dense"),
    *_norm("layers.{i}.mlp_norm", f"{HF}.output.LayerNorm"),
    # What versions of transformers up to 4.30 wrote.
    Buffer({"hf": "bert.embeddings.position_ids"}),
    Buffer({"hf": "bert.embeddings.token_type_ids"}),
)
POOLER: tuple[Row, ...] = _linear("pooler", "D", "D2", "bert.pooler.dense")
HEAD: tuple[Row | Tied, ...] = (
    *_linear("head.transform", "D", "D2", "cls.predictions.transform.dense"),
    *_norm("head.norm", "cls.predictions.transform.LayerNorm"),
    Bias("head", "V", hf="cls.predictions.bias"),
    Tied({"hf": "cls.predictions.decoder.weight"}, to={"hf": "bert.embeddings.word_embeddings.weight"}),
    Tied({"hf": "cls.predictions.decoder.bias"}, to={"hf": "cls.predictions.bias"}),
)
NEXT_SENTENCE: tuple[Row, ...] = _linear("next_sentence", "C", "D", "cls.seq_relationship")
#: Submodules without a row of their own, by our path and Hugging Face's.
MODULES = {"layers.{i}": HF, "layers.{i}.mlp": f"{HF}.output.dense"}


def _bare(row: Row | Tied | Buffer) -> Row | Tied | Buffer:
    """The row as BertModel has it, which is the encoder."""
    if isinstance(row, Row):
        place = row.places["hf"]
        name = place.name.removeprefix("bert.")
        return replace(row, places={**row.places, "hf": replace(place, name=name)})
    return replace(row, places={side: name.removeprefix("bert.") for side, name in row.places.items()})


def weight_map(config: BertConfig) -> WeightMap:
    """The table for one configuration: its parts, and the letters of the design page."""
    rows: tuple[Row | Tied | Buffer, ...] = ENCODER
    modules = MODULES
    if config.pooler:
        rows += POOLER
    if config.masked_lm_head:
        rows += HEAD
    else:
        rows = tuple(map(_bare, rows))
        modules = {ours: theirs.removeprefix("bert.") for ours, theirs in modules.items()}
    if config.next_sentence_head:
        rows += NEXT_SENTENCE
    return WeightMap(
        rows=with_flax(rows),
        sizes={
            "V": config.vocab_size,
            "P": config.max_position_embeddings,
            "U": config.type_vocab_size,
            "D": config.hidden_size,
            "D2": config.hidden_size,
            "F": config.intermediate_size,
            "N": config.num_attention_heads,
            "H": config.head_dim,
            "C": 2,  # follows, or does not
        },
        counts={"i": config.num_hidden_layers},
        modules=modules,
    )
