"""The training step: the same numbers as the parity trainer's however it is computed, in less memory."""

from __future__ import annotations

import functools
import importlib
import weakref
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from mutations.planting import Edit, planted
from torch.utils._python_dispatch import TorchDispatchMode

import jax_models.layers
import jax_models.llama
import torch_models.layers
import torch_models.llama
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.configs import preset
from twinformers.errors import UsageError
from twinformers.loading import load
from twinformers.parity.limits import limit
from twinformers.parity.training import FlaxRun, TorchRun
from twinformers.parity.twins import jax_precision
from twinformers.training.adamw import AdamW
from twinformers.training.step import Batch, following, random_batch
from twinformers.weight_maps import weight_map

TINY = preset("llama-tiny")
#: One layer, where more would only take longer to compile.
SMALL = TINY.replace(num_hidden_layers=1)
CONFIGS = {"untied": TINY, "tied": TINY.replace(tie_word_embeddings=True), "small": SMALL}
RECIPE = AdamW(warmup=2, steps=4)
FRAMEWORKS = ("jax", "torch")
UPDATES = (1, 2)
JAX, TORCH = "twinformers.training.jax_step", "twinformers.training.torch_step"


def module(framework):
    return importlib.import_module(f"twinformers.training.{framework}_step")


def begin(framework, config, dtype="float64", **options):
    """A step and its first state."""
    model = load(PresetCheckpoint("test", config), framework, dtype)
    step = module(framework).make_step(model, RECIPE, **options)
    return step, step.init(model)


def uneven(number):
    """Four rows with 19, 14, 7 and 1 real tokens: micro-batches of very unequal weight, one of them none."""
    tokens = np.random.default_rng(number).integers(0, TINY.vocab_size, (4, 19)).astype(np.int32)
    positions = np.tile(np.arange(19, dtype=np.int32), (4, 1))
    positions[1] = np.r_[-np.ones(5), 30 + np.arange(14)]
    positions[2, 7:] = positions[3, 1:] = -1
    return tokens, positions


def targets(tokens, positions):
    """Each token's successor and where there is one, in loops."""
    wanted, real = np.zeros_like(tokens), np.zeros_like(tokens)
    for b, t in np.ndindex(tokens.shape[0], tokens.shape[1] - 1):
        if positions[b, t] >= 0 and positions[b, t + 1] == positions[b, t] + 1:
            wanted[b, t], real[b, t] = tokens[b, t + 1], 1
    return wanted, real


def batch(number):
    """`uneven`, with targets that mean nothing wherever a token is padding."""
    tokens, positions = uneven(number)
    wanted, real = targets(tokens, positions)
    wanted = np.where(real, wanted, -1)
    wanted[positions < 0] = 7
    return Batch(tokens, positions, wanted)


@functools.cache
def trained(name):
    """Losses of the parity trainers, and their states after the updates."""
    runs = {}
    with jax_precision("float64"):
        for framework, cls in (("jax", FlaxRun), ("torch", TorchRun)):
            run = cls(PresetCheckpoint("test", CONFIGS[name]), "float64", None, RECIPE)
            losses = [run.update(uneven(n), *targets(*uneven(n)), n, RECIPE.rate(n)) for n in UPDATES]
            runs[framework] = losses, run.state()
    return runs


def arrays(framework, config, state):
    """Weights and moments in the torch twin's names and layout, as the parity trainers give theirs."""
    if framework == "jax":
        leaves = weight_map(config).leaves("jax")
        return FlaxRun.state(
            SimpleNamespace(_params=state.params, _optimizer=state.optimizer, _leaves=leaves)
        )
    return TorchRun.state(
        SimpleNamespace(_optimizer=state.optimizer, _trained=dict(state.model.named_parameters()))
    )


def check_same_numbers(framework, name="untied", **options):
    with jax_precision("float64"):
        step, state = begin(framework, CONFIGS[name], **options)
        losses = []
        for n in UPDATES:
            state, metrics = step(state, batch(n))
            losses.append(float(metrics.loss))
    assert state.updates == len(UPDATES)
    found, worst = arrays(framework, CONFIGS[name], state), 0.0
    for expected_losses, expected in trained(name).values():
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-13)
        for what, tensors in expected.items():
            assert found[what].keys() == tensors.keys()
            for path, x in tensors.items():
                worst = max(worst, np.abs(found[what][path] - x).max() / np.abs(x).max())
    print(f"{framework} {name} {options}: {worst:.1e}")
    assert worst <= limit("training", "float64")


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 2, "remat": "dots", "chunk": 5},
        {"accumulate": 4, "remat": "full", "chunk": 1},
        {"remat": "dots"},
        {"remat": "full", "chunk": 64},
        {"accumulate": 4},
        {"accumulate": 2, "chunk": 19},
    ],
    ids=str,
)
def test_step_matches_parity_trainers(framework, options):
    check_same_numbers(framework, **options)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_step_matches_parity_trainers_where_the_head_is_the_embedding(framework):
    check_same_numbers(framework, "tied", accumulate=2, remat="full", chunk=5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "remat": "full"}, {"remat": "dots"}], ids=str)
