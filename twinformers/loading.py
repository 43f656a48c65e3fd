"""From a source to a module of either framework, one tensor at a time and without a second copy."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinformers.checkpoints import Checkpoint, convert, opened
from twinformers.checkpoints.dtypes import check_dtype
from twinformers.errors import MissingDependency, SourceError, UsageError

if TYPE_CHECKING:
    from twinformers.checkpoints.tokenizer import Tokenizer
    from twinformers.configs import Config

FRAMEWORKS = ("jax", "torch")
Source = str | Path | Checkpoint


def find_device(framework: str, name: Any) -> Any:
    """The device of a framework that a name ("cpu", "gpu", "cuda:1") means; None and devices are kept.

    Raises UsageError where there is none, naming those that there are.
    """
    if not isinstance(name, str):
        return name
    if framework == "jax":
        import jax

        kind, _, number = name.partition(":")
        try:
            if number.startswith("-"):
                raise ValueError("a list would count from its end")
            return jax.devices(kind)[int(number or 0)]
        except (RuntimeError, ValueError, IndexError):
            found = sorted({d.platform for d in jax.devices()} | {"cpu"})
    else:
        import torch

        try:
            device = torch.device(name)
            torch.empty(0, device=device).numpy(force=True)  # the meta device has no values to give
            return device
        except (RuntimeError, AssertionError):  # a build without CUDA asserts
            found = ["cpu"] + [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    raise UsageError(
        "no such device",
        where=f"{framework} device",
        expected=f"one of {', '.join(found)}",
        found=repr(name),
        hint="devices are named as the framework names them: JAX says gpu or tpu, PyTorch cuda",
    )


def load(
    source: Source,
    framework: str,
    dtype: str = "float32",
    device: Any = None,
    *,
    check: bool = False,
    attention: str = "einsum",
    quantize: str | None = None,
    decoding: bool = False,
) -> Any:
    """The model of a source as a module: an `nnx.Module` for "jax", a `torch.nn.Module` for "torch".

    Call it as `logits, cache = model(tokens, positions)`. `dtype` is one of float64, float32, bfloat16,
    float16; `device` is a device of that framework or its name (default: its own default); `check` compares
    the files with their checksums first; `attention` is "einsum", or "fused" for the fastest on that
    device (the two compute the same); `quantize="int8"` rounds the weights of the linear layers for decoding
    (`quantized.py`); `decoding` lays them out for it (`layouts.py`; a matter of speed again), for a model
    that generates and does not train. Raises UsageError for an unknown framework, dtype, device, attention or
    quantisation and for float64 in JAX without x64, MissingDependency where the framework is not installed,
    and the errors of the source.
    """
    if framework not in FRAMEWORKS:
        raise UsageError(
            "unknown framework", where="framework", expected=" or ".join(FRAMEWORKS), found=repr(framework)
        )
    check_dtype(dtype)
    if quantize not in (None, "int8"):
        raise UsageError(
            "unknown quantisation", where="quantize", expected="int8, or nothing", found=repr(quantize)
        )
    try:
        importlib.import_module({"jax": "flax.nnx", "torch": "torch"}[framework])
    except ImportError as error:
        raise MissingDependency(
            f"{framework} is not installed ({error.name})", hint=f"pip install 'twinformers[{framework}]'"
        ) from None
    build = _load_jax if framework == "jax" else _load_torch
    device = find_device(framework, device)
    with opened(source, check=check) as checkpoint:
        model = build(checkpoint, dtype, device, attention, decoding and not quantize)
    if quantize:
        return importlib.import_module(f"{framework}_models.quantized").quantize(model)
    return model


def _choose(framework: str, skeleton: Any, attention: str, device: Any) -> None:
    """Give a model its attention, before any weight is read; the default is what it was built with."""
    if attention != "einsum":
        importlib.import_module(f"{framework}_models.fused").use_attention(skeleton, attention)


def _load_jax(checkpoint: Checkpoint, dtype: str, device: Any, attention: str, decoding: bool) -> Any:
    import jax
    import jax.numpy as jnp

    from jax_models import skeleton

    if dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise UsageError(
            "JAX would silently make float32 of float64",
            where="dtype",
            hint="call inside `with jax.enable_x64(True):`, or set JAX_ENABLE_X64=1",
        )
    config = checkpoint.config
    cls = getattr(importlib.import_module(f"jax_models.{config.architecture}"), config.model_class)
    # Shapes only: no parameter exists until the checkpoint's own is put in its place.
    model = skeleton(cls, config, dtype=jnp.dtype(dtype))
    _choose("jax", model, attention, device)
    layouts = importlib.import_module("jax_models.layouts")
    if decoding and (device or jnp.zeros(()).devices().pop()).platform == "cpu":
        room = layouts.Room(model)
        for name, array in convert(checkpoint, "jax", dtype):
            room[_parameter(model, name)][...] = array
        return room.model(device)
    for name, array in convert(checkpoint, "jax", dtype):
        # may_alias False: the array must outlive the checkpoint's buffers.
        _parameter(model, name).set_value(jax.device_put(array, device, may_alias=False))
    return layouts.for_decoding(model) if decoding else model


def _parameter(module: Any, name: str) -> Any:
    """The parameter of a Flax module that a name ("layers.0.attn.q_proj.kernel") means."""
    for part in name.split("."):
        module = module[int(part)] if part.isdecimal() else getattr(module, part)
    return module


def _load_torch(checkpoint: Checkpoint, dtype: str, device: Any, attention: str, decoding: bool) -> Any:
    import torch

    config = checkpoint.config
    cls = getattr(importlib.import_module(f"torch_models.{config.architecture}"), config.model_class)
    with torch.device("meta"):  # shapes only, as above
        model = cls(config, dtype=getattr(torch, dtype))
    _choose("torch", model, attention, device)
    state = {}
    for name, array in convert(checkpoint, "torch", dtype):
        tensor = tensor_of(array)
        state[name] = tensor.to(device) if device is not None else tensor
    model.load_state_dict(state, assign=True, strict=True)
    if decoding:
        importlib.import_module("torch_models.layouts").for_decoding(model)
    return model.eval()


def tensor_of(array: Any) -> Any:
    """An array as a tensor, in its own memory where that is whole and may be written."""
    import numpy as np
    import torch

    array = np.require(array, requirements=["C", "W"])
    if array.dtype.name == "bfloat16":  # torch does not know numpy's bfloat16: pass the bits
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def load_config(source: Source) -> Config:
    """The configuration of a source; no weights are read."""
    with opened(source) as checkpoint:
        return checkpoint.config


def load_tokenizer(source: Source) -> Tokenizer:
    """The tokenizer of a source. Raises SourceError where it has none."""
    from twinformers.checkpoints.tokenizer import Tokenizer

    with opened(source) as checkpoint:
        if "tokenizer.json" not in checkpoint.assets:
            raise SourceError(
                "the source has no tokenizer",
                where=checkpoint.source,
                expected="tokenizer.json",
                hint="give token ids instead of text, or put the model's tokenizer.json into the folder",
            )
        return Tokenizer.from_assets(checkpoint.assets, checkpoint.source)
