"""A training step for every causal PyTorch twin: from the batch to the new weights, in place.

The state is given up and returned. Micro-batches follow one another in a loop, blocks are computed again in
the backward pass by policy, and the cross-entropy takes the sequence piece by piece: a piece's gradient is
taken at once, so that the logits of the whole never exist and no product of the head is made twice. On a mesh
(`twinformers.sharding.torch_side`) each process has its own rows, and what is summed is summed over all.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from torch_models.layers import at_least_float32, subkey
from torch_models.random import fold_in, key
from twinformers.errors import UsageError
from twinformers.training.adamw import AdamW, torch_adamw
from twinformers.training.step import Batch, Metrics, StepOptions, check_batch, check_model, random_batch

#: The products with a weight; those of attention have a batch dimension and go by another name.
DOTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in DOTS else CheckpointPolicy.PREFER_RECOMPUTE


# No generator is restored: what is random here follows from an explicit key.
CHECKPOINTS = {
    "dots": partial(
        checkpoint,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=partial(create_selective_checkpoint_contexts, _policy),
    ),
    "full": partial(checkpoint, use_reentrant=False, preserve_rng_state=False),
}


class State(NamedTuple):
    """What an update changes. A step writes it in place and returns it with one more update counted."""

    model: Any  # the master weights, as the module that was given
    compute: Any  # what computes: the same module, or its copy in another dtype
    optimizer: Any  # torch.optim's, the moments in it
    clip: Callable[[], None]  # the gradients, in place
    updates: int  # made so far


def make_step(model: Any, recipe: AdamW, *, compiled: bool = False, **options: Any) -> Step:
    """A training step: `state = step.init(model)`, then `state, metrics = step(state, batch)`.

    `compiled` runs model and loss through `torch.compile`; the other options are fields of `StepOptions`.
    For a model on a mesh a batch is this process's rows of it (`shard_batch`), micro-batches are counted
    within them, and dropout draws other masks than without the mesh. Raises UsageError for a bad option, a
    model that is no language model, weights narrower than float32, and what a mesh does not go with.
    """
    return Step(model, recipe, StepOptions(**options), compiled=compiled)


class Step:
    """The step of one model structure; see `make_step`."""

    def __init__(self, model: Any, recipe: AdamW, options: StepOptions, *, compiled: bool = False):
        check_model(model.config, {str(p.dtype).removeprefix("torch.") for p in model.parameters()})
        self._config, self._recipe, self._options = model.config, recipe, options
        self._mesh = getattr(model, "mesh", None)
        if self._mesh is not None and (compiled or options.compute_dtype):
            raise UsageError(
                "the step cannot do this on a mesh",
                where="compiled" if compiled else "compute_dtype",
                expected="a step without it",
                found="a model whose weights are gathered by hooks",
                hint="" if compiled else "give compute_dtype to `shard`, which gathers the weights in it",
            )
        compiler = partial(torch.compile, fullgraph=True, dynamic=False) if compiled else lambda f: f
        self._hidden, self._cost = compiler(_hidden), compiler(_cost)

    def init(self, model: Any) -> State:
        """The state before the first update. vs jax: the model itself is trained, not a copy of it."""
        if self._mesh is not None:
            model.reshard()  # what a call without a backward pass has left gathered
        optimizer, clip = torch_adamw(self._recipe, model)
        for group in optimizer.param_groups:
            group["fused"] = True  # the same formula in one pass over memory instead of ten
        compute = model
        if self._options.compute_dtype is not None:
            compute = copy.deepcopy(model).to(getattr(torch, self._options.compute_dtype))
            for narrow, master in zip(compute.parameters(), model.parameters(), strict=True):
                narrow.register_post_accumulate_grad_hook(partial(_hand_over, master))
        return State(model, compute, optimizer, clip, 0)

    def __call__(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """One update. Raises UsageError for a batch that does not fit."""
        model, compute, optimizer, clip, updates = state
        check_batch(batch, self._config.vocab_size, self._options.accumulate)
        device = next(model.parameters()).device
        tokens, positions, targets = (torch.as_tensor(x, device=device) for x in batch)
        targets = torch.where(positions >= 0, targets, -1).long()  # [B, T]
        # One mean over the whole batch: micro-batches and pieces may hold different numbers of real tokens.
        total = torch.clamp(self._sum(torch.sum(targets >= 0)), min=1)
        number, seed = updates + 1, self._options.seed
        update_key = None if seed is None else fold_in(key(seed, device), number)
        if self._mesh is not None:  # other rows, other masks
            update_key = subkey(update_key, _sharding().batch_index(self._mesh))
        optimizer.zero_grad(set_to_none=True)
        if compute is not model:
            with torch.no_grad():
                for narrow, master in zip(compute.parameters(), model.parameters(), strict=True):
                    narrow.copy_(master)
        loss = torch.zeros((), device=device)
        with torch.enable_grad(), _rematerialising(compute, self._options.remat):
            for index in range(self._options.accumulate):
                # Row r goes to micro-batch r mod n, as in JAX.
                rows = slice(index, None, self._options.accumulate)
                micro = tokens[rows].contiguous(), positions[rows].contiguous()
                x = self._hidden(compute, *micro, subkey(update_key, index))  # [B/n, T, D]
                cost, of_x = self._cross_entropy(compute, x, targets[rows], total)
                x.backward(of_x)
                loss = loss + cost
        trained = [p.grad for p in model.parameters() if p.grad is not None]
        if self._mesh is None:
            norm = torch.nn.utils.get_total_norm(trained)
        else:
            norm = _sharding().total_norm(trained, self._mesh)
        metrics = Metrics(self._sum(loss), norm)
        clip()
        for group in optimizer.param_groups:
            group["lr"] = self._recipe.rate(number)
        optimizer.step()
        return state._replace(updates=number), metrics

    def model(self, state: State) -> Any:
        """The twin with the state's weights, which the next step changes."""
        return state.model

    def _cross_entropy(
        self, compute: Any, x: torch.Tensor, targets: torch.Tensor, total: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss over `total` tokens and its gradient by x; the head's go to its parameters. [B, T, D]"""
        size = self._options.chunk or x.shape[1]
        loss, of_x = torch.zeros((), device=x.device), []
        pieces = list(zip(x.detach().split(size, 1), targets.split(size, 1), strict=True))
        for piece, wanted in pieces if self._mesh is None else _sharding().head_passes(compute, pieces):
            piece.requires_grad_()  # [B, size, D]
            cost = self._cost(compute, piece, wanted) / total
            cost.backward()
            of_x.append(piece.grad)
            loss = loss + cost.detach()
        return loss, torch.cat(of_x, dim=1)

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        """Over all rows of the batch, of which this process has some on a mesh."""
        return x if self._mesh is None else _sharding().summed(x, self._mesh)


def _sharding() -> Any:
    """What a step needs on a mesh alone: importing PyTorch's distributed engine takes its time."""
    return importlib.import_module("twinformers.sharding.torch_side")


def _hidden(
    model: Any, tokens: torch.Tensor, positions: torch.Tensor, key: torch.Tensor | None
) -> torch.Tensor:
    return model.hidden(tokens, positions, key=key)[0]


def _cost(model: Any, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over the targets, in at least float32. [B, T, D], [B, T] -> []"""
    logits = model.head(x)  # [B, T, V]
    wide = logits.to(at_least_float32(logits.dtype))
    return nn.functional.cross_entropy(
        wide.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"
    )


def _hand_over(master: nn.Parameter, narrow: nn.Parameter) -> None:
    """Add a gradient to that of the master weight as soon as it is known, and forget it."""
    gradient: Any = narrow.grad
    master.grad = gradient.to(master.dtype) if master.grad is None else master.grad.add_(gradient)
    narrow.grad = None


@contextlib.contextmanager
def _rematerialising(model: Any, remat: str) -> Iterator[None]:
    """While it lasts, every block of a model stores only what the policy says."""
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList) and remat != "none"]
    blocks: list[tuple[Any, Any]] = [(block, type(block)) for blocks in lists for block in blocks]
    for block, cls in blocks:
        block.__class__ = _rematerialised(cls, remat)
    try:
        yield
    finally:
        for block, cls in blocks:
            block.__class__ = cls


@functools.cache  # another class each time would be compiled each time
def _rematerialised(cls: Any, remat: str) -> type:
    def forward(self, *args, **kwargs):
        return CHECKPOINTS[remat](partial(cls.forward, self), *args, **kwargs)

    return type(cls.__name__, (cls,), {"forward": forward})


def measure(
    model: Any, batch: int, length: int, repeats: int, *, compiled: bool = False, **options: Any
) -> float:
    """Median seconds of a training step on `batch` rows of `length` random tokens; `options` of the step."""
    model = copy.deepcopy(model)  # the caller's keeps its weights
    step = make_step(model, AdamW(), compiled=compiled, **options)
    state, data = step.init(model), random_batch(model.config, batch, length)
    wait = torch.cuda.synchronize if next(model.parameters()).is_cuda else lambda: None
    state, _ = step(state, data)  # sets up
    seconds = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        state, _ = step(state, data)
        wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
