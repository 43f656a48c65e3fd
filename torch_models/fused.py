"""Attention by PyTorch's own kernels, and the choice between them and the einsum of `layers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torch_models import layers
from twinformers.errors import UsageError


def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`scaled_dot_product_attention`, which chooses by device, dtype and shape among its implementations.

    q [B, T, N, H], k and v [B, S, K, H], mask [B, T, S] -> [B, T, N, H]. A row that sees nothing gets 0.
    """
    # vs jax: the heads stand before the sequence
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, N, T, H], 2 x [B, K, S, H]
    x = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True)
    return x.transpose(1, 2)  # [B, T, N, H]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    *,
    rate: float = 0.0,
    key: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `layers.attend` computes, by the kernel; by the einsum itself where weights are dropped.

    The kernel would draw its own random numbers: which weights are dropped is for the key to say.
    """
    if key is not None and rate > 0:
        return layers.attend(q, k, v, mask, rate=rate, key=key)
    return kernel(q, k, v, mask)


#: What computes attention, by name.
ATTENTIONS = {"einsum": layers.attend, "fused": attend}


def use_attention(model: nn.Module, name: str) -> None:
    """Let every attention of a model compute by "einsum", which is the default, or by "fused".

    Raises UsageError for another name, and for a model whose attention cannot be chosen.
    """
    if name not in ATTENTIONS:
        raise UsageError(
            "unknown attention", where="attention", expected=" or ".join(ATTENTIONS), found=repr(name)
        )
    set_attention(model, ATTENTIONS[name])


def set_attention(model: nn.Module, function: Callable[..., Any]) -> None:
    """Let every attention of a model compute by a function like `layers.attend`.

    Raises UsageError for a model whose attention cannot be chosen.
    """
    modules = [m for m in model.modules() if "attend" in vars(m)]
    if not modules:
        raise UsageError(
            "the model has no attention to choose",
            where="attention",
            expected="a module with the attribute `attend`",
            found=type(model).__name__,
        )
    for module in modules:
        module.attend = function  # type: ignore[assignment]
