"""GPT-2 in Flax NNX: pre-norm with biases, learned positions, GELU, the embedding as the head.

Radford et al. 2019. Axes: B batch, T query length, S key length, D hidden, N heads, H head dimension,
F feed-forward, V vocabulary, P positions, L layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jax_models.layers import (
    ACTIVATIONS,
    KVCache,
    LayerNorm,
    Linear,
    attend,
    constrain,
    dropout,
    empty_cache,
    place,
    store,
    subkey,
    visible,
)
from twinformers.configs.gpt2 import GPT2Config


class Attention(nnx.Module):
    """Causal multi-head self-attention. [B, T, D] -> same"""

    def __init__(self, config: GPT2Config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        D = config.hidden_size
        self.head_dim = config.head_dim
        self.attend = attend  # `fused.use_attention` puts another here
        self.dropout = config.attn_pdrop
        # vs torch: a kernel is [in, out], and initial values come from an explicit random key
        self.q_proj = Linear(D, D, param_dtype=dtype, rngs=rngs)
        self.k_proj = Linear(D, D, param_dtype=dtype, rngs=rngs)
        self.v_proj = Linear(D, D, param_dtype=dtype, rngs=rngs)
        self.o_proj = Linear(D, D, param_dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        slots: jax.Array | None,
        cache: KVCache | None,
        i: int,
        key: jax.Array | None,
    ) -> tuple[jax.Array, KVCache | None]:
        B, T, _ = x.shape
        q = self.q_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, N, H]
        k = self.k_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, N, H]
        v = self.v_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, N, H]
        if cache is not None and slots is not None:
            cache, k, v = store(cache, i, slots, k, v)  # [B, S+1, N, H]
        x = self.attend(q, k, v, mask, rate=self.dropout, key=key)  # [B, T, N, H]
        return self.o_proj(x.reshape(B, T, -1)), cache  # [B, T, D]


class MLP(nnx.Module):
    """gelu(x W1 + b1) W2 + b2 (Hendrycks & Gimpel 2016, arXiv:1606.08415). [B, T, D] -> same"""

    def __init__(self, config: GPT2Config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.activation = config.activation_function
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, param_dtype=dtype, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = ACTIVATIONS[self.activation](self.fc1(x))  # [B, T, F]
        return self.fc2(x)  # [B, T, D]


class Block(nnx.Module):
    """Normalise, mix, drop, add; twice: over the sequence, then over the features. [B, T, D] -> same"""

    def __init__(self, config: GPT2Config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        D, eps = config.hidden_size, config.layer_norm_epsilon
        self.dropout = config.resid_pdrop
        self.attn_norm = LayerNorm(D, eps, dtype=dtype)
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = LayerNorm(D, eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        slots: jax.Array | None,
        cache: KVCache | None,
        i: int,
        key: jax.Array | None,
    ) -> tuple[jax.Array, KVCache | None]:
        mixed, cache = self.attn(self.attn_norm(x), mask, slots, cache, i, subkey(key, 0))
        x = constrain(x + dropout(mixed, self.dropout, subkey(key, 1)), "residual")
        mixed = self.mlp(self.mlp_norm(x))
        x = constrain(x + dropout(mixed, self.dropout, subkey(key, 2)), "residual")
        return x, cache


class GPT2(nnx.Module):
    """The language model: `logits, cache = model(tokens, positions, cache)`.

    `tokens` int32 [B, T]; `positions` int32 [B, T], below P, each token's position in its own sequence and -1
    for padding, wherever it stands; logits [B, T, V] in the parameters' dtype. With a cache the call sees the
    keys of earlier calls and returns the cache with its own added: rebind it, the old one is consumed.
    Outputs at padding are finite and mean nothing. `key` seeds dropout: layers fold in their index, the
    embeddings count on.
    """

    def __init__(self, config: GPT2Config, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = c = config
        self.embed = nnx.Embed(c.vocab_size, c.hidden_size, param_dtype=dtype, rngs=rngs)
        self.position_embed = nnx.Embed(
            c.max_position_embeddings, c.hidden_size, param_dtype=dtype, rngs=rngs
        )
        self.layers = nnx.List([Block(c, dtype=dtype, rngs=rngs) for _ in range(c.num_hidden_layers)])
        self.norm = LayerNorm(c.hidden_size, c.layer_norm_epsilon, dtype=dtype)
        if not c.tie_word_embeddings:
            self.lm_head = Linear(c.hidden_size, c.vocab_size, use_bias=False, param_dtype=dtype, rngs=rngs)

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
        """Everything below the head. [B, T] -> [B, T, D]"""
        c = self.config
        x = self.embed(tokens) + self.position_embed(jnp.maximum(positions, 0))  # [B, T, D]
        x = constrain(dropout(x, c.embd_pdrop, subkey(key, c.num_hidden_layers)), "residual")
        slots, key_positions = None, positions
        if cache is not None:
            slots, cache = place(positions, cache)
            key_positions = cache.positions
        mask = visible(positions, key_positions)  # [B, T, S]
        for i, layer in enumerate(self.layers):
            x, cache = layer(x, mask, slots, cache, i, subkey(key, i))
        return self.norm(x), cache

    def head(self, x: jax.Array) -> jax.Array:
        """Logits, with the embedding itself as the matrix where the two are tied. [B, T, D] -> [B, T, V]"""
        return self.embed.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)

    def empty_cache(self, batch: int, length: int) -> KVCache:
        """A cache for `batch` sequences of up to `length` positions."""
        c, table = self.config, self.embed.embedding
        return empty_cache(
            c.num_hidden_layers, batch, length, c.num_attention_heads, c.head_dim, dtype=table.dtype
        )
