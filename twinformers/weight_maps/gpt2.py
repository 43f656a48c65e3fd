"""GPT-2's tensors, one row each.

Hugging Face's files keep OpenAI's layout: a matrix is [in, out], and one of them holds queries, keys and
values side by side. GGUF has the three in one too, as [out, in]; the twins have three matrices.
"""

from __future__ import annotations

from twinformers.configs.gpt2 import GPT2Config
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

HF = "transformer.h.{i}"
GGUF = "blk.{i}"
TOGETHER = "[N H | N H | N H]"


def _projection(name: str, part: int) -> tuple[Row, Row]:
    """One of the three that a head needs, out of the matrix and the biases of all."""
    return (
        Linear(
            f"layers.{{i}}.attn.{name}",
            "(N H) D",
            hf=(f"{HF}.attn.c_attn.weight", f"D ({TOGETHER})", part),
            gguf=(f"{GGUF}.attn_qkv.weight", f"({TOGETHER}) D", part),
        ),
        Bias(
            f"layers.{{i}}.attn.{name}",
            "(N H)",
            hf=(f"{HF}.attn.c_attn.bias", f"({TOGETHER})", part),
            gguf=(f"{GGUF}.attn_qkv.bias", f"({TOGETHER})", part),
        ),
    )


def _linear(path: str, axes: str, into: str, hf: str, gguf: str) -> tuple[Row, Row]:
    """A matrix with its bias; `into` are Hugging Face's axes."""
    return (
        Linear(path, axes, hf=(f"{hf}.weight", into), gguf=f"{gguf}.weight"),
        Bias(path, axes.split()[0], hf=f"{hf}.bias", gguf=f"{gguf}.bias"),
    )


def _norm(path: str, hf: str, gguf: str) -> tuple[Row, Row]:
    return (
        Norm(path, "D", hf=f"{hf}.weight", gguf=f"{gguf}.weight"),
        Bias(path, "D", hf=f"{hf}.bias", gguf=f"{gguf}.bias"),
    )


ROWS: tuple[Row | Buffer, ...] = (
    Embedding("embed", "V D", hf="transformer.wte.weight", gguf="token_embd.weight"),
    Embedding("position_embed", "P D", hf="transformer.wpe.weight", gguf="position_embd.weight"),
    *_norm("layers.{i}.attn_norm", f"{HF}.ln_1", f"{GGUF}.attn_norm"),
    *_projection("q_proj", 0),
    *_projection("k_proj", 1),
    *_projection("v_proj", 2),
    *_linear("layers.{i}.attn.o_proj", "D (N H)", "(N H) D", f"{HF}.attn.c_proj", f"{GGUF}.attn_output"),
    *_norm("layers.{i}.mlp_norm", f"{HF}.ln_2", f"{GGUF}.ffn_norm"),
    *_linear("layers.{i}.mlp.fc1", "F D", "D F", f"{HF}.mlp.c_fc", f"{GGUF}.ffn_up"),
    *_linear("layers.{i}.mlp.fc2", "D F", "F D", f"{HF}.mlp.c_proj", f"{GGUF}.ffn_down"),
    *_norm("norm", "transformer.ln_f", "output_norm"),
    # Masks that versions of transformers up to 4.28 wrote.
    Buffer({"hf": f"{HF}.attn.bias"}),
    Buffer({"hf": f"{HF}.attn.masked_bias"}),
)
HEAD = Linear("lm_head", "V D", hf="lm_head.weight", gguf="output.weight")
TIED_HEAD = Tied(
    {"hf": "lm_head.weight", "gguf": "output.weight"},
    to={"hf": "transformer.wte.weight", "gguf": "token_embd.weight"},
)
#: Submodules without a row of their own, by our path and Hugging Face's.
MODULES = {"layers.{i}": HF, "layers.{i}.attn": f"{HF}.attn", "layers.{i}.mlp": f"{HF}.mlp"}


def weight_map(config: GPT2Config) -> WeightMap:
    """The table for one configuration: the letters are those of the design page."""
    rows = (*ROWS, TIED_HEAD if config.tie_word_embeddings else HEAD)
    return WeightMap(
        # transformers' Flax class stored its matrices [out, in], the reverse of its PyTorch class.
        rows=with_flax(rows),
        sizes={
            "V": config.vocab_size,
            "P": config.max_position_embeddings,
            "D": config.hidden_size,
            "F": config.intermediate_size,
            "N": config.num_attention_heads,
            "H": config.head_dim,
        },
        counts={"i": config.num_hidden_layers},
        modules=MODULES,
    )
