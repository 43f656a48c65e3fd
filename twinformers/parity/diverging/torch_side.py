"""A PyTorch module as one of the two sides: a twin, a model of transformers, or a stranger's."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from twinformers.parity.diverging.sides import Call, Invoke, Pullback, Side, placed
from twinformers.parity.diverging.values import Leaves, first_array, leaves
from twinformers.parity.recording import hooked_torch
from twinformers.parity.reference import precise


class TorchSide(Side):
    """A PyTorch module. `names` maps the paths that it is watched under to its own, as for transformers."""

    framework = "torch"

    def __init__(
        self,
        model: Any,
        name: str,
        invoke: Invoke,
        inputs: tuple[np.ndarray, ...],
        names: Mapping[str, str] | None = None,
        *,
        float64_inside: bool = False,
    ):
        super().__init__(model, name, invoke, inputs)
        self.names, self.float64_inside = names, float64_inside

    def modules(self) -> dict[str, Any]:
        own = dict(self.model.named_modules())
        names = self.names if self.names is not None else {name: name for name in own}
        return {"": self.model} | {path: own[name] for path, name in names.items() if name in own}

    def own_path(self, path: str) -> str:
        return (self.names or {}).get(path, path)

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        import torch

        with torch.no_grad(), precise("float64" if self.float64_inside else ""):
            yield

    def watched(self, begin: Callable[..., None], end: Callable[[str, Any], None]) -> Any:
        return hooked_torch(self.model, self.names, end, begin)

    def _copy(self, x: Any) -> Any:
        return x.clone() if hasattr(x, "clone") else x

    def numpy(self, x: Any) -> np.ndarray | None:
        import torch

        x = torch.as_tensor(x).detach().cpu()
        return (x.double() if x.is_floating_point() else x).numpy().copy()

    def native(self, x: np.ndarray, like: Any = None) -> Any:
        import torch

        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        found = torch.from_numpy(np.array(x)).to(device)
        return found if like is None or found.is_floating_point() else found.to(like.dtype)

    def parameters(self, path: str = "") -> Leaves:
        return {name: self.numpy(x) for name, x in self._tensors(path).items()}  # type: ignore[misc]

    def _tensors(self, path: str) -> dict[str, Any]:
        module = self.modules()[path.partition("#")[0]]
        return {**dict(module.named_parameters()), **dict(module.named_buffers())}

    @contextlib.contextmanager
    def edited(self, path: str, parameters: Mapping[str, np.ndarray]) -> Iterator[None]:
        changed = {n: x for n, x in self._tensors(path).items() if n in parameters}
        before = {n: x.data for n, x in changed.items()}
        for n, x in changed.items():
            x.data = self.native(parameters[n]).to(x.dtype)
        try:
            yield
        finally:
            for n, x in changed.items():
                x.data = before[n]

    def widened(self, call: Call, values: Mapping[str, np.ndarray]) -> np.ndarray:
        from twinformers.parity.diverging.rewriting import Widen

        with Widen():
            return self.call(call, values)

    def pullback(self, call: Call, values: Mapping[str, np.ndarray], cotangent: np.ndarray) -> Pullback:
        import torch

        module = self.modules()[call.path.partition("#")[0]]
        parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        with self.scope(), torch.enable_grad():
            arrays = leaves(call.arguments)
            arrays = {n: self.native({**call.leaves, **values}[n], x) for n, x in arrays.items()}
            floats = {n: x.requires_grad_() for n, x in arrays.items() if x.is_floating_point()}
            output = first_array(self.perform(call, *placed(call, arrays)))
            wanted = [*floats.values(), *parameters.values()]
            # An output that depends on none of these has no graph, and gradients of zero.
            found = (
                torch.autograd.grad(output, wanted, self.native(cotangent), allow_unused=True)
                if output.requires_grad
                else [None] * len(wanted)
            )
        dense = [
            self.numpy(torch.zeros_like(w) if g is None else g) for w, g in zip(wanted, found, strict=True)
        ]
        return Pullback(
            dict(zip(floats, dense, strict=False)),  # type: ignore[arg-type]
            dict(zip(parameters, dense[len(floats) :], strict=True)),  # type: ignore[arg-type]
        )

    def signature(self, path: str) -> inspect.Signature:
        return inspect.signature(self.modules()[path].forward)
