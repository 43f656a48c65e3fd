"""What the architectures share: normalisation, rotary angles, the key-value cache, attention itself.

Axes: B batch, T query length, S key length, D hidden, N query heads, K key-value heads, G = N/K,
H head dimension, L layers. Softmax, norm statistics and rotary angles run in at least float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from torch_models.random import bits, fold_in
from twinformers.errors import UsageError


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32 for the half precisions, the dtype itself for float32 and float64."""
    return torch.promote_types(dtype, torch.float32)


FEW_ROWS = 32  # up to so many, the CPU is faster with the weight on the left


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b. [..., in], [out, in] -> [..., out]

    For few rows the CPU reads the weight three times as fast in W x^T, if x^T has two columns or more. For
    more than one a packed weight (`layouts.for_decoding`) is faster, unless it has changed since.
    """
    # vs jax: XLA chooses the order of a product itself
    rows = x.numel() // x.shape[-1] if x.device.type == "cpu" and x.dtype == torch.float32 else 0
    if rows == 0 or torch.is_grad_enabled():
        return nn.functional.linear(x, weight, bias)
    packed, version = getattr(weight, "packed", (None, None))
    if rows > 1 and packed is not None and version == weight._version:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    if rows > FEW_ROWS:
        return nn.functional.linear(x, weight, bias)
    flat = x.reshape(rows, -1) if rows > 1 else x.reshape(1, -1).repeat(2, 1)
    y = (weight @ flat.T).T[:rows].reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """nn.Linear with the product above. [..., in] -> [..., out]"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, arXiv:1910.07467). [..., D] -> [..., D]"""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype):
        super().__init__()  # vs jax: registers parameters and submodules as they are assigned
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(at_least_float32(x.dtype))
        wide = wide * torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias (Ba et al. 2016, arXiv:1607.06450). [..., D] -> same"""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(size, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(at_least_float32(x.dtype))
        wide = wide - torch.mean(wide, dim=-1, keepdim=True)
        wide = wide * torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight + self.bias


def subkey(key: torch.Tensor | None, data: torch.Tensor | int) -> torch.Tensor | None:
    """`fold_in` for a key that may be missing: without one nothing below drops anything."""
    return None if key is None else fold_in(key, data)


def dropout(x: torch.Tensor, rate: float, key: torch.Tensor | None) -> torch.Tensor:
    """Zero each element with probability `rate` and scale the others up; without a key, x itself.

    Srivastava et al. 2014. The key alone decides which: the masks of both frameworks are the same.
    """
    if key is None or rate == 0:
        return x
    keep = bits(key, tuple(x.shape)) < round((1 - rate) * 2**32)
    return torch.where(keep, x * (1 / (1 - rate)), 0)


#: Activations by Hugging Face's names; plain GELU is the exact one.
ACTIVATIONS = {
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
    "swish": nn.functional.silu,
    "gelu": lambda x: nn.functional.gelu(x, approximate="none"),
    "gelu_new": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}


class KVCache(NamedTuple):
    """Keys and values seen so far. A token at position p lies in slot p mod S of its row.

    Slot S is scratch: what must not be kept is written there, and its position stays -1.
    """

    k: torch.Tensor  # [L, B, K, S+1, H]
    v: torch.Tensor  # [L, B, K, S+1, H]
    positions: torch.Tensor  # [B, S+1] int32, -1 where empty


class CrossCache(NamedTuple):
    """The encoder's output as the decoder's layers see it: computed once per source, never written again."""

    k: torch.Tensor  # [L, B, S, N, H]
    v: torch.Tensor  # [L, B, S, N, H]
    positions: torch.Tensor  # [B, S] int32, -1 for padding


class Context(NamedTuple):
    """What depends on the positions alone: computed once per call, read by every layer."""

    cos: torch.Tensor  # [B, T, H/2]
    sin: torch.Tensor  # [B, T, H/2]
    slots: torch.Tensor | None  # [B, T], where this call's keys and values go in the cache
    mask: torch.Tensor  # [B, T, S], True where a key is visible


def empty_cache(
    layers: int, batch: int, length: int, heads: int, size: int, *, dtype: torch.dtype, device: torch.device
) -> KVCache:
    """A cache for `length` positions per row, nothing in it yet."""
    shape = (layers, batch, heads, length + 1, size)
    return KVCache(
        torch.zeros(shape, dtype=dtype, device=device),
        torch.zeros(shape, dtype=dtype, device=device),
        torch.full((batch, length + 1), -1, dtype=torch.int32, device=device),
    )


def place(positions: torch.Tensor, cache: KVCache, window: int | None = None) -> tuple[torch.Tensor, KVCache]:
    """Assign each token of a call its slot, and note the positions there. [B, T] -> [B, T]

    Padding goes to the scratch slot, and so does whatever a later token of the same call overwrites.
    With a sliding window, UsageError where the call would overwrite keys that its first token still sees.
    """
    T, length = positions.shape[1], cache.positions.shape[1] - 1
    if window is not None and T > 1 and length < window + T - 1:
        raise UsageError(
            f"a call of {T} tokens would overwrite keys that its window of {window} still sees",
            where="cache",
            expected=f"at least window + tokens - 1 = {window + T - 1} slots",
            found=f"{length} slots",
            hint="make the cache longer, or give the tokens in smaller chunks",
        )
    kept = (positions >= 0) & (positions > positions.amax(dim=1, keepdim=True) - length)  # [B, T]
    slots = torch.where(kept, positions % length, length)  # [B, T]
    rows = torch.arange(positions.shape[0], device=positions.device)[:, None]  # [B, 1]
    # vs jax: written in place; the cache that was passed in is the one that is returned
    cache.positions[rows, slots] = torch.where(kept, positions, -1)
    return slots, cache


def store(
    cache: KVCache, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[KVCache, torch.Tensor, torch.Tensor]:
    """Put one layer's keys and values, each [B, T, K, H], into their slots, and give all that it has now.

    The cache and 2 x [B, S+1, K, H], in which the heads stand before the slots in memory: a product over one
    head then reads them as they lie.
    """
    rows = torch.arange(slots.shape[0], device=slots.device)[:, None]  # [B, 1]
    cache.k[layer][rows, :, slots] = k.to(cache.k.dtype)
    cache.v[layer][rows, :, slots] = v.to(cache.v.dtype)
    return cache, cache.k[layer].swapaxes(1, 2), cache.v[layer].swapaxes(1, 2)


def visible(
    positions: torch.Tensor, key_positions: torch.Tensor, window: int | None = None, *, causal: bool = True
) -> torch.Tensor:
    """Which keys each query sees: all up to its own position; never padding. [B, T], [B, S] -> [B, T, S]

    With a window, only those less than `window` positions away; without the causal rule, later ones too.
    """
    if window is not None and window < 1:
        raise UsageError(
            "bad value", where="window", expected="a positive number, or None", found=str(window)
        )
    distance = positions[:, :, None] - key_positions[:, None, :]  # [B, T, S]
    seen = (key_positions[:, None, :] >= 0).expand(distance.shape)
    if causal:
        seen = seen & (distance >= 0)
    if window is not None:
        seen = seen & (torch.abs(distance) < window)
    return seen


def rotary_angles(
    positions: torch.Tensor, frequencies: tuple[float, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of position times frequency, at least float32. [B, T] -> 2 x [B, T, H/2]"""
    wide = at_least_float32(dtype)  # bfloat16 cannot hold position 257
    # vs jax: the frequencies are no buffer, since model.bfloat16() would round a buffer too
    angles = positions[:, :, None].to(wide) * torch.tensor(frequencies, dtype=wide, device=positions.device)
    return torch.cos(angles), torch.sin(angles)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn dimension j together with j + H/2 (Su et al. 2021, arXiv:2104.09864). [B, T, *, H] -> same"""
    first, second = torch.chunk(x.to(cos.dtype), 2, dim=-1)  # 2 x [B, T, *, H/2]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]  # [B, T, 1, H/2]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


def attention_weights(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """How much each query takes from each key, per head; a query's weights add up to 1, and padding gets 0.

    softmax(q k^T / sqrt(H)) (Vaswani et al. 2017, arXiv:1706.03762, eq. 1). Query head n reads key-value
    head n // G (Ainslie et al. 2023, arXiv:2305.13245). q [B, T, N, H], k [B, S, K, H], mask [B, T, S]
    -> [B, N, T, S], at least float32. A row that sees nothing gets equal weights: finite, unspecified.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    # One axis R = G T for all queries of a key-value head: no product has to reorder the scores.
    q = q.reshape(B, T, K, N // K, H).permute(0, 2, 3, 1, 4).reshape(B, K, -1, H)  # [B, K, R, H]
    scores = torch.einsum("bkrh,bskh->bkrs", q, k) * H**-0.5  # [B, K, R, S]
    scores = scores.to(at_least_float32(scores.dtype)).reshape(B, K, N // K, T, S)
    scores = torch.where(mask[:, None, None], scores, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1).reshape(B, N, T, S)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    *,
    rate: float = 0.0,
    key: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention: each query's weighted mean of the values, per head.

    q [B, T, N, H], k and v [B, S, K, H], mask [B, T, S] -> [B, T, N, H]. `key` drops weights at `rate`.
    """
    B, T, N, H = q.shape
    S, K = v.shape[1:3]
    weights = dropout(attention_weights(q, k, mask).to(v.dtype), rate, key)  # [B, N, T, S]
    weights = weights.reshape(B, K, -1, S)  # [B, K, R, S]
    return torch.einsum("bkrs,bskh->bkrh", weights, v).reshape(B, N, T, H).swapaxes(1, 2)  # [B, T, N, H]


def constrain(x: torch.Tensor, name: str) -> torch.Tensor:
    """Name an activation ("residual"). vs jax: it is placed by what wraps its module, and x itself here."""
    return x
