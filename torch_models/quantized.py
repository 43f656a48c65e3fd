"""int8 weights for decoding, which reads every weight once per token: a quarter of float32's bytes.

Symmetric, with one scale for each output channel: w is about scale * weight, the values from -127 to 127.
Activations stay as they are. `quantize(model)` does it to a whole model; nothing is trained after that.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn

from torch_models.layers import FEW_ROWS, at_least_float32
from twinformers.errors import UsageError, WeightsError

#: Outputs that one thread adds up together.
WIDTH = 256


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest int8 values, ties to even; the scales in the weight's dtype. [out, in] -> same, [out]"""
    wide = weight.to(at_least_float32(weight.dtype))
    # Reciprocals throughout: a division by a constant, or by one number a column, may mean them or not.
    scale = (torch.amax(torch.abs(wide), dim=1) * (1 / 127)).to(weight.dtype)  # [out]
    scale = torch.where(scale == 0, 1, scale)
    # Of the scale as it is stored, so that the values make up for its rounding.
    values = torch.round(wide * (1 / scale.to(wide.dtype))[:, None])
    return torch.clamp(values, -127, 127).to(torch.int8), scale


def product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(x W^T) * scale in the dtype of x. [..., in], [out, in], [out] -> [..., out]"""
    y = nn.functional.linear(x, weight.to(x.dtype)) * scale
    if y.requires_grad:
        y.register_hook(refuse)
    return y


def refuse(*_: Any) -> NoReturn:
    """Rounded weights do not learn: their gradient is zero wherever there is one."""
    raise UsageError(
        "an int8 model has no gradients",
        where="quantized",
        expected="a model that only computes",
        found="a derivative of one of its products",
        hint="train the model as it was loaded, and quantise what comes out",
    )


def tabled(weight: torch.Tensor) -> torch.Tensor:
    """The weight as a table of bytes, P times the rows of W columns. [out, in] int8 -> [P in, W + 8] uint8

    A byte is the value plus 128; the eight bytes at the end of a row are two floats that take that back.
    """
    out, size = weight.shape
    parts = -(-out // WIDTH)
    width = -(-out // parts)
    values = nn.functional.pad(weight.to(torch.int16) + 128, (0, 0, 0, parts * width - out)).to(torch.uint8)
    values = values.reshape(parts, width, size).transpose(1, 2)  # [P, in, W]
    ends = torch.tensor([1.0, -128.0]).view(torch.uint8).expand(parts, size, 8)
    return torch.cat([values, ends], dim=2).flatten(0, 1)


def summed(x: torch.Tensor, table: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(x W^T) * scale, each output a sum of the table's rows, weighted by x. [..., in] -> [..., out]

    PyTorch's one kernel for bytes on a CPU that is as fast as memory: it looks embeddings up and adds them.
    """
    size = x.shape[-1]
    weights = x.reshape(-1, 1, size).expand(-1, len(table) // size, size).reshape(-1)  # [B P in]
    rows = torch.arange(len(table), dtype=torch.int32).repeat(len(weights) // len(table))  # [B P in]
    starts = torch.arange(0, len(rows), size, dtype=torch.int32)  # [B P]
    sums = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
    y = sums(table, rows, starts, per_sample_weights=weights)  # [B P, W]
    return y.reshape(*x.shape[:-1], -1)[..., : len(scale)] * scale


class QuantizedLinear(nn.Module):
    """x W^T + b, the weight rounded to int8. [..., in] -> [..., out]"""

    table: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: Any):
        super().__init__()
        weight, scale = rounded(weight.detach())
        # vs jax: what is no floating-point number cannot be a Parameter that trains
        self.weight = nn.Parameter(weight, requires_grad=False)  # [out, in] int8
        self.scale = nn.Parameter(scale, requires_grad=False)  # [out]
        self.bias = bias
        on_cpu = weight.device.type == "cpu" and scale.dtype == torch.float32
        # vs jax: a second form of the same weight, for few rows; XLA reads the first one in tiles
        self.register_buffer("table", tabled(weight) if on_cpu else None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        few = x.numel() <= FEW_ROWS * x.shape[-1] and not torch.is_grad_enabled()
        if few and self.table is not None and x.device.type == "cpu" and x.dtype == torch.float32:
            y = summed(x, self.table, self.scale)
        else:
            y = product(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias


def quantize(model: Any) -> Any:
    """Replace every linear layer of a model by its int8 form, in place; the model is returned.

    A head that is tied to the embedding becomes a matrix of its own: looking up reads one row and stays as it
    is. Raises UsageError for a model without linear layers or one quantised before, WeightsError for weights
    that are not finite.
    """
    modules = list(model.named_modules())
    if any(isinstance(module, QuantizedLinear) for _, module in modules):
        raise UsageError(
            "the model is int8 already", where="quantize", hint="quantise a model as it was loaded, once"
        )
    linears: list[tuple[str, Any, Any, Any]] = [
        (f"{path}.{name}".lstrip("."), module, child.weight, child.bias)
        for path, module in modules
        for name, child in module.named_children()
        if isinstance(child, nn.Linear)
    ]
    if not linears or not hasattr(model, "config"):
        raise UsageError(
            "there is nothing to quantise",
            where="quantize",
            expected="a model with a configuration and linear layers",
            found=type(model).__name__,
        )
    if model.config.tie_word_embeddings:
        linears.append(("lm_head", model, model.embed.weight, None))
        model.config = model.config.replace(tie_word_embeddings=False)
    for path, _, weight, _ in linears:
        if not torch.isfinite(weight).all():
            raise WeightsError(
                "a weight is not finite",
                where=path,
                expected="numbers",
                found="NaN or infinity",
                hint="look at what wrote the checkpoint: one such weight spoils every output",
            )
    while linears:  # each weight is let go of as soon as it is rounded
        path, module, weight, bias = linears.pop()
        setattr(module, path.rpartition(".")[2], QuantizedLinear(weight, bias))
    return model
