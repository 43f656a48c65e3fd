"""Weights laid out for decoding: a step reads every one of them once, so how they lie decides its speed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from twinformers.errors import UsageError


def for_decoding(model: Any) -> Any:
    """Pack each matrix for the CPU's kernels (oneDNN) as well, in place; the model is returned.

    Products of 2 rows or more then take a sixth to a half less time. One row reads the weight as it was,
    which is faster still, so both stay: twice the memory. Only for float32 on a CPU, and not for what was
    loaded in inference mode, where nothing tells that a weight has changed; one that has is used as it then
    is. Raises UsageError for a model that is no causal decoder with linear layers.
    """
    # vs jax: changes the order of the elements; there, what one call reads together is joined
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    if not weights or not hasattr(model, "hidden"):
        raise UsageError(
            "there is nothing to lay out for decoding",
            where="decoding",
            expected="a causal decoder as it was loaded",
            found=type(model).__name__,
        )
    if model.config.tie_word_embeddings:
        weights.append(model.embed.weight)
    for weight in weights if torch.backends.mkldnn.is_available() else ():
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and not weight.is_inference():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
            weight.packed = packed, weight._version  # type: ignore[attr-defined]  # `layers.linear` reads it
    return model
