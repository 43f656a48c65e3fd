"""The Transformer in Flax NNX: encoder and decoder, post-norm, sinusoidal positions, shared embeddings.

Vaswani et al. 2017 (arXiv:1706.03762), whose section numbers these are. Axes: B batch, T query length,
S key length, D model, N heads, H head dimension, F feed-forward, V vocabulary, L layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jax_models.layers import (
    ACTIVATIONS,
    CrossCache,
    KVCache,
    LayerNorm,
    Linear,
    at_least_float32,
    attend,
    constrain,
    dropout,
    empty_cache,
    place,
    store,
    subkey,
    visible,
)
from twinformers.configs.transformer import TransformerConfig


def sinusoids(positions: jax.Array, config: TransformerConfig, dtype: jnp.dtype) -> jax.Array:
    """Sine and cosine of position times frequency (section 3.5). [B, T] -> [B, T, D]

    Interleaved is the paper's order, (sin, cos) side by side; otherwise all sines come first.
    """
    wide = at_least_float32(dtype)  # bfloat16 cannot hold position 257
    frequencies = jnp.asarray(config.position_frequencies, wide)  # [D/2]
    angles = (positions + config.position_offset)[:, :, None].astype(wide) * frequencies  # [B, T, D/2]
    pair = -1 if config.positions_interleaved else -2
    waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=pair)  # [B, T, D/2, 2] or [B, T, 2, D/2]
    return waves.reshape(*positions.shape, config.d_model).astype(dtype)  # [B, T, D]


class Attention(nnx.Module):
    """Multi-head attention (section 3.2.2): queries from one sequence, keys and values from any."""

    def __init__(self, config: TransformerConfig, heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        D = config.d_model
        self.head_dim, self.attend = D // heads, attend  # `fused.use_attention` puts another here
        self.dropout = config.attention_dropout
        # vs torch: a kernel is [in, out], and initial values come from an explicit random key
        self.q_proj = Linear(D, D, param_dtype=dtype, rngs=rngs)
        self.k_proj = Linear(D, D, param_dtype=dtype, rngs=rngs)
        self.v_proj = Linear(D, D, param_dtype=dtype, rngs=rngs)
        self.o_proj = Linear(D, D, param_dtype=dtype, rngs=rngs)

    def keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What a sequence offers to those who attend to it. [B, S, D] -> 2 x [B, S, N, H]"""
        shape = (*x.shape[:2], -1, self.head_dim)
        return self.k_proj(x).reshape(shape), self.v_proj(x).reshape(shape)

    def __call__(
        self, x: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        B, T, _ = x.shape
        q = self.q_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, N, H]
        x = self.attend(q, k, v, mask, rate=self.dropout, key=key)  # [B, T, N, H]
        return self.o_proj(x.reshape(B, T, -1))  # [B, T, D]


