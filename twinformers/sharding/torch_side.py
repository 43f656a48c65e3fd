"""A PyTorch twin on many devices: tensor parallelism by DTensor, the rest by FSDP2 (`fully_shard`).

One process for each device runs the same script, `torchrun --nproc-per-node 8 SCRIPT`; on several hosts
`torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 SCRIPT`. vs the JAX
side: a process has its own rows of the batch and of the cache, and sees no others.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils import _pytree as pytree

from torch_models import layers
from twinformers.allocator import give_back
from twinformers.errors import UsageError
from twinformers.sharding import AXES, BATCH, DATA, FSDP, TENSOR, axes
from twinformers.weight_maps import weight_map

#: What training and generation call of a model besides itself: there, too, its weights must be whole.
CALLS = ("hidden", "head", "encode", "cross_cache", "decode", "decode_hidden", "mean", "first")
DTYPES = ("bfloat16", "float16", "float32")


def make_mesh(
    *, data: int = 1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, device: str | None = None
) -> DeviceMesh:
    """A mesh of so many processes along each axis, on "cuda" or "cpu" (default: what there is).

    Neighbours along "tensor" tell each other the most: they are next to each other in rank. Raises UsageError
    where the sizes do not fit the processes, where none have been launched, and for a "sequence": the PyTorch
    side shares out no row's tokens.
    """
    if sequence != 1:
        raise UsageError(
            "PyTorch's twins share out rows and weights, not the tokens of a row",
            where="mesh",
            expected="sequence=1",
            found=f"sequence={sequence}",
            hint="use the Flax twin, or more of tensor",
        )
    check_launched("SCRIPT")
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    sizes = (data, fsdp, tensor)
    if min(sizes) < 1 or math.prod(sizes) != world:
        raise UsageError(
            "the mesh does not fit the processes",
            where="mesh",
            expected=f"positive sizes whose product is {world}",
            found=" x ".join(f"{name} {size}" for name, size in zip(AXES, sizes, strict=True)),
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return init_device_mesh(device, sizes, mesh_dim_names=AXES)


def check_launched(program: str) -> None:
    """Raise UsageError where this process was not launched with others."""
    if not dist.is_initialized() and "WORLD_SIZE" not in os.environ:
        raise UsageError(
            "no processes have been launched",
            where="mesh",
            expected="a process for each device, which know of each other",
            found="one process on its own",
            hint=f"torchrun --nproc-per-node 8 {program}",
        )


def shard(model: Any, mesh: DeviceMesh, *, compute_dtype: str | None = None) -> Any:
    """Share out a model's parameters over the mesh, in place; the model is returned, with `model.mesh`.

    Every process brings the same weights and keeps its part. "tensor" cuts what the rules of
    `twinformers.sharding` say, apart from attention whose heads do not divide and an embedding that is also
    the head; "fsdp" cuts each block and what is outside of them; "data" cuts nothing. `compute_dtype` is what
    the model computes in (default: that of its weights, which stay as they are). From then on `empty_cache`
    counts this process's rows and holds its heads. Raises UsageError for another dtype, for a model that has
    a mesh already or is not as it was loaded, and as `axes` does.
    """
    cut(model, mesh, compute_dtype)
    gather_once(model)
    return model


def cut(model: Any, mesh: DeviceMesh, compute_dtype: str | None) -> None:
    """What `shard` does, as far as it needs no values: the model may lie on the "meta" device."""
    if compute_dtype not in (None, *DTYPES):
        raise UsageError(
            "unknown value",
            where="compute_dtype",
            expected=", ".join(["None", *DTYPES]),
            found=repr(compute_dtype),
        )
    leaves = weight_map(model.config).leaves("torch")
    expected = {name for name, leaf in leaves.items() if leaf.trains}
    if hasattr(model, "mesh") or {name for name, _ in model.named_parameters()} != expected:
        raise UsageError(
            "the model cannot be shared out",
            where=model.config.architecture,
            expected="a model as it was loaded, with all parameters that its configuration says",
            found="one on a mesh" if hasattr(model, "mesh") else "one with other parameters",
        )
    _cut(model, mesh)
    _split(model, mesh, compute_dtype)
    if hasattr(model, "empty_cache"):
        heads = model.empty_cache(1, 1).k.shape[2]
        parts = mesh.size(AXES.index(TENSOR))
        dtype = getattr(torch, compute_dtype) if compute_dtype else None
        own = heads if heads % parts else heads // parts
        model.empty_cache = partial(_empty_cache, model.empty_cache, own, dtype)
    model.mesh = mesh


def gather_once(model: nn.Module) -> None:
    """Gather each block and let it go: what inference mode gathered first could not be gathered again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()
            give_back()  # the C library would keep about a block for each block