def test_torch_compiled_matches_parity_trainers(options):
    torch.compiler.reset()
    check_same_numbers("torch", compiled=True, **options)


def test_fused_adamw_matches_the_plain_one():
    """What the step sets in the optimizer that the parity trainer does not."""
    (_, fused), (_, plain) = begin("torch", TINY), begin("torch", TINY)
    for group in plain.optimizer.param_groups:
        group["fused"] = False
    rng = np.random.default_rng(0)
    for _ in range(20):
        for p, q in zip(fused.model.parameters(), plain.model.parameters(), strict=True):
            p.grad = torch.from_numpy(rng.standard_normal(p.shape))
            q.grad = p.grad.clone()
        fused.optimizer.step(), plain.optimizer.step()
    assert all(group["fused"] for group in fused.optimizer.param_groups)
    for p, q in zip(fused.model.parameters(), plain.model.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-12 * q.abs().max()


class FlaxDropping(jax_models.llama.Llama):
    def hidden(self, tokens, positions, cache=None, *, key=None):
        x, cache = super().hidden(tokens, positions, cache)
        return jax_models.layers.dropout(x, 0.3, key), cache


class TorchDropping(torch_models.llama.Llama):
    def hidden(self, tokens, positions, cache=None, *, key=None):
        x, cache = super().hidden(tokens, positions, cache)
        return torch_models.layers.dropout(x, 0.3, key), cache


def check_dropout(framework):
    """Losses of two updates against the model called by hand with the keys that are promised."""
    random = importlib.import_module(f"{framework}_models.random")
    put = {"jax": np.asarray, "torch": torch.from_numpy}[framework]
    with jax_precision("float64"):
        model = load(PresetCheckpoint("test", SMALL), framework, "float64")
        model.__class__ = {"jax": FlaxDropping, "torch": TorchDropping}[framework]
        step = module(framework).make_step(model, RECIPE, accumulate=2, chunk=5, remat="full", seed=3)
        state = step.init(model)
        for n in UPDATES:
            costs = 0.0
            for m in (0, 1):
                micro = tuple(x[m::2].copy() for x in uneven(n))
                key = random.fold_in(random.fold_in(random.key(3), n), m)
                with torch.no_grad():
                    logits = np.asarray(step.model(state)(*map(put, micro), key=key)[0])
                chosen, real = targets(*micro)
                odds = (
                    np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, chosen[..., None], -1)[..., 0]
                )
                costs += (odds * real).sum()
            state, metrics = step(state, batch(n))
            assert float(metrics.loss) == pytest.approx(costs / targets(*uneven(n))[1].sum(), rel=1e-12)
    return arrays(framework, SMALL, state)["weights"]


def test_dropout_folds_update_and_micro_batch_in_and_twins_agree():
    left, right = map(check_dropout, FRAMEWORKS)
    for path, x in left.items():
        assert np.abs(right[path] - x).max() <= limit("training", "float64") * np.abs(x).max()


def recorded(framework, step, state, data, monkeypatch):
    """The step's result, and the dtypes of what every kind of submodule below the head returned."""
    seen = set()

    def note(module, output):
        seen.add((type(module).__name__, str((output[0] if isinstance(output, tuple) else output).dtype)))

    if framework == "torch":
        handle = torch.nn.modules.module.register_module_forward_hook(lambda m, _, x: note(m, x))
        try:
            return *step(state, data), seen
        finally:
            handle.remove()

    def noting(original):
        def call(self, *args, **kwargs):
            output = original(self, *args, **kwargs)
            note(self, output)
            return output

        return call

    with monkeypatch.context() as patch:
        for cls in (*vars(jax_models.llama).values(), nnx.Embed):
            if isinstance(cls, type) and issubclass(cls, nnx.Module) and "__call__" in vars(cls):
                patch.setattr(cls, "__call__", noting(cls.__call__))
        return *step(state, data), seen