class MLP(nnx.Module):
    """max(0, x W1 + b1) W2 + b2 (section 3.3). [B, T, D] -> same"""

    def __init__(self, config: TransformerConfig, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.activation = config.activation_function
        self.dropout = config.activation_dropout
        self.fc1 = Linear(config.d_model, width, param_dtype=dtype, rngs=rngs)
        self.fc2 = Linear(width, config.d_model, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        x = dropout(ACTIVATIONS[self.activation](self.fc1(x)), self.dropout, key)  # [B, T, F]
        return self.fc2(x)  # [B, T, D]


class EncoderLayer(nnx.Module):
    """LayerNorm(x + sublayer(x)), twice: attention, then the features (section 3.1). [B, S, D] -> same"""

    def __init__(self, config: TransformerConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        D, eps = config.d_model, config.layer_norm_eps
        self.dropout = config.dropout
        self.self_attn = Attention(config, config.encoder_attention_heads, dtype=dtype, rngs=rngs)
        self.self_attn_norm = LayerNorm(D, eps, dtype=dtype)
        self.mlp = MLP(config, config.encoder_ffn_dim, dtype=dtype, rngs=rngs)
        self.mlp_norm = LayerNorm(D, eps, dtype=dtype)

    def __call__(self, x: jax.Array, mask: jax.Array, key: jax.Array | None) -> jax.Array:
        mixed = self.self_attn(x, *self.self_attn.keys_values(x), mask, subkey(key, 0))
        x = constrain(self.self_attn_norm(x + dropout(mixed, self.dropout, subkey(key, 1))), "residual")
        mixed = self.mlp(x, subkey(key, 2))
        return constrain(self.mlp_norm(x + dropout(mixed, self.dropout, subkey(key, 3))), "residual")


class DecoderLayer(nnx.Module):
    """The same with three sub-layers: the target's own past, the source, the features. [B, T, D] -> same"""

    def __init__(self, config: TransformerConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        D, eps = config.d_model, config.layer_norm_eps
        self.dropout = config.dropout
        self.self_attn = Attention(config, config.decoder_attention_heads, dtype=dtype, rngs=rngs)
        self.self_attn_norm = LayerNorm(D, eps, dtype=dtype)
        self.cross_attn = Attention(config, config.decoder_attention_heads, dtype=dtype, rngs=rngs)
        self.cross_attn_norm = LayerNorm(D, eps, dtype=dtype)
        self.mlp = MLP(config, config.decoder_ffn_dim, dtype=dtype, rngs=rngs)
        self.mlp_norm = LayerNorm(D, eps, dtype=dtype)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        cross: CrossCache,
        slots: jax.Array | None,
        cache: KVCache | None,
        i: int,
        key: jax.Array | None,
    ) -> tuple[jax.Array, KVCache | None]:
        k, v = self.self_attn.keys_values(x)  # 2 x [B, T, N, H]
        if cache is not None and slots is not None:
            cache, k, v = store(cache, i, slots, k, v)  # [B, S+1, N, H]
        mixed = self.self_attn(x, k, v, mask, subkey(key, 0))
        x = constrain(self.self_attn_norm(x + dropout(mixed, self.dropout, subkey(key, 1))), "residual")
        seen = (cross.positions >= 0)[:, None, :]  # [B, 1, S], the same for every query
        mixed = self.cross_attn(x, cross.k[i], cross.v[i], seen, subkey(key, 2))
        x = constrain(self.cross_attn_norm(x + dropout(mixed, self.dropout, subkey(key, 3))), "residual")
        mixed = self.mlp(x, subkey(key, 4))
        x = constrain(self.mlp_norm(x + dropout(mixed, self.dropout, subkey(key, 5))), "residual")
        return x, cache


class Transformer(nnx.Module):
    """The translation model: `logits, cache = model(source, source_positions, tokens, positions)`.

    Tokens int32 [B, S] and [B, T]; positions alike, each token's in its own sequence and -1 for padding,
    wherever it stands; logits [B, T, V] in the parameters' dtype. To generate, call `encode` and then
    `cross_cache` once, and `decode` with a cache, which it consumes and returns. Outputs at padding mean
    nothing. `key` seeds dropout: encoder layers fold in their index, decoder layers and embeddings count on.
    """

    def __init__(self, config: TransformerConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = c = config
        D, V = c.d_model, c.target_vocab_size
        self.embed = nnx.Embed(V, D, param_dtype=dtype, rngs=rngs)
        if not c.share_embeddings:
            self.source_embed = nnx.Embed(c.source_vocab_size, D, param_dtype=dtype, rngs=rngs)
        self.encoder = nnx.List([EncoderLayer(c, dtype=dtype, rngs=rngs) for _ in range(c.encoder_layers)])
        self.decoder = nnx.List([DecoderLayer(c, dtype=dtype, rngs=rngs) for _ in range(c.decoder_layers)])
        if not c.tie_word_embeddings:
            self.lm_head = Linear(D, V, use_bias=False, param_dtype=dtype, rngs=rngs)
        if c.final_logits_bias:
            # vs torch: a Variable that is no Param; its gradient is stopped below
            self.final_logits_bias = nnx.Variable(jnp.zeros((1, V), dtype))

    def __call__(
        self,
        source: jax.Array,
        source_positions: jax.Array,
        tokens: jax.Array,
        positions: jax.Array,
        *,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        memory = self.encode(source, source_positions, key=key)
        return self.decode(tokens, positions, self.cross_cache(memory, source_positions), key=key)

    def _place(self, x: jax.Array, positions: jax.Array, key: jax.Array | None) -> jax.Array:
        """Embeddings scaled, positions added (sections 3.4 and 3.5). [B, T, D] -> same"""
        if self.config.scale_embedding:
            x = x * self.config.d_model**0.5
        x = x + sinusoids(positions, self.config, x.dtype)
        return constrain(dropout(x, self.config.dropout, key), "residual")

    def encode(
        self, source: jax.Array, source_positions: jax.Array, *, key: jax.Array | None = None
    ) -> jax.Array:
        """The source, each token aware of all others. [B, S] -> [B, S, D]"""
        c = self.config
        x = self.embed(source) if c.share_embeddings else self.source_embed(source)  # [B, S, D]
        x = self._place(x, source_positions, subkey(key, c.encoder_layers + c.decoder_layers))
        mask = visible(source_positions, source_positions, causal=False)  # [B, S, S]
        for i, layer in enumerate(self.encoder):
            x = layer(x, mask, subkey(key, i))
        return x

    def cross_cache(self, memory: jax.Array, source_positions: jax.Array) -> CrossCache:
        """The keys and values that every decoder layer takes from the encoder's output. [B, S, D], [B, S]"""
        pairs = [layer.cross_attn.keys_values(memory) for layer in self.decoder]
        k, v = (jnp.stack(arrays) for arrays in zip(*pairs, strict=True))  # 2 x [L, B, S, N, H]
        return CrossCache(k, v, source_positions)

    def decode(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cross: CrossCache,
        cache: KVCache | None = None,
        *,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        x, cache = self.decode_hidden(tokens, positions, cross, cache, key=key)
        return self.head(x), cache

    def decode_hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cross: CrossCache,
        cache: KVCache | None = None,
        *,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """The decoder below the head. [B, T] -> [B, T, D]"""
        c = self.config
        x = self._place(self.embed(tokens), positions, subkey(key, c.encoder_layers + c.decoder_layers + 1))
        slots, key_positions = None, positions
        if cache is not None:
            slots, cache = place(positions, cache)
            key_positions = cache.positions
        mask = visible(positions, key_positions)  # [B, T, S]
        for i, layer in enumerate(self.decoder):
            x, cache = layer(x, mask, cross, slots, cache, i, subkey(key, c.encoder_layers + i))
        return x, cache

    def head(self, x: jax.Array) -> jax.Array:
        """Logits, with the embedding itself as the matrix where the two are tied. [B, T, D] -> [B, T, V]"""
        c = self.config
        logits = self.embed.attend(x) if c.tie_word_embeddings else self.lm_head(x)
        return logits + jax.lax.stop_gradient(self.final_logits_bias[...]) if c.final_logits_bias else logits

    def empty_cache(self, batch: int, length: int) -> KVCache:
        """A cache for `batch` target sequences of up to `length` positions."""
        c, N = self.config, self.config.decoder_attention_heads
        return empty_cache(
            c.decoder_layers, batch, length, N, c.d_model // N, dtype=self.embed.embedding.dtype
        )
