"""Attention mechanisms in PyTorch: one head, many heads, many heads with a cache, shared keys and values.

Each module maps [B, T, D] to the same shape. `positions` int32 [B, T] are the tokens' positions in their
own sequences, -1 for padding wherever it stands: what a token may see follows from them alone. `causal`
hides later positions, `window` hides those that are `window` or more positions away. Outputs at padding
are finite and mean nothing. `weights` gives what the module attends to, for looking at.

Axes: B batch, T query length, S key length, D hidden, N query heads, K key-value heads, H head dimension.
"""

from __future__ import annotations

import torch
from torch import nn

from torch_models.layers import (
    KVCache,
    Linear,
    at_least_float32,
    attend,
    attention_weights,
    empty_cache,
    place,
    store,
    visible,
)
from twinformers.errors import UsageError


class SelfAttention(nn.Module):
    """One head: softmax(q k^T / sqrt(H)) v, spelled out (Vaswani et al. 2017, arXiv:1706.03762, eq. 1).

    Each token asks with a query, is found by its key and answers with its value. Scores are divided by
    sqrt(H), the standard deviation of a sum of H products, so that the softmax does not saturate.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        *,
        causal: bool,
        window: int | None = None,
        use_bias: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()  # vs jax: registers submodules as they are assigned
        D, H = hidden_size, head_dim
        self.head_dim, self.causal, self.window = head_dim, causal, window
        # vs jax: a weight is [out, in], and initial values come from the global generator
        self.q_proj = Linear(D, H, bias=use_bias, dtype=dtype)
        self.k_proj = Linear(D, H, bias=use_bias, dtype=dtype)
        self.v_proj = Linear(D, H, bias=use_bias, dtype=dtype)
        self.o_proj = Linear(H, D, bias=use_bias, dtype=dtype)

    def weights(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """How much each token takes from each other one, at least float32. [B, T, D] -> [B, T, S]"""
        scores = self.q_proj(x) @ self.k_proj(x).transpose(1, 2) * self.head_dim**-0.5  # [B, T, S]
        scores = scores.to(at_least_float32(scores.dtype))
        seen = visible(positions, positions, self.window, causal=self.causal)  # [B, T, S]
        return torch.softmax(torch.where(seen, scores, torch.finfo(scores.dtype).min), dim=-1)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        weights = self.weights(x, positions).to(x.dtype)  # [B, T, S]
        return self.o_proj(weights @ self.v_proj(x))  # [B, T, D]


class MultiHeadAttention(nn.Module):
    """N heads side by side, each with its own queries, keys and values (Vaswani et al. 2017, section 3.2.2).

    One head averages all that it attends to; several can attend to different things at once.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        causal: bool,
        window: int | None = None,
        use_bias: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        D, N, H = hidden_size, num_heads, head_dim
        self.head_dim, self.causal, self.window = head_dim, causal, window
        self.attend = attend  # `fused.use_attention` puts another here
        self.q_proj = Linear(D, N * H, bias=use_bias, dtype=dtype)
        self.k_proj = Linear(D, N * H, bias=use_bias, dtype=dtype)
        self.v_proj = Linear(D, N * H, bias=use_bias, dtype=dtype)
        self.o_proj = Linear(N * H, D, bias=use_bias, dtype=dtype)

    def weights(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """How much each token takes from each other one, per head. [B, T, D] -> [B, N, T, S]"""
        B, T, _ = x.shape
        q = self.q_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, N, H]
        k = self.k_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, K, H]
        return attention_weights(q, k, visible(positions, positions, self.window, causal=self.causal))

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, N, H]
        k = self.k_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, K, H]
        v = self.v_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, K, H]
        mask = visible(positions, positions, self.window, causal=self.causal)  # [B, T, S]
        x = self.attend(q, k, v, mask)  # [B, T, N, H]
        return self.o_proj(x.reshape(B, T, -1))  # [B, T, D]