def check_mixed_precision(framework, monkeypatch):
    data, losses = batch(1), {}
    for dtype in (None, "bfloat16"):
        step, state = begin(framework, SMALL, "float32", compute_dtype=dtype, chunk=5, accumulate=2)
        state, metrics, seen = recorded(framework, step, state, data, monkeypatch)
        assert "float32" in str(metrics.loss.dtype) and "float32" in str(metrics.norm.dtype)
        losses[dtype] = float(metrics.loss), float(metrics.norm)
    kinds = {"Block", "Attention", "MLP", "RMSNorm", "Linear"}
    assert kinds <= {kind for kind, _ in seen}
    assert {dtype.removeprefix("torch.") for _, dtype in seen} == {"bfloat16"}
    held = (
        jax.tree.leaves((state.params, state.optimizer.inner_state[0].mu, state.optimizer.inner_state[0].nu))
        if framework == "jax"
        else [x for p in state.model.parameters() for x in (p, p.grad, *state.optimizer.state[p].values())]
    )
    assert {str(x.dtype).removeprefix("torch.") for x in held} == {"float32"}
    (loss, norm), (narrow, narrow_norm) = losses[None], losses["bfloat16"]
    print(f"{framework}: loss {loss:.6f} and {narrow:.6f}, norm {norm:.4f} and {narrow_norm:.4f}")
    # Half a unit in the last of bfloat16's 8 bits, for the loss as a whole.
    assert 0 < abs(narrow - loss) <= 2**-8 * loss
    assert 0 < abs(narrow_norm - norm) <= 2**-5 * norm


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_mixed_precision_computes_in_bfloat16_and_keeps_float32(framework, monkeypatch):
    check_mixed_precision(framework, monkeypatch)


def check_state_is_given_up(framework):
    step, state = begin(framework, SMALL, "float32")
    model = load(PresetCheckpoint("test", SMALL), framework, "float32") if framework == "torch" else None
    after, _ = step(state, batch(1))
    if framework == "jax":
        adam = state.optimizer.inner_state[0]
        assert all(x.is_deleted() for x in jax.tree.leaves((state.params, adam)))
        assert not any(x.is_deleted() for x in jax.tree.leaves(after[:3]))
        return
    old, new = list(state.model.parameters()), list(after.model.parameters())
    assert all(p is q for p, q in zip(old, new, strict=True))
    assert any((p != q).any() for p, q in zip(new, model.parameters(), strict=True))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_state_is_given_up(framework):
    check_state_is_given_up(framework)


def test_flax_model_stays_whole_and_comes_back_trained():
    model = load(PresetCheckpoint("test", SMALL), "jax")
    before = np.asarray(model.norm.scale[...]).copy()
    step = module("jax").make_step(model, RECIPE)
    state, _ = step(step.init(model), batch(1))
    np.testing.assert_array_equal(model.norm.scale[...], before)
    back = step.model(state)
    assert (np.asarray(back.norm.scale[...]) != before).any()
    assert np.isfinite(back(*uneven(1))[0]).all()


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive among those that operations returned, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for x in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self.seen:
                storage, size = x.untyped_storage(), x.untyped_storage().nbytes()
                self.seen.add(storage)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, size)
        return output

    def _gone(self, size):
        self.now -= size


def memory(framework, config, length, **options):
    """Bytes that a step needs besides its state. Of JAX the compiler says it, of PyTorch it is watched."""
    step, state = begin(framework, config, "float32", **options)
    data = random_batch(config, 4, length)
    if framework == "jax":
        return step.lower(state, data).compile().memory_analysis().temp_size_in_bytes
    with Live() as live:
        step(state, data)
    return live.peak


def check_memory_of_blocks(framework):
    deep = TINY.replace(num_hidden_layers=4)
    sizes = {remat: memory(framework, deep, 96, remat=remat) for remat in ("none", "dots", "full")}
    sizes["accumulated"] = memory(framework, deep, 96, accumulate=4)
    print(framework, sizes)
    assert sizes["none"] > 1.5 * sizes["dots"] > 1.5 * sizes["full"]
    assert sizes["none"] > 2 * sizes["accumulated"]


def check_memory_of_logits(framework):
    """With this vocabulary the logits of all tokens are the largest part of it."""
    wide = SMALL.replace(vocab_size=6007)
    sizes = {chunk: memory(framework, wide, 96, chunk=chunk, remat="full") for chunk in (None, 24, 8)}
    print(framework, sizes)
    assert sizes[None] > 1.5 * sizes[24] > 1.5 * sizes[8]


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("check", [check_memory_of_blocks, check_memory_of_logits])
def test_memory_falls_with_remat_chunks_and_micro_batches(framework, check):
    check(framework)


