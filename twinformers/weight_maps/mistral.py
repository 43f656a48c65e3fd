"""Mistral's tensors, one row each.

There is no GGUF side: llama.cpp has no such architecture, and what it calls `llama` knows no window.
"""

from __future__ import annotations

from twinformers.configs.mistral import MistralConfig
from twinformers.weight_maps.base import Buffer, Embedding, Linear, Norm, Row, Tied, WeightMap, with_flax

HF = "model.layers.{i}"

ROWS: tuple[Row | Buffer, ...] = (
    Embedding("embed", "V D", hf="model.embed_tokens.weight"),
    Norm("layers.{i}.attn_norm", "D", hf=f"{HF}.input_layernorm.weight"),
    Linear("layers.{i}.attn.q_proj", "(N H) D", hf=f"{HF}.self_attn.q_proj.weight"),
    Linear("layers.{i}.attn.k_proj", "(K H) D", hf=f"{HF}.self_attn.k_proj.weight"),
    Linear("layers.{i}.attn.v_proj", "(K H) D", hf=f"{HF}.self_attn.v_proj.weight"),
    Linear("layers.{i}.attn.o_proj", "D (N H)", hf=f"{HF}.self_attn.o_proj.weight"),
    Norm("layers.{i}.mlp_norm", "D", hf=f"{HF}.post_attention_layernorm.weight"),
    Linear("layers.{i}.mlp.gate_proj", "F D", hf=f"{HF}.mlp.gate_proj.weight"),
    Linear("layers.{i}.mlp.up_proj", "F D", hf=f"{HF}.mlp.up_proj.weight"),
    Linear("layers.{i}.mlp.down_proj", "D F", hf=f"{HF}.mlp.down_proj.weight"),
    Norm("norm", "D", hf="model.norm.weight"),
    # Written by old versions of transformers; the configuration determines them.
    Buffer({"hf": f"{HF}.self_attn.rotary_emb.inv_freq"}),
)
HEAD = Linear("lm_head", "V D", hf="lm_head.weight")
TIED_HEAD = Tied({"hf": "lm_head.weight"}, to={"hf": "model.embed_tokens.weight"})

#: Submodules that hold no parameter of their own, by our path and Hugging Face's.
MODULES = {"layers.{i}": HF, "layers.{i}.attn": f"{HF}.self_attn", "layers.{i}.mlp": f"{HF}.mlp"}


def weight_map(config: MistralConfig) -> WeightMap:
    """The table for one configuration: the letters are those of the design page."""
    return WeightMap(
        # What transformers' Flax class called a norm's scale.
        rows=with_flax((*ROWS, TIED_HEAD if config.tie_word_embeddings else HEAD), scale="weight"),
        sizes={
            "V": config.vocab_size,
            "D": config.hidden_size,
            "F": config.intermediate_size,
            "N": config.num_attention_heads,
            "K": config.num_key_value_heads,
            "H": config.head_dim,
        },
        counts={"i": config.num_hidden_layers},
        modules=MODULES,
        absent="llama.cpp has no such architecture, and its `llama` no window: write another format",
    )
