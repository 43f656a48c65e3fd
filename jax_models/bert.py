"""BERT in Flax NNX: an encoder, post-norm with biases, learned positions and segments, GELU.

Devlin et al. 2018 (arXiv:1810.04805). Axes: B batch, T length, D hidden, N heads, H head dimension,
F feed-forward, V vocabulary, P positions, U segments, L layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jax_models.layers import (
    ACTIVATIONS,
    LayerNorm,
    Linear,
    at_least_float32,
    attend,
    constrain,
    dropout,
    subkey,
    visible,
)
from twinformers.configs.bert import BertConfig


class Attention(nnx.Module):
    """Multi-head self-attention in which every token sees all others. [B, T, D] -> same"""

    def __init__(self, config: BertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        D = config.hidden_size
        self.head_dim = config.head_dim
        self.attend = attend  # `fused.use_attention` puts another here
        self.dropout = config.attention_probs_dropout_prob
        # vs torch: a kernel is [in, out], and initial values come from an explicit random key
        self.q_proj = Linear(D, D, param_dtype=dtype, rngs=rngs)
        self.k_proj = Linear(D, D, param_dtype=dtype, rngs=rngs)
        self.v_proj = Linear(D, D, param_dtype=dtype, rngs=rngs)
        self.o_proj = Linear(D, D, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, key: jax.Array | None) -> jax.Array:
        B, T, _ = x.shape
        q = self.q_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, N, H]
        k = self.k_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, N, H]
        v = self.v_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, N, H]
        x = self.attend(q, k, v, mask, rate=self.dropout, key=key)  # [B, T, N, H]
        return self.o_proj(x.reshape(B, T, -1))  # [B, T, D]


class MLP(nnx.Module):
    """gelu(x W1 + b1) W2 + b2 (Hendrycks & Gimpel 2016, arXiv:1606.08415). [B, T, D] -> same"""

    def __init__(self, config: BertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.activation = config.hidden_act
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, param_dtype=dtype, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = ACTIVATIONS[self.activation](self.fc1(x))  # [B, T, F]
        return self.fc2(x)  # [B, T, D]


class Block(nnx.Module):
    """Mix, drop, add, normalise; twice: over the sequence, then over the features. [B, T, D] -> same"""

    def __init__(self, config: BertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        D, eps = config.hidden_size, config.layer_norm_eps
        self.dropout = config.hidden_dropout_prob
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.attn_norm = LayerNorm(D, eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = LayerNorm(D, eps, dtype=dtype)

    def __call__(self, x: jax.Array, mask: jax.Array, key: jax.Array | None) -> jax.Array:
        mixed = self.attn(x, mask, subkey(key, 0))
        x = constrain(self.attn_norm(x + dropout(mixed, self.dropout, subkey(key, 1))), "residual")
        mixed = self.mlp(x)
        return constrain(self.mlp_norm(x + dropout(mixed, self.dropout, subkey(key, 2))), "residual")


class MaskedLMHead(nnx.Module):
    """Which token stood there: one more layer, then the table of tokens. [B, T, D] -> [B, T, V]"""

    def __init__(self, config: BertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        D = config.hidden_size
        self.activation = config.hidden_act
        self.transform = Linear(D, D, param_dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(D, config.layer_norm_eps, dtype=dtype)
        # vs torch: a leaf is a Param that wraps the array
        self.bias = nnx.Param(jnp.zeros(config.vocab_size, dtype))

    def __call__(self, x: jax.Array, embed: nnx.Embed) -> jax.Array:
        x = self.norm(ACTIVATIONS[self.activation](self.transform(x)))  # [B, T, D]
        return embed.attend(x) + self.bias[...]  # [B, T, V]


def first(x: jax.Array, positions: jax.Array) -> jax.Array:
    """The first token's row, wherever padding stands. [B, T, D], [B, T] -> [B, D]"""
    return x[jnp.arange(x.shape[0]), jnp.argmax(positions >= 0, axis=1)]


def normalised(x: jax.Array) -> jax.Array:
    """The same direction, length 1. [B, D] -> same"""
    return x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))


class Bert(nnx.Module):
    """The encoder with its configured parts: `x, pooled = model(tokens, positions, segments)`.

    `tokens` int32 [B, T]; `positions` int32 [B, T], below P, each token's position in its own sequence and -1
    for padding, wherever it stands; `segments` int32 [B, T], below U, by default 0 for all. With a masked-
    language-model head x are logits [B, T, V], without one hidden states [B, T, D], in the parameters' dtype;
    `pooled` [B, D] stands for the whole, None without a pooler; of it, a pre-trained model's `next_sentence`
    makes logits [B, 2] for "the second segment follows" and "it does not". Outputs at padding are finite and
    mean nothing. `key` seeds dropout: layers fold in their index, the embeddings count on.
    """

    def __init__(self, config: BertConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = c = config
        D = c.hidden_size
        self.embed = nnx.Embed(c.vocab_size, D, param_dtype=dtype, rngs=rngs)
        self.position_embed = nnx.Embed(c.max_position_embeddings, D, param_dtype=dtype, rngs=rngs)
        self.segment_embed = nnx.Embed(c.type_vocab_size, D, param_dtype=dtype, rngs=rngs)
        self.embed_norm = LayerNorm(D, c.layer_norm_eps, dtype=dtype)
        self.layers = nnx.List([Block(c, dtype=dtype, rngs=rngs) for _ in range(c.num_hidden_layers)])
        if c.pooler:
            self.pooler = Linear(D, D, param_dtype=dtype, rngs=rngs)
        if c.masked_lm_head:
            self.head = MaskedLMHead(c, dtype=dtype, rngs=rngs)
        if c.next_sentence_head:
            self.next_sentence = Linear(D, 2, param_dtype=dtype, rngs=rngs)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segments: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        x = self.hidden(tokens, positions, segments, key=key)
        pooled = self.pool(x, positions) if self.config.pooler else None
        return self.head(x, self.embed) if self.config.masked_lm_head else x, pooled

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segments: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Everything below the heads. [B, T] -> [B, T, D]"""
        c = self.config
        if segments is None:
            segments = jnp.zeros_like(tokens)
        x = self.embed(tokens) + self.position_embed(jnp.maximum(positions, 0)) + self.segment_embed(segments)
        x = dropout(self.embed_norm(x), c.hidden_dropout_prob, subkey(key, c.num_hidden_layers))
        x = constrain(x, "residual")
        mask = visible(positions, positions, causal=False)  # [B, T, T]
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, subkey(key, i))
        return x

    def pool(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """What pre-training makes of the first token for the whole. [B, T, D], [B, T] -> [B, D]"""
        return jnp.tanh(self.pooler(first(x, positions)))

    def mean(self, tokens: jax.Array, positions: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        """A text as a vector: the mean of its tokens' hidden states, of length 1. [B, T] -> [B, D]

        Reimers & Gurevych 2019 (arXiv:1908.10084), section 3. At least float32.
        """
        x = self.hidden(tokens, positions, segments)
        x = x.astype(at_least_float32(x.dtype))
        real = (positions >= 0)[:, :, None]  # [B, T, 1]
        return normalised(jnp.sum(jnp.where(real, x, 0), axis=1) / jnp.sum(real, axis=1))

    def first(self, tokens: jax.Array, positions: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        """A text as a vector: its first token's hidden state, of length 1. [B, T] -> [B, D]"""
        x = first(self.hidden(tokens, positions, segments), positions)
        return normalised(x.astype(at_least_float32(x.dtype)))