def check_compiles_once():
    step, state = begin("jax", SMALL, "float32", accumulate=2)
    compiled = []

    def listen(event, seconds, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        state, _ = step(state, batch(1))
        first = len(compiled)
        for n in (2, 3):
            state, _ = step(state, batch(n))
        assert first > 0 and len(compiled) == first
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_compiles_on_the_second_step():
    check_compiles_once()


@pytest.mark.slow
def test_torch_compiles_nothing_on_the_second_step():
    torch.compiler.reset()
    step, state = begin("torch", SMALL, "float32", compiled=True, remat="full", accumulate=2, seed=1)
    state, _ = step(state, batch(1))
    with torch._dynamo.config.patch(error_on_recompile=True):
        step(state, batch(2))


def check_narrow_weights_follow():
    step, state = begin("torch", SMALL, "float32", compute_dtype="bfloat16")
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch(1))
        losses.append(float(metrics.loss))
    assert losses[0] > losses[1] > losses[2]


def test_narrow_weights_follow_their_masters():
    check_narrow_weights_follow()


def parity(framework):
    return lambda monkeypatch: check_same_numbers(framework, "small", accumulate=2, remat="full", chunk=5)


def dropping(framework):
    return lambda monkeypatch: check_dropout(framework)


def mixed(framework):
    return functools.partial(check_mixed_precision, framework)


MISTAKES = {
    "jax: mean of means": (
        Edit(f"{JAX}:Step._update", "x, targets, total)", "x, targets, jnp.sum(targets >= 0) * accumulate)"),
        parity("jax"),
    ),
    "torch: mean of means": (
        Edit(
            f"{TORCH}:Step.__call__",
            "targets[rows], total)",
            "targets[rows], (targets[rows] >= 0).sum() * 2)",
        ),
        parity("torch"),
    ),
    "jax: padding learned": (
        Edit(f"{JAX}:Step._update", "jnp.where(batch.positions >= 0, batch.targets, -1)", "batch.targets"),
        parity("jax"),
    ),
    "torch: padding learned": (
        Edit(f"{TORCH}:Step.__call__", "torch.where(positions >= 0, targets, -1).long()", "targets.long()"),
        parity("torch"),
    ),
    "jax: cost not masked": (
        Edit(f"{JAX}:_cost", "jnp.where(targets >= 0, chosen, 0)", "chosen"),
        parity("jax"),
    ),
    "torch: cost not masked": (
        Edit(f"{TORCH}:_cost", "targets.flatten()", "targets.flatten().clamp(min=0)"),
        parity("torch"),
    ),
    "jax: a chunk's gradient dropped": (
        Edit(f"{JAX}:Step._cross_entropy", "carry, (loss, of_mine))", "(carry[0], mine), (loss, of_mine))"),
        parity("jax"),
    ),
    "torch: a chunk dropped": (
        Edit(
            f"{TORCH}:Step._cross_entropy",
            "            cost.backward()",
            "            (cost * bool(of_x)).backward()",
        ),
        parity("torch"),
    ),
    "jax: no cast": (
        Edit(f"{JAX}:Step._twin", "x.astype(dtype)", "x"),
        mixed("jax"),
    ),
    "torch: no cast": (
        Edit(f"{TORCH}:Step.init", ".to(getattr(torch, self._options.compute_dtype))", ""),
        mixed("torch"),
    ),
    "torch: narrow weights never renewed": (
        Edit(f"{TORCH}:Step.__call__", "narrow.copy_(master)", "narrow.copy_(narrow)"),
        lambda monkeypatch: check_narrow_weights_follow(),
    ),
    "jax: a key for all micro-batches": (
        Edit(f"{JAX}:Step._update", "subkey(update_key, index)", "update_key"),
        dropping("jax"),
    ),
    "torch: a key for all micro-batches": (
        Edit(f"{TORCH}:Step.__call__", "subkey(update_key, index)", "update_key"),
        dropping("torch"),
    ),
    "jax: a key for all updates": (
        Edit(f"{JAX}:Step._update", "fold_in(key(seed), number)", "fold_in(key(seed), 1)"),
        dropping("jax"),
    ),
    "torch: a key for all updates": (
        Edit(f"{TORCH}:Step.__call__", "fold_in(key(seed, device), number)", "fold_in(key(seed, device), 1)"),
        dropping("torch"),
    ),
    "jax: nothing given up": (
        Edit(f"{JAX}:Step.__init__", "donate_argnums=(0, 1)", "donate_argnums=()"),
        lambda monkeypatch: check_state_is_given_up("jax"),
    ),
    "jax: no block computed again": (
        Edit(f"{JAX}:_rematerialised", "jax.checkpoint(", "(lambda f, policy: f)("),
        lambda monkeypatch: check_memory_of_blocks("jax"),
    ),
    "jax: the compiler undoes it": (
        Edit(f"{JAX}:Step.__init__", 'on_cpu and options.remat != "none"', "False"),
        lambda monkeypatch: check_memory_of_blocks("jax"),
    ),
    "torch: no block computed again": (
        Edit(f"{TORCH}:_rematerialising", 'remat != "none"', 'remat == "all"'),
        lambda monkeypatch: check_memory_of_blocks("torch"),
    ),
    "jax: logits of the whole": (
        Edit(f"{JAX}:Step._cross_entropy", "min(self._options.chunk or T, T)", "T"),
        lambda monkeypatch: check_memory_of_logits("jax"),
    ),
    "torch: logits of the whole": (
        Edit(f"{TORCH}:Step._cross_entropy", "self._options.chunk or x.shape[1]", "x.shape[1]"),
        lambda monkeypatch: check_memory_of_logits("torch"),
    ),
    "jax: compiled for each number": (
        Edit(f"{JAX}:Step.__init__", "donate_argnums=(0, 1)", "donate_argnums=(0, 1), static_argnums=(5,)"),
        lambda monkeypatch: check_compiles_once(),
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n.startswith("jax") else ()) for n in MISTAKES]
)
def test_planted_mistake_is_caught(name, monkeypatch):
    edit, check = MISTAKES[name]
    with planted([edit]), pytest.raises(AssertionError):
        check(monkeypatch)


