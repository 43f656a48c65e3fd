"""What a device's default for products of float32 values would do to a model, emulated on the CPU.

JAX on TPU multiplies float32 in bfloat16 unless told otherwise, and a GPU may use TF32, which has ten bits of
mantissa. Both accumulate in float32. The operands of every product are rounded so; the rest stays float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twinformers.parity.rounding import PRODUCTS


def to_bfloat16(x: Any) -> Any:
    """Eight bits of significand, in a float32."""
    import torch

    return x.to(torch.bfloat16).to(torch.float32)


def to_tf32(x: Any) -> Any:
    """Eleven bits of significand, ten of them stored, to the nearest and ties to even, in a float32."""
    import torch

    bits = x.contiguous().view(torch.int32)
    # Half of the last kept bit, less one if that bit is even, carries where rounding is up.
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    return torch.where(torch.isfinite(x), rounded.view(torch.float32), x)


#: The defaults that are emulated, by the name that a result carries.
DEFAULTS: dict[str, Callable[[Any], Any]] = {"TPU default": to_bfloat16, "TF32": to_tf32}


def products_in(rounded: Callable[[Any], Any]) -> Any:
    """A context in which the float32 operands of every product of torch are rounded first."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Products(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if getattr(function, "__name__", "") in PRODUCTS:
                args = tuple(
                    rounded(a) if isinstance(a, torch.Tensor) and a.dtype == torch.float32 else a
                    for a in args
                )
            return function(*args, **(kwargs or {}))

    return Products()
