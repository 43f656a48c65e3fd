"""GPT-2 in PyTorch: pre-norm with biases, learned positions, GELU, the embedding as the head.

Radford et al. 2019. Axes: B batch, T query length, S key length, D hidden, N heads, H head dimension,
F feed-forward, V vocabulary, P positions, L layers.
"""

from __future__ import annotations

import torch
from torch import nn

from torch_models.layers import (
    ACTIVATIONS,
    KVCache,
    LayerNorm,
    Linear,
    attend,
    constrain,
    dropout,
    empty_cache,
    linear,
    place,
    store,
    subkey,
    visible,
)
from twinformers.configs.gpt2 import GPT2Config


class Attention(nn.Module):
    """Causal multi-head self-attention. [B, T, D] -> same"""

    def __init__(self, config: GPT2Config, *, dtype: torch.dtype):
        super().__init__()
        D = config.hidden_size
        self.head_dim = config.head_dim
        self.attend = attend  # `fused.use_attention` puts another here
        self.dropout = config.attn_pdrop
        # vs jax: a weight is [out, in], and initial values come from the global generator
        self.q_proj = Linear(D, D, dtype=dtype)
        self.k_proj = Linear(D, D, dtype=dtype)
        self.v_proj = Linear(D, D, dtype=dtype)
        self.o_proj = Linear(D, D, dtype=dtype)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor,
        slots: torch.Tensor | None,
        cache: KVCache | None,
        i: int,
        key: torch.Tensor | None,
    ) -> tuple[torch.Tensor, KVCache | None]:
        B, T, _ = x.shape
        q = self.q_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, N, H]
        k = self.k_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, N, H]
        v = self.v_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, N, H]
        if cache is not None and slots is not None:
            cache, k, v = store(cache, i, slots, k, v)  # [B, S+1, N, H]
        x = self.attend(q, k, v, mask, rate=self.dropout, key=key)  # [B, T, N, H]
        return self.o_proj(x.reshape(B, T, -1)), cache  # [B, T, D]


class MLP(nn.Module):
    """gelu(x W1 + b1) W2 + b2 (Hendrycks & Gimpel 2016, arXiv:1606.08415). [B, T, D] -> same"""

    def __init__(self, config: GPT2Config, *, dtype: torch.dtype):
        super().__init__()
        self.activation = config.activation_function
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, dtype=dtype)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = ACTIVATIONS[self.activation](self.fc1(x))  # [B, T, F]
        return self.fc2(x)  # [B, T, D]


class Block(nn.Module):
    """Normalise, mix, drop, add; twice: over the sequence, then over the features. [B, T, D] -> same"""

    def __init__(self, config: GPT2Config, *, dtype: torch.dtype):
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_epsilon
        self.dropout = config.resid_pdrop
        self.attn_norm = LayerNorm(D, eps, dtype=dtype)
        self.attn = Attention(config, dtype=dtype)
        self.mlp_norm = LayerNorm(D, eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor,
        slots: torch.Tensor | None,
        cache: KVCache | None,
        i: int,
        key: torch.Tensor | None,
    ) -> tuple[torch.Tensor, KVCache | None]:
        mixed, cache = self.attn(self.attn_norm(x), mask, slots, cache, i, subkey(key, 0))
        x = constrain(x + dropout(mixed, self.dropout, subkey(key, 1)), "residual")
        mixed = self.mlp(self.mlp_norm(x))
        x = constrain(x + dropout(mixed, self.dropout, subkey(key, 2)), "residual")
        return x, cache


class GPT2(nn.Module):
    """The language model: `logits, cache = model(tokens, positions, cache)`.

    `tokens` int32 [B, T]; `positions` int32 [B, T], below P, each token's position in its own sequence and -1
    for padding, wherever it stands; logits [B, T, V] in the parameters' dtype. With a cache the call sees the
    keys of earlier calls and returns the cache with its own added: rebind it, the old one is consumed.
    Outputs at padding are finite and mean nothing. `key` seeds dropout: layers fold in their index, the
    embeddings count on.
    """

    def __init__(self, config: GPT2Config, *, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size, dtype=dtype)
        self.position_embed = nn.Embedding(c.max_position_embeddings, c.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList([Block(c, dtype=dtype) for _ in range(c.num_hidden_layers)])
        self.norm = LayerNorm(c.hidden_size, c.layer_norm_epsilon, dtype=dtype)
        if not c.tie_word_embeddings:
            self.lm_head = Linear(c.hidden_size, c.vocab_size, bias=False, dtype=dtype)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache | None = None,
        *,
        key: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, KVCache | None]:
        x, cache = self.hidden(tokens, positions, cache, key=key)
        return self.head(x), cache

    def hidden(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache | None = None,
        *,
        key: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, KVCache | None]:
        """Everything below the head. [B, T] -> [B, T, D]"""
        c = self.config
        x = self.embed(tokens) + self.position_embed(positions.clamp(min=0))  # [B, T, D]
        x = constrain(dropout(x, c.embd_pdrop, subkey(key, c.num_hidden_layers)), "residual")
        slots, key_positions = None, positions
        if cache is not None:
            slots, cache = place(positions, cache)
            key_positions = cache.positions
        mask = visible(positions, key_positions)  # [B, T, S]
        for i, layer in enumerate(self.layers):
            x, cache = layer(x, mask, slots, cache, i, subkey(key, i))
        return self.norm(x), cache

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, with the embedding itself as the matrix where the two are tied. [B, T, D] -> [B, T, V]"""
        return linear(x, self.embed.weight) if self.config.tie_word_embeddings else self.lm_head(x)

    def empty_cache(self, batch: int, length: int) -> KVCache:
        """A cache for `batch` sequences of up to `length` positions."""
        c, table = self.config, self.embed.weight
        return empty_cache(
            c.num_hidden_layers,
            batch,
            length,
            c.num_attention_heads,
            c.head_dim,
            dtype=table.dtype,
            device=table.device,
        )
