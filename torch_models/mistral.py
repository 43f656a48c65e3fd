"""Mistral in PyTorch: LLaMA's block, in which a token sees the last `sliding_window` positions alone.

Jiang et al. 2023 (arXiv:2310.06825). What lies farther back comes through the layers below: each one looks a
window farther. So a cache needs slots for the window and one call's tokens only, and comes round. Axes: B
batch, T query length, S key length, D hidden, N query heads, K key-value heads, H head dimension,
F feed-forward, V vocabulary, L layers.
"""

from __future__ import annotations

import torch
from torch import nn

from torch_models.layers import (
    Context,
    KVCache,
    Linear,
    RMSNorm,
    attend,
    constrain,
    empty_cache,
    linear,
    place,
    rotary_angles,
    rotate,
    store,
    visible,
)
from twinformers.configs.mistral import MistralConfig


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; the mask holds the window. [B, T, D] -> same"""

    def __init__(self, config: MistralConfig, *, dtype: torch.dtype):
        super().__init__()
        D, N, K, H = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.head_dim = H
        self.attend = attend  # `fused.use_attention` puts another here
        # vs jax: a weight is [out, in], and initial values come from the global generator
        self.q_proj = Linear(D, N * H, bias=False, dtype=dtype)
        self.k_proj = Linear(D, K * H, bias=False, dtype=dtype)
        self.v_proj = Linear(D, K * H, bias=False, dtype=dtype)
        self.o_proj = Linear(N * H, D, bias=False, dtype=dtype)

    def forward(
        self, x: torch.Tensor, context: Context, cache: KVCache | None, i: int
    ) -> tuple[torch.Tensor, KVCache | None]:
        B, T, _ = x.shape
        q = self.q_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, N, H]
        k = self.k_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, K, H]
        v = self.v_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, K, H]
        q = rotate(q, context.cos, context.sin)
        k = rotate(k, context.cos, context.sin)
        if cache is not None and context.slots is not None:
            cache, k, v = store(cache, i, context.slots, k, v)  # [B, S+1, K, H]
        x = self.attend(q, k, v, context.mask)  # [B, T, N, H]
        return self.o_proj(x.reshape(B, T, -1)), cache  # [B, T, D]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202). [B, T, D] -> same"""

    def __init__(self, config: MistralConfig, *, dtype: torch.dtype):
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, F, bias=False, dtype=dtype)
        self.up_proj = Linear(D, F, bias=False, dtype=dtype)
        self.down_proj = Linear(F, D, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)  # [B, T, F]
        return self.down_proj(x)  # [B, T, D]


class Block(nn.Module):
    """Normalise, mix, add; twice: over the sequence, then over the features. [B, T, D] -> same"""

    def __init__(self, config: MistralConfig, *, dtype: torch.dtype):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.attn = Attention(config, dtype=dtype)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype)

    def forward(
        self, x: torch.Tensor, context: Context, cache: KVCache | None, i: int
    ) -> tuple[torch.Tensor, KVCache | None]:
        mixed, cache = self.attn(self.attn_norm(x), context, cache, i)
        x = constrain(x + mixed, "residual")
        x = constrain(x + self.mlp(self.mlp_norm(x)), "residual")
        return x, cache


class Mistral(nn.Module):
    """The language model: `logits, cache = model(tokens, positions, cache)`.

    `tokens` int32 [B, T]; `positions` int32 [B, T], each token's position in its own sequence and -1 for
    padding, wherever it stands; logits [B, T, V] in the parameters' dtype. With a cache the call sees the
    keys of earlier calls and returns the cache with its own added: rebind it, the old one is consumed.
    Without one, the call is a full causal pass. Outputs at padding are finite and mean nothing.
    UsageError for a call longer than a cache that comes round has room for (`MistralConfig.longest_call`).
    """

    def __init__(self, config: MistralConfig, *, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList([Block(config, dtype=dtype) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)

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
        """Everything below the head. [B, T] -> [B, T, D]. `key` seeds dropout, which there is none of."""
        x = constrain(self.embed(tokens), "residual")  # [B, T, D]
        slots, key_positions, window = None, positions, self.config.sliding_window
        if cache is not None:
            # A cache for whole sequences never comes round, so that a call of any length may fill it.
            ring = self.config.longest_call(cache.positions.shape[1] - 1) is not None
            slots, cache = place(positions, cache, window if ring else None)
            key_positions = cache.positions
        cos, sin = rotary_angles(positions, self.config.rotary_frequencies, x.dtype)
        context = Context(cos, sin, slots, visible(positions, key_positions, window))
        for i, layer in enumerate(self.layers):
            x, cache = layer(x, context, cache, i)
        return self.norm(x), cache

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, with the embedding itself as the matrix where the two are tied. [B, T, D] -> [B, T, V]"""
        return linear(x, self.embed.weight) if self.config.tie_word_embeddings else self.lm_head(x)

    def empty_cache(self, batch: int, length: int) -> KVCache:
        """A cache for `batch` sequences of up to `length` positions, fewer slots where a window allows."""
        c, table = self.config, self.embed.weight
        return empty_cache(
            c.num_hidden_layers,
            batch,
            c.cache_slots(length),
            c.num_key_value_heads,
            c.head_dim,
            dtype=table.dtype,
            device=table.device,
        )