def _cut(model: Any, mesh: DeviceMesh) -> None:
    """Tensor parallelism: a linear layer is cut on its output or on its input, by the rule of its kernel."""
    sizes = {name: mesh.size(i) for i, name in enumerate(AXES)}
    if sizes[TENSOR] == 1:
        return
    whole = _undivided(model, sizes[TENSOR])
    if model.config.tie_word_embeddings:
        whole.add("embed")  # a table that is the head as well
    plan: dict[str, ParallelStyle] = {}
    for name, leaf in weight_map(model.config).leaves("torch").items():
        if not leaf.trains:
            continue  # a buffer
        path = name.rpartition(".")[0]
        cut = axes(leaf.name("jax"), leaf.shape("jax"), sizes)
        if TENSOR not in cut or path in whole:
            continue
        if isinstance(model.get_submodule(path), nn.Embedding):
            plan[path] = RowwiseParallel(input_layouts=Replicate())
        elif cut.index(TENSOR) == 0:  # a kernel is [in, out]
            plan[path] = RowwiseParallel()
        else:
            # Behind the head there is no layer that goes on with a part.
            plan[path] = ColwiseParallel(output_layouts=None if "." in path else Replicate())
    for path in plan:
        module: Any = model.get_submodule(path)
        if type(module) is layers.Linear:
            # The order of a product that the CPU likes better knows nothing of parts.
            module.__class__ = nn.Linear  # type: ignore[assignment]
    # Every process has the weights: none is told them by another one.
    parallelize_module(model, mesh[TENSOR], plan, src_data_rank=None)
    # What several layers read goes in as one DTensor: the parts of its gradient are then added up once.
    leads = Counter(path.rpartition(".")[0] for path in plan if isinstance(plan[path], ColwiseParallel))
    for path in [path for path, count in leads.items() if count > 1]:
        model.get_submodule(path).register_forward_pre_hook(partial(_enter, mesh[TENSOR]))


def _enter(mesh: DeviceMesh, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *rest = arguments
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False), *rest


def _undivided(model: nn.Module, parts: int) -> set[str]:
    """The projections of every attention whose heads cannot be shared out evenly."""
    found = set()
    for path, module in model.named_modules():
        if "attend" in vars(module):
            outputs = {name: child for name, child in module.named_children() if name in ("q_proj", "k_proj")}
            if any(child.out_features // module.head_dim % parts for child in outputs.values()):
                found |= {f"{path}.{name}" for name, _ in module.named_children()}
    return found


def _split(model: Any, mesh: DeviceMesh, compute_dtype: str | None) -> None:
    """FSDP2, as HSDP where the data axis holds copies: each block is gathered when it is its turn."""
    weights = next(model.parameters()).dtype
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, compute_dtype) if compute_dtype else None,
        reduce_dtype=weights,
        cast_forward_inputs=False,  # rotary angles stay wide; what else goes in is already narrow
    )
    parts = mesh.size(AXES.index(FSDP))
    # What a linear layer returns may be a view. The models change none in place.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDP\w+\) returned a view tensor")

    def axis(parameter: nn.Parameter) -> Shard | None:
        """Another one than "tensor" cuts, where there is one that divides; FSDP's own choice is the first."""
        cut = isinstance(parameter, DTensor) and parameter.placements == (Shard(0),)
        return Shard(1) if cut and parameter.ndim == 2 and parameter.shape[1] % parts == 0 else None

    share = partial(
        fully_shard,
        mesh=mesh[BATCH] if mesh.size(AXES.index(DATA)) > 1 else mesh[FSDP],
        mp_policy=policy,
        shard_placement_fn=axis,
    )
    for blocks in [child for child in model.children() if isinstance(child, nn.ModuleList)]:
        for block in blocks:
            if (cross := getattr(block, "cross_attn", None)) is not None:
                for projection in (cross.k_proj, cross.v_proj):
                    share(projection)  # these are called before it is the block's turn
            share(block)
    share(model)
    for name in CALLS:
        if hasattr(type(model), name):  # a method, and no module of that name
            register_fsdp_forward_method(model, name)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the tokens of all processes: gradients are added up, not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no sum with a factor


