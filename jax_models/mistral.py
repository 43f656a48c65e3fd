"""Mistral in Flax NNX: LLaMA's block, in which a token sees the last `sliding_window` positions alone.

Jiang et al. 2023 (arXiv:2310.06825). What lies farther back comes through the layers below: each one looks a
window farther. So a cache needs slots for the window and one call's tokens only, and comes round. Axes: B
batch, T query length, S key length, D hidden, N query heads, K key-value heads, H head dimension,
F feed-forward, V vocabulary, L layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jax_models.layers import (
    Context,
    KVCache,
    Linear,
    RMSNorm,
    attend,
    constrain,
    empty_cache,
    place,
    rotary_angles,
    rotate,
    store,
    visible,
)
from twinformers.configs.mistral import MistralConfig


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; the mask holds the window. [B, T, D] -> same"""

    def __init__(self, config: MistralConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        D, N, K, H = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.head_dim = H
        self.attend = attend  # `fused.use_attention` puts another here
        # vs torch: a kernel is [in, out], and initial values come from an explicit random key
        self.q_proj = Linear(D, N * H, use_bias=False, param_dtype=dtype, rngs=rngs)
        self.k_proj = Linear(D, K * H, use_bias=False, param_dtype=dtype, rngs=rngs)
        self.v_proj = Linear(D, K * H, use_bias=False, param_dtype=dtype, rngs=rngs)
        self.o_proj = Linear(N * H, D, use_bias=False, param_dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, context: Context, cache: KVCache | None, i: int
    ) -> tuple[jax.Array, KVCache | None]:
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


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202). [B, T, D] -> same"""

    def __init__(self, config: MistralConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, F, use_bias=False, param_dtype=dtype, rngs=rngs)
        self.up_proj = Linear(D, F, use_bias=False, param_dtype=dtype, rngs=rngs)
        self.down_proj = Linear(F, D, use_bias=False, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)  # [B, T, F]
        return self.down_proj(x)  # [B, T, D]


class Block(nnx.Module):
    """Normalise, mix, add; twice: over the sequence, then over the features. [B, T, D] -> same"""

    def __init__(self, config: MistralConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, context: Context, cache: KVCache | None, i: int
    ) -> tuple[jax.Array, KVCache | None]:
        mixed, cache = self.attn(self.attn_norm(x), context, cache, i)
        x = constrain(x + mixed, "residual")
        x = constrain(x + self.mlp(self.mlp_norm(x)), "residual")
        return x, cache


class Mistral(nnx.Module):
    """The language model: `logits, cache = model(tokens, positions, cache)`.

    `tokens` int32 [B, T]; `positions` int32 [B, T], each token's position in its own sequence and -1 for
    padding, wherever it stands; logits [B, T, V] in the parameters' dtype. With a cache the call sees the
    keys of earlier calls and returns the cache with its own added: rebind it, the old one is consumed.
    Without one, the call is a full causal pass. Outputs at padding are finite and mean nothing.
    UsageError for a call longer than a cache that comes round has room for (`MistralConfig.longest_call`).
    """

    def __init__(self, config: MistralConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, param_dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [Block(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                config.hidden_size, config.vocab_size, use_bias=False, param_dtype=dtype, rngs=rngs
            )

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: KVCache | None = None,
        *,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        x, cache = self.hidden(tokens, positions, cache, key=key)
        return self.head(x), cache

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: KVCache | None = None,
        *,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
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

    def head(self, x: jax.Array) -> jax.Array:
        """Logits, with the embedding itself as the matrix where the two are tied. [B, T, D] -> [B, T, V]"""
        return self.embed.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)

    def empty_cache(self, batch: int, length: int) -> KVCache:
        """A cache for `batch` sequences of up to `length` positions, fewer slots where a window allows."""
        c, table = self.config, self.embed.embedding
        return empty_cache(
            c.num_hidden_layers,
            batch,
            c.cache_slots(length),
            c.num_key_value_heads,
            c.head_dim,
            dtype=table.dtype,
        )
