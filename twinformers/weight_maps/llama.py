"""LLaMA's tensors, one row each.

Meta's checkpoints keep the query and key rows of each head interleaved, and GGUF keeps them so: dimension
2j is turned together with 2j+1. Hugging Face and the twins turn j together with j+H/2. With `r` counting
the two members of a pair and `h` the pairs, that is "(N h r)" against "(N r h)".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twinformers.configs.llama import LlamaConfig
from twinformers.weight_maps.base import Buffer, Embedding, Linear, Norm, Row, Tied, WeightMap, with_flax

if TYPE_CHECKING:
    import numpy as np

HF = "model.layers.{i}"
GGUF = "blk.{i}"
META = "layers.{i}"

ROWS: tuple[Row | Buffer, ...] = (
    Embedding(
        "embed", "V D", hf="model.embed_tokens.weight", gguf="token_embd.weight", meta="tok_embeddings.weight"
    ),
    Norm(
        "layers.{i}.attn_norm",
        "D",
        hf=f"{HF}.input_layernorm.weight",
        gguf=f"{GGUF}.attn_norm.weight",
        meta=f"{META}.attention_norm.weight",
    ),
    Linear(
        "layers.{i}.attn.q_proj",
        "(N r h) D",
        hf=f"{HF}.self_attn.q_proj.weight",
        gguf=(f"{GGUF}.attn_q.weight", "(N h r) D"),
        meta=(f"{META}.attention.wq.weight", "(N h r) D"),
    ),
    Linear(
        "layers.{i}.attn.k_proj",
        "(K r h) D",
        hf=f"{HF}.self_attn.k_proj.weight",
        gguf=(f"{GGUF}.attn_k.weight", "(K h r) D"),
        meta=(f"{META}.attention.wk.weight", "(K h r) D"),
    ),
    Linear(
        "layers.{i}.attn.v_proj",
        "(K H) D",
        hf=f"{HF}.self_attn.v_proj.weight",
        gguf=f"{GGUF}.attn_v.weight",
        meta=f"{META}.attention.wv.weight",
    ),
    Linear(
        "layers.{i}.attn.o_proj",
        "D (N H)",
        hf=f"{HF}.self_attn.o_proj.weight",
        gguf=f"{GGUF}.attn_output.weight",
        meta=f"{META}.attention.wo.weight",
    ),
    Norm(
        "layers.{i}.mlp_norm",
        "D",
        hf=f"{HF}.post_attention_layernorm.weight",
        gguf=f"{GGUF}.ffn_norm.weight",
        meta=f"{META}.ffn_norm.weight",
    ),
    Linear(
        "layers.{i}.mlp.gate_proj",
        "F D",
        hf=f"{HF}.mlp.gate_proj.weight",
        gguf=f"{GGUF}.ffn_gate.weight",
        meta=f"{META}.feed_forward.w1.weight",
    ),
    Linear(
        "layers.{i}.mlp.up_proj",
        "F D",
        hf=f"{HF}.mlp.up_proj.weight",
        gguf=f"{GGUF}.ffn_up.weight",
        meta=f"{META}.feed_forward.w3.weight",
    ),
    Linear(
        "layers.{i}.mlp.down_proj",
        "D F",
        hf=f"{HF}.mlp.down_proj.weight",
        gguf=f"{GGUF}.ffn_down.weight",
        meta=f"{META}.feed_forward.w2.weight",
    ),
    Norm("norm", "D", hf="model.norm.weight", gguf="output_norm.weight", meta="norm.weight"),
    # Written by old versions of transformers and of llama.cpp and by Meta; the configuration determines them.
    Buffer({"hf": f"{HF}.self_attn.rotary_emb.inv_freq", "meta": "rope.freqs"}),
    Buffer({"gguf": "rope_freqs.weight", "meta": f"{META}.attention.inner_attention.rope.freqs"}),
)
HEAD = Linear("lm_head", "V D", hf="lm_head.weight", gguf="output.weight", meta="output.weight")
TIED_HEAD = Tied(
    {"hf": "lm_head.weight", "meta": "output.weight"},
    to={"hf": "model.embed_tokens.weight", "meta": "tok_embeddings.weight"},
)

#: Submodules that hold no parameter of their own, by our path and Hugging Face's.
MODULES = {"layers.{i}": HF, "layers.{i}.attn": f"{HF}.self_attn", "layers.{i}.mlp": f"{HF}.mlp"}


def weight_map(config: LlamaConfig) -> WeightMap:
    """The table for one configuration: the letters are those of the design page, r = 2 and h = H/2."""

    def divisors() -> np.ndarray:
        import numpy as np

        return np.array(config.rotary_divisors)

    scaled = config.rope_scaling is not None and config.rope_scaling.rope_type == "llama3"
    rows = (
        *ROWS,
        TIED_HEAD if config.tie_word_embeddings else HEAD,
        # llama.cpp knows no other way to say how Llama 3.1 scales its frequencies.
        *([Buffer({"gguf": "rope_freqs.weight"}, divisors)] if scaled else []),
    )
    return WeightMap(
        rows=with_flax(rows, scale="weight"),  # what transformers' Flax class called a norm's scale
        sizes={
            "V": config.vocab_size,
            "D": config.hidden_size,
            "F": config.intermediate_size,
            "N": config.num_attention_heads,
            "K": config.num_key_value_heads,
            "H": config.head_dim,
            "r": 2,
            "h": config.head_dim // 2,
        },
        counts={"i": config.num_hidden_layers},
        modules=MODULES,
    )
