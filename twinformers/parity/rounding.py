"""How large an error honest rounding may cause: a limit derived from the computation, not chosen.

The float64 twin runs again with the noise that a lower precision's rounding amounts to, added where that
precision rounds: a product of inner length K gets u sqrt(K) sqrt(x^2 W^2) N(0, 1), an elementwise result
u |y| N(0, 1), with u the unit roundoff. In the half precisions products accumulate in float32 and round
once at the end, and norm statistics, softmax and rotary angles are float32; which result has which dtype
is read off a pass of the same model in that dtype on shapes alone. The largest of three seeds is the limit.
Their mean will not do: SmolLM2 in bfloat16 has inputs on which one seed gives six times another's error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from twinformers.checkpoints import Checkpoint
from twinformers.loading import load
from twinformers.parity.kinds import Inputs, kind

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SEEDS = 3

PRODUCTS = {"linear", "matmul", "bmm", "einsum", "__matmul__"}
#: Functions whose results are rounded, by name; what only moves, compares or indexes values is exact.
ELEMENTWISE = frozenset(
    """
    add sub mul div rsub neg __add__ __sub__ __mul__ __truediv__ __radd__ __rsub__ __rmul__ __rtruediv__
    __pow__ pow rsqrt sqrt exp log tanh sigmoid erf silu gelu relu softmax log_softmax cos sin mean sum
    layer_norm
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class RoundingLimit:
    """The root mean square and the largest error of the logits that rounding explains."""

    rms: float
    max: float


class Rounding:
    """The truth and the limit for one dtype and one set of inputs, computed when first asked for, on the CPU.

    The truth is the float64 twin with the weights as the dtype holds them: what a port to that dtype loses in
    the weights is a matter of the port, what the model loses in computing with them is judged here.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str, inputs: Inputs, model: Any = None):
        """`model` is the float64 twin described above, if there is one already."""
        self.checkpoint, self.dtype, self.inputs, self._given = checkpoint, dtype, inputs, model

    @cached_property
    def _model(self) -> Any:
        return self._given or load(self.checkpoint, "torch", self.dtype).double()

    @cached_property
    def real(self) -> np.ndarray:
        """[B, T] which logits are compared."""
        return kind(self.checkpoint.config).positions(self.inputs) >= 0

    def true_logits(self, inputs: Inputs) -> np.ndarray:
        """The float64 logits [B, T, V] of any inputs."""
        return _call(self._model, inputs, "cpu").numpy()

    @cached_property
    def truth(self) -> np.ndarray:
        """The float64 logits of the real tokens."""
        return self.true_logits(self.inputs)[self.real]

    def errors(self, logits: np.ndarray) -> tuple[float, float]:
        """Root mean square and largest error of logits [B, T, V] at the real tokens."""
        gap = logits[self.real].astype(np.float64) - self.truth
        return float(np.sqrt(np.mean(gap * gap))), float(np.abs(gap).max())

    @cached_property
    def limit(self) -> RoundingLimit:
        """What rounding explains: the largest over the seeds."""
        import torch

        config = self.checkpoint.config
        cls = type(self._model)
        with torch.device("meta"):  # shapes and dtypes only
            shadow = cls(config, dtype=getattr(torch, self.dtype)).eval()
        kinds: list[tuple[str, str]] = []
        with _watch(kinds):
            _call(shadow, self.inputs, "meta")
        found = []
        for seed in range(SEEDS):
            with _noise(kinds, torch.Generator().manual_seed(seed), self.dtype):
                noisy = _call(self._model, self.inputs, "cpu")
            found.append(self.errors(noisy.numpy()))
        rms, largest = np.max(found, axis=0)
        return RoundingLimit(float(rms), float(largest))


def _call(model: Any, inputs: Inputs, device: str) -> Any:
    import torch

    with torch.inference_mode():
        return model(*(torch.from_numpy(x.copy()).to(device) for x in inputs))[0]


def _is_rounded(name: str, result: Any) -> bool:
    import torch

    return (
        isinstance(result, torch.Tensor)
        and result.is_floating_point()
        and (name in PRODUCTS or name in ELEMENTWISE or name == "to")
    )


def _watch(kinds: list[tuple[str, str]]) -> Any:
    """Note each rounded result's function and dtype; a cast counts only where it narrows."""
    from torch.overrides import TorchFunctionMode

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            name = getattr(function, "__name__", "")
            if _is_rounded(name, result):
                kind = str(result.dtype).removeprefix("torch.")
                exact = name == "to" and not (
                    args[0].is_floating_point() and args[0].element_size() > result.element_size()
                )
                kinds.append((name, "float64" if exact else kind))
            return result

    return Watch()


def _noise(kinds: list[tuple[str, str]], generator: Any, dtype: str) -> Any:
    """Add to each rounded result of a float64 pass the noise of the dtype that was noted for it."""
    import torch
    from torch.overrides import TorchFunctionMode

    upcoming = iter(kinds)

    class Noise(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            name = getattr(function, "__name__", "")
            if not _is_rounded(name, result):
                return result
            noted, kind = next(upcoming, ("nothing", ""))
            if noted != name:
                raise RuntimeError(f"the float64 pass calls {name} where the {dtype} pass calls {noted}")
            if kind == "float64":
                return result
            draw = torch.randn(result.shape, generator=generator, dtype=result.dtype)
            if name not in PRODUCTS:
                return result + UNIT_ROUNDOFF[kind] * draw * result.abs()
            operands = [a for a in args if isinstance(a, torch.Tensor)]
            squared = [a * a if isinstance(a, torch.Tensor) else a for a in args]
            spread = function(*squared, **(kwargs or {})).clamp(min=0).sqrt()
            noise = UNIT_ROUNDOFF["float32"] * math.sqrt(_inner(name, args, operands)) * spread * draw
            if kind != "float32":  # accumulated in float32, rounded once at the end
                noise = noise + UNIT_ROUNDOFF[kind] * result.abs() * torch.randn(
                    result.shape, generator=generator, dtype=result.dtype
                )
            return result + noise

    return Noise()


def _inner(name: str, args: tuple[Any, ...], operands: list[Any]) -> int:
    """The length over which a product sums."""
    if name != "einsum":
        return operands[0].shape[-1]
    inputs, output = args[0].replace(" ", "").split("->")
    sizes = {
        axis: n
        for axes, operand in zip(inputs.split(","), operands, strict=True)
        for axis, n in zip(axes, operand.shape, strict=True)
    }
    return math.prod(n for axis, n in sizes.items() if axis not in output)