def _empty_cache(
    original: Any, heads: int, dtype: torch.dtype | None, batch: int, length: int
) -> layers.KVCache:
    """A cache for this process's rows, with the heads that it computes, in the dtype that it computes in."""
    k = original(1, 1).k  # [L, 1, K, 2, H]
    sizes = (k.shape[0], batch, length, heads, k.shape[4])
    return layers.empty_cache(*sizes, dtype=dtype or k.dtype, device=k.device)


def shard_batch(tree: Any, mesh: DeviceMesh) -> Any:
    """This process's rows of arrays or tensors whose first axis is the batch, as tokens and positions.

    Blocks of rows lie over (data, fsdp) in this order, as on the JAX side; all along "tensor" get the same.
    Raises UsageError where the rows cannot be shared out evenly.
    """
    parts = math.prod(mesh.size(AXES.index(name)) for name in BATCH)
    part = batch_index(mesh)

    def rows(x: Any) -> Any:
        if x.shape[0] % parts:
            raise UsageError(
                "the batch cannot be shared out",
                where="batch",
                expected=f"a multiple of {parts} rows ({' x '.join(BATCH)})",
                found=str(x.shape[0]),
            )
        size = x.shape[0] // parts
        return x[part * size : (part + 1) * size]

    return pytree.tree_map(rows, tree)


def batch_index(mesh: DeviceMesh) -> int:
    """Which block of a batch's rows this process has."""
    return mesh.get_local_rank(DATA) * mesh.size(AXES.index(FSDP)) + mesh.get_local_rank(FSDP)


def summed(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The sum of a tensor over all blocks of a batch, as a new tensor."""
    x = x.detach().clone()
    for name in BATCH:
        dist.all_reduce(x, group=mesh.get_group(name))
    return x


def total_norm(gradients: list[Any], mesh: DeviceMesh) -> torch.Tensor:
    """The length of all gradients together, each a DTensor that FSDP has reduced. -> []

    torch.nn.utils.get_total_norm wants all of them on one mesh. Here those that "tensor" cuts are on another
    one than those that it does not, so squares are added up as plain numbers, in two sums between processes.
    """
    cut: list[torch.Tensor] = []
    whole: list[torch.Tensor] = []
    for x in gradients:
        names = x.device_mesh.mesh_dim_names
        parted = TENSOR in names and x.placements[names.index(TENSOR)].is_shard()
        (cut if parted else whole).append(x.to_local())
    zero = torch.zeros_like(gradients[0].to_local().sum())
    squares = [zero + torch.nn.utils.get_total_norm(part).to(zero) ** 2 for part in (cut, whole)]
    dist.all_reduce(squares[0], group=mesh.get_group(TENSOR))
    square = squares[0] + squares[1]
    dist.all_reduce(square, group=mesh.get_group(FSDP))
    return torch.sqrt(square)


def head_passes(model: Any, pieces: Sequence[Any]) -> Iterator[Any]:
    """Yield pieces of which each sees a backward pass of the head alone, before that of the whole.

    What is outside of the blocks stays gathered for all of them, and the gradients there are reduced once,
    with the last piece's: FSDP accumulates in a wider dtype than it would find those of the rest in.
    """
    model.set_is_last_backward(False)
    model.set_reshard_after_backward(False, recurse=False)
    try:
        for number, piece in enumerate(pieces, 1):
            model.set_requires_gradient_sync(number == len(pieces), recurse=False)
            yield piece
    finally:
        model.set_requires_gradient_sync(True, recurse=False)
        model.set_reshard_after_backward(True, recurse=False)
        model.set_is_last_backward(True)