def test_following_matches_loops():
    found = following(*uneven(1))
    wanted, real = targets(*uneven(1))
    np.testing.assert_array_equal(found.targets, np.where(real, wanted, -1))
    assert (found.targets >= 0).sum(1).tolist() == [18, 13, 6, 0] and found.targets.dtype == np.int32


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_batch_without_targets_only_decays(framework):
    step, state = begin(framework, SMALL, "float32")
    tokens, positions = uneven(1)
    state, metrics = step(state, Batch(tokens, np.full_like(positions, -1), tokens))
    assert float(metrics.loss) == 0 and float(metrics.norm) == 0
    assert all(np.isfinite(x).all() for x in arrays(framework, SMALL, state)["weights"].values())


TOO_LARGE = Batch(np.full((4, 3), 251, np.int32), np.zeros((4, 3), np.int32), np.zeros((4, 3), np.int32))
BAD = {
    "remat": ({"remat": "some"}, batch(1), "remat: unknown value"),
    "dtype": ({"compute_dtype": "float8"}, batch(1), "compute_dtype: unknown value"),
    "accumulate": ({"accumulate": 0}, batch(1), "accumulate: bad value"),
    "chunk": ({"chunk": -1}, batch(1), "chunk: bad value"),
    "rows": ({"accumulate": 3}, batch(1), "multiple of accumulate = 3 rows"),
    "shapes": ({}, batch(1)._replace(targets=np.zeros((4, 18), np.int32)), r"targets: .*\n.*\n.*\[4, 18\]"),
    "token": ({}, TOO_LARGE, r"tokens: .*outside the vocabulary\n.*0 to 250\n.*251 to 251"),
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(framework, name):
    options, data, message = BAD[name]
    with pytest.raises(UsageError, match=message):
        step, state = begin(framework, SMALL, "float32", **options)
        step(state, data)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_unsuitable_model_is_refused(framework):
    with pytest.raises(UsageError, match="float32 or float64"):
        begin(framework, TINY, "bfloat16")
    with pytest.raises(UsageError, match="encoder-decoder"):
        begin(framework, preset("transformer-tiny"), "float32")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_measure_gives_seconds_and_leaves_the_model(framework):
    model = load(PresetCheckpoint("test", SMALL), framework)
    before = arrays_of(model)
    assert 0 < module(framework).measure(model, 2, 8, 3, accumulate=2) < 60
    for x, y in zip(before, arrays_of(model), strict=True):
        np.testing.assert_array_equal(x, y)


def arrays_of(model):
    if isinstance(model, torch.nn.Module):
        return [p.detach().numpy().copy() for p in model.parameters()]
    return [np.array(x) for x in jax.tree.leaves(nnx.state(model))]
