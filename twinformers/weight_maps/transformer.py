"""The Transformer's tensors: twins, Marian, FSMT, and the layers of `torch.nn.Transformer`.

Encoder layers are counted by `{i}`, decoder layers by `{j}`; F and P are their feed-forward sizes, O is D
where it counts outputs, U the source's vocabulary. torch.nn keeps queries, keys and values in one matrix,
and has neither embeddings nor a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from twinformers.configs.transformer import SPELLINGS, TransformerConfig
from twinformers.weight_maps.base import (
    Bias,
    Buffer,
    Embedding,
    Fixed,
    Linear,
    Norm,
    Row,
    There,
    Tied,
    WeightMap,
    with_flax,
)

if TYPE_CHECKING:
    import numpy as np

FUSED = "([O | O | O])"


def _attention(path: str, hf: str, nn: str) -> list[Row]:
    rows = []
    for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
        weight: dict[str, There] = {
            "hf": f"{hf}.{name}.weight",
            "torch.nn": (f"{nn}.in_proj_weight", f"{FUSED} D", part),
        }
        bias: dict[str, There] = {"hf": f"{hf}.{name}.bias", "torch.nn": (f"{nn}.in_proj_bias", FUSED, part)}
        rows += [Linear(f"{path}.{name}", "O D", **weight), Bias(f"{path}.{name}", "O", **bias)]
    return rows + _linear(f"{path}.o_proj", "O D", f"{hf}.out_proj", f"{nn}.out_proj")


def _linear(path: str, axes: str, hf: str, nn: str) -> list[Row]:
    weight, bias = ({"hf": f"{hf}.{leaf}", "torch.nn": f"{nn}.{leaf}"} for leaf in ("weight", "bias"))
    return [Linear(path, axes, **weight), Bias(path, axes.split()[0], **bias)]


def _norm(path: str, hf: str, nn: str) -> list[Row]:
    weight, bias = ({"hf": f"{hf}.{leaf}", "torch.nn": f"{nn}.{leaf}"} for leaf in ("weight", "bias"))
    return [Norm(path, "D", **weight), Bias(path, "D", **bias)]


E, HF_E, NN_E = "encoder.{i}", "model.encoder.layers.{i}", "encoder.layers.{i}"
D, HF_D, NN_D = "decoder.{j}", "model.decoder.layers.{j}", "decoder.layers.{j}"
LAYERS: tuple[Row, ...] = (
    *_attention(f"{E}.self_attn", f"{HF_E}.self_attn", f"{NN_E}.self_attn"),
    *_norm(f"{E}.self_attn_norm", f"{HF_E}.self_attn_layer_norm", f"{NN_E}.norm1"),
    *_linear(f"{E}.mlp.fc1", "F D", f"{HF_E}.fc1", f"{NN_E}.linear1"),
    *_linear(f"{E}.mlp.fc2", "D F", f"{HF_E}.fc2", f"{NN_E}.linear2"),
    *_norm(f"{E}.mlp_norm", f"{HF_E}.final_layer_norm", f"{NN_E}.norm2"),
    *_attention(f"{D}.self_attn", f"{HF_D}.self_attn", f"{NN_D}.self_attn"),
    *_norm(f"{D}.self_attn_norm", f"{HF_D}.self_attn_layer_norm", f"{NN_D}.norm1"),
    *_attention(f"{D}.cross_attn", f"{HF_D}.encoder_attn", f"{NN_D}.multihead_attn"),
    *_norm(f"{D}.cross_attn_norm", f"{HF_D}.encoder_attn_layer_norm", f"{NN_D}.norm2"),
    *_linear(f"{D}.mlp.fc1", "P D", f"{HF_D}.fc1", f"{NN_D}.linear1"),
    *_linear(f"{D}.mlp.fc2", "D P", f"{HF_D}.fc2", f"{NN_D}.linear2"),
    *_norm(f"{D}.mlp_norm", f"{HF_D}.final_layer_norm", f"{NN_D}.norm3"),
)
SOURCE, TARGET = "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"
#: Hugging Face's names of the table that source and target share, and of the output projection.
SHARED = {"marian": "model.shared.weight", "fsmt": TARGET}
HEAD = {"marian": "lm_head.weight", "fsmt": "model.decoder.output_projection.weight"}
#: What had a Flax class in transformers 4; it knew one table for source and target, and computed positions.
FLAX = ("marian",)

#: Submodules that hold no parameter of their own, by our path and Hugging Face's.
MODULES = {
    E: HF_E,
    f"{E}.self_attn": f"{HF_E}.self_attn",
    D: HF_D,
    f"{D}.self_attn": f"{HF_D}.self_attn",
    f"{D}.cross_attn": f"{HF_D}.encoder_attn",
}
#: A shared table serves the source first, then the target; Hugging Face has a module for each.
SHARED_MODULES = {"embed": SOURCE.rpartition(".")[0], "embed#2": TARGET.rpartition(".")[0]}


def _tables(config: TransformerConfig) -> list[Row | Tied]:
    """The three tables of section 3.4, as many as the configuration keeps apart."""
    shared, head = SHARED.get(config.model_type, ""), HEAD.get(config.model_type, "")
    embed = shared if config.share_embeddings else TARGET
    rows: list[Row | Tied] = [Embedding("embed", "V D", hf=embed)]
    copies = {SOURCE, TARGET} if config.share_embeddings else set()
    if not config.share_embeddings:
        rows.append(Embedding("source_embed", "U D", hf=SOURCE))
    if config.tie_word_embeddings:
        copies.add(head)
    else:
        rows.append(Linear("lm_head", "V D", hf=head))
    if config.final_logits_bias:
        rows.append(Fixed("final_logits_bias", "1 V", hf="final_logits_bias"))
    return rows + [Tied({"hf": copy}, to={"hf": embed}) for copy in sorted(copies - {embed})]


def _sinusoids(config: TransformerConfig) -> np.ndarray:
    """The table of positions that FSMT saves: row `position_offset` is position 0, padding's row is 0."""
    import numpy as np

    numbers = np.arange(config.max_position_embeddings + config.position_offset)[:, None]
    angles = numbers * np.array(config.position_frequencies)  # [positions, D/2]
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    table[config.pad_token_id] = 0
    return table


