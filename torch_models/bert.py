"""BERT in PyTorch: an encoder, post-norm with biases, learned positions and segments, GELU.

Devlin et al. 2018 (arXiv:1810.04805). Axes: B batch, T length, D hidden, N heads, H head dimension,
F feed-forward, V vocabulary, P positions, U segments, L layers.
"""

from __future__ import annotations

import torch
from torch import nn

from torch_models.layers import (
    ACTIVATIONS,
    LayerNorm,
    Linear,
    at_least_float32,
    attend,
    constrain,
    dropout,
    linear,
    subkey,
    visible,
)
from twinformers.configs.bert import BertConfig


class Attention(nn.Module):
    """Multi-head self-attention in which every token sees all others. [B, T, D] -> same"""

    def __init__(self, config: BertConfig, *, dtype: torch.dtype):
        super().__init__()
        D = config.hidden_size
        self.head_dim = config.head_dim
        self.attend = attend  # `fused.use_attention` puts another here
        self.dropout = config.attention_probs_dropout_prob
        # vs jax: a weight is [out, in], and initial values come from the global generator
        self.q_proj = Linear(D, D, dtype=dtype)
        self.k_proj = Linear(D, D, dtype=dtype)
        self.v_proj = Linear(D, D, dtype=dtype)
        self.o_proj = Linear(D, D, dtype=dtype)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, key: torch.Tensor | None) -> torch.Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, N, H]
        k = self.k_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, N, H]
        v = self.v_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, N, H]
        x = self.attend(q, k, v, mask, rate=self.dropout, key=key)  # [B, T, N, H]
        return self.o_proj(x.reshape(B, T, -1))  # [B, T, D]


class MLP(nn.Module):
    """gelu(x W1 + b1) W2 + b2 (Hendrycks & Gimpel 2016, arXiv:1606.08415). [B, T, D] -> same"""

    def __init__(self, config: BertConfig, *, dtype: torch.dtype):
        super().__init__()
        self.activation = config.hidden_act
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, dtype=dtype)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = ACTIVATIONS[self.activation](self.fc1(x))  # [B, T, F]
        return self.fc2(x)  # [B, T, D]


class Block(nn.Module):
    """Mix, drop, add, normalise; twice: over the sequence, then over the features. [B, T, D] -> same"""

    def __init__(self, config: BertConfig, *, dtype: torch.dtype):
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.dropout = config.hidden_dropout_prob
        self.attn = Attention(config, dtype=dtype)
        self.attn_norm = LayerNorm(D, eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype)
        self.mlp_norm = LayerNorm(D, eps, dtype=dtype)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, key: torch.Tensor | None) -> torch.Tensor:
        mixed = self.attn(x, mask, subkey(key, 0))
        x = constrain(self.attn_norm(x + dropout(mixed, self.dropout, subkey(key, 1))), "residual")
        mixed = self.mlp(x)
        return constrain(self.mlp_norm(x + dropout(mixed, self.dropout, subkey(key, 2))), "residual")


class MaskedLMHead(nn.Module):
    """Which token stood there: one more layer, then the table of tokens. [B, T, D] -> [B, T, V]"""

    def __init__(self, config: BertConfig, *, dtype: torch.dtype):
        super().__init__()
        D = config.hidden_size
        self.activation = config.hidden_act
        self.transform = Linear(D, D, dtype=dtype)
        self.norm = LayerNorm(D, config.layer_norm_eps, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size, dtype=dtype))

    def forward(self, x: torch.Tensor, embed: nn.Embedding) -> torch.Tensor:
        x = self.norm(ACTIVATIONS[self.activation](self.transform(x)))  # [B, T, D]
        return linear(x, embed.weight) + self.bias  # [B, T, V]


def first(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The first token's row, wherever padding stands. [B, T, D], [B, T] -> [B, D]"""
    return x[torch.arange(x.shape[0], device=x.device), torch.argmax((positions >= 0).int(), dim=1)]


def normalised(x: torch.Tensor) -> torch.Tensor:
    """The same direction, length 1. [B, D] -> same"""
    return x / torch.sqrt(torch.sum(x * x, dim=-1, keepdim=True))


class Bert(nn.Module):
    """The encoder with its configured parts: `x, pooled = model(tokens, positions, segments)`.

    `tokens` int32 [B, T]; `positions` int32 [B, T], below P, each token's position in its own sequence and -1
    for padding, wherever it stands; `segments` int32 [B, T], below U, by default 0 for all. With a masked-
    language-model head x are logits [B, T, V], without one hidden states [B, T, D], in the parameters' dtype;
    `pooled` [B, D] stands for the whole, None without a pooler; of it, a pre-trained model's `next_sentence`
    makes logits [B, 2] for "the second segment follows" and "it does not". Outputs at padding are finite and
    mean nothing. `key` seeds dropout: layers fold in their index, the embeddings count on.
    """

    def __init__(self, config: BertConfig, *, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = c = config
        D = c.hidden_size
        self.embed = nn.Embedding(c.vocab_size, D, dtype=dtype)
        self.position_embed = nn.Embedding(c.max_position_embeddings, D, dtype=dtype)
        self.segment_embed = nn.Embedding(c.type_vocab_size, D, dtype=dtype)
        self.embed_norm = LayerNorm(D, c.layer_norm_eps, dtype=dtype)
        self.layers = nn.ModuleList([Block(c, dtype=dtype) for _ in range(c.num_hidden_layers)])
        if c.pooler:
            self.pooler = Linear(D, D, dtype=dtype)
        if c.masked_lm_head:
            self.head = MaskedLMHead(c, dtype=dtype)
        if c.next_sentence_head:
            self.next_sentence = Linear(D, 2, dtype=dtype)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        segments: torch.Tensor | None = None,
        *,
        key: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = self.hidden(tokens, positions, segments, key=key)
        pooled = self.pool(x, positions) if self.config.pooler else None
        return self.head(x, self.embed) if self.config.masked_lm_head else x, pooled

    def hidden(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        segments: torch.Tensor | None = None,
        *,
        key: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Everything below the heads. [B, T] -> [B, T, D]"""
        c = self.config
        if segments is None:
            segments = torch.zeros_like(tokens)
        x = self.embed(tokens) + self.position_embed(positions.clamp(min=0)) + self.segment_embed(segments)
        x = dropout(self.embed_norm(x), c.hidden_dropout_prob, subkey(key, c.num_hidden_layers))
        x = constrain(x, "residual")
        mask = visible(positions, positions, causal=False)  # [B, T, T]
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, subkey(key, i))
        return x

    def pool(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What pre-training makes of the first token for the whole. [B, T, D], [B, T] -> [B, D]"""
        return torch.tanh(self.pooler(first(x, positions)))

    def mean(
        self, tokens: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A text as a vector: the mean of its tokens' hidden states, of length 1. [B, T] -> [B, D]

        Reimers & Gurevych 2019 (arXiv:1908.10084), section 3. At least float32.
        """
        x = self.hidden(tokens, positions, segments)
        x = x.to(at_least_float32(x.dtype))
        real = (positions >= 0)[:, :, None]  # [B, T, 1]
        return normalised(torch.sum(torch.where(real, x, 0), dim=1) / torch.sum(real, dim=1))

    def first(
        self, tokens: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A text as a vector: its first token's hidden state, of length 1. [B, T] -> [B, D]"""
        x = first(self.hidden(tokens, positions, segments), positions)
        return normalised(x.to(at_least_float32(x.dtype)))