class CachedMultiHeadAttention(nn.Module):
    """Causal multi-head attention that keeps keys and values between calls: `x, cache = module(...)`.

    A token's key and value never change once it is written, since it sees no later token. So the next call
    brings only the new tokens and finds the old ones in the cache: rebind it, the old one is consumed. With
    a window, slots that no later token can see are used again; a call says if the cache is too small.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        window: int | None = None,
        use_bias: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        D, N, H = hidden_size, num_heads, head_dim
        self.num_heads, self.head_dim, self.window = num_heads, head_dim, window
        self.attend = attend
        self.q_proj = Linear(D, N * H, bias=use_bias, dtype=dtype)
        self.k_proj = Linear(D, N * H, bias=use_bias, dtype=dtype)
        self.v_proj = Linear(D, N * H, bias=use_bias, dtype=dtype)
        self.o_proj = Linear(N * H, D, bias=use_bias, dtype=dtype)

    def weights(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """How much each token takes from each other one, without a cache. [B, T, D] -> [B, N, T, S]"""
        B, T, _ = x.shape
        q = self.q_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, N, H]
        k = self.k_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, N, H]
        return attention_weights(q, k, visible(positions, positions, self.window))

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cache: KVCache | None = None
    ) -> tuple[torch.Tensor, KVCache | None]:
        B, T, _ = x.shape
        q = self.q_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, N, H]
        k = self.k_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, N, H]
        v = self.v_proj(x).reshape(B, T, -1, self.head_dim)  # [B, T, N, H]
        key_positions = positions
        if cache is not None:
            slots, cache = place(positions, cache, self.window)
            cache, k, v = store(cache, 0, slots, k, v)  # [B, S+1, N, H]
            key_positions = cache.positions  # [B, S+1]
        x = self.attend(q, k, v, visible(positions, key_positions, self.window))  # [B, T, N, H]
        return self.o_proj(x.reshape(B, T, -1)), cache  # [B, T, D]

    def empty_cache(self, batch: int, length: int) -> KVCache:
        """A cache of `length` slots per row, for this one layer."""
        weight = self.k_proj.weight
        return empty_cache(
            1, batch, length, self.num_heads, self.head_dim, dtype=weight.dtype, device=weight.device
        )


class MultiQueryAttention(MultiHeadAttention):
    """Multi-head attention whose heads share one key and one value (Shazeer 2019, arXiv:1911.02150).

    The cache, which decoding reads whole for every token, becomes N times smaller.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        causal: bool,
        window: int | None = None,
        use_bias: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(
            hidden_size,
            num_heads,
            head_dim,
            causal=causal,
            window=window,
            use_bias=use_bias,
            dtype=dtype,
        )
        # All that changes: a token has one key and one value, not one per head.
        D, H = hidden_size, head_dim
        self.k_proj = Linear(D, H, bias=use_bias, dtype=dtype)
        self.v_proj = Linear(D, H, bias=use_bias, dtype=dtype)


class GroupedQueryAttention(MultiHeadAttention):
    """Groups of N/K query heads share a key and a value (Ainslie et al. 2023, arXiv:2305.13245).

    K = N is multi-head attention, K = 1 is multi-query.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        causal: bool,
        window: int | None = None,
        use_bias: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise UsageError(
                "query heads cannot be shared out evenly over the key-value heads",
                where="num_kv_heads",
                expected=f"a divisor of num_heads = {num_heads}",
                found=str(num_kv_heads),
            )
        super().__init__(
            hidden_size,
            num_heads,
            head_dim,
            causal=causal,
            window=window,
            use_bias=use_bias,
            dtype=dtype,
        )
        D, K, H = hidden_size, num_kv_heads, head_dim
        self.k_proj = Linear(D, K * H, bias=use_bias, dtype=dtype)
        self.v_proj = Linear(D, K * H, bias=use_bias, dtype=dtype)