def _without_hf(row: Row | Tied | Buffer) -> Row | None:
    if not isinstance(row, Row):
        return None
    return replace(row, places={side: place for side, place in row.places.items() if side != "hf"})


def weight_map(config: TransformerConfig) -> WeightMap:
    """The table for one configuration, with Hugging Face's names by the configuration's spelling."""
    spelling = SPELLINGS[config.model_type]
    # Marian leaves its table out of the files; FSMT's reader reports a file without it as incomplete.
    value = (lambda: _sinusoids(config)) if spelling.positions == "fairseq" else None
    tables = [
        Buffer({"hf": f"model.{side}.embed_positions.weight"}, value) for side in ("encoder", "decoder")
    ]
    rows = (*_tables(config), *LAYERS, *tables)
    if spelling.hf_class is None:
        rows = tuple(kept for row in rows if (kept := _without_hf(row)))
    if config.model_type in FLAX and config.share_embeddings:
        rows = with_flax(rows)
    modules = MODULES | (SHARED_MODULES if config.share_embeddings else {})
    return WeightMap(rows, _sizes(config), _counts(config), modules, spelling.absent)


def layer_map(config: TransformerConfig) -> WeightMap:
    """The layers alone, which is all that the side "torch.nn" has."""
    return WeightMap(LAYERS, _sizes(config), _counts(config), {})


def _counts(config: TransformerConfig) -> Mapping[str, int]:
    return {"i": config.encoder_layers, "j": config.decoder_layers}


def _sizes(config: TransformerConfig) -> Mapping[str, int]:
    return {
        "V": config.target_vocab_size,
        "U": config.source_vocab_size,
        "D": config.d_model,
        "O": config.d_model,
        "F": config.encoder_ffn_dim,
        "P": config.decoder_ffn_dim,
    }
