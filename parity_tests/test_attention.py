"""The attention mechanisms: Flax against PyTorch, against plain numpy and against both frameworks' own."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jax_models.attention
import jax_models.layers
import torch_models.attention
import torch_models.layers
from jax_models import functional
from twinformers.errors import UsageError
from twinformers.weight_maps.attention import weight_map

LIMIT, GRADIENT_LIMIT = 1e-12, 1e-10
FRAMEWORKS = ("jax", "torch")
MODELS = {"jax": jax_models.attention, "torch": torch_models.attention}
LAYERS = {"jax": jax_models.layers, "torch": torch_models.layers}
ROWS, LENGTH, WIDTH, HEADS, GROUPS, SIZE, WINDOW = 3, 23, 14, 6, 2, 5, 7  # B T D N K H W: no two agree


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


@dataclass(frozen=True)
class Shape:
    """A class of the twins with its sizes: the arguments it takes, and the heads it then has."""

    name: str
    D: int = WIDTH
    N: int = HEADS
    K: int = HEADS
    H: int = SIZE

    @property
    def arguments(self):
        heads = {"SelfAttention": (), "GroupedQueryAttention": (self.N, self.K)}
        return (self.D, *heads.get(self.name, (self.N,)), self.H)

    def table(self, use_bias):
        return weight_map(self.D, self.N, self.K, self.H, use_bias=use_bias)


SHAPES = {
    "one-head": Shape("SelfAttention", N=1, K=1),
    "multi-head": Shape("MultiHeadAttention"),
    "cached": Shape("CachedMultiHeadAttention"),
    "multi-query": Shape("MultiQueryAttention", K=1),
    "grouped-query": Shape("GroupedQueryAttention", K=GROUPS),
}


def moved(table, arrays, source, target):
    return {name: table.produce(name, target, arrays.__getitem__, source) for name in table.tensors(target)}


def draw(table, seed=3):
    """Weights in the layout of the PyTorch twin: nothing symmetric, biases away from 0."""
    rng = np.random.default_rng(seed)
    shapes = {name: leaf.shape("torch") for name, leaf in table.leaves("torch").items()}
    return {
        name: rng.standard_normal(shape) * (1.5 / np.sqrt(shape[1]) if len(shape) == 2 else 0.5)
        for name, shape in shapes.items()
    }


def inputs(length=LENGTH, width=WIDTH, seed=5):
    """Rows with no, left and right padding; the second one begins at position 230. [B, T, D], [B, T]"""
    rng = np.random.default_rng(seed)
    positions = np.tile(np.arange(length, dtype=np.int32), (ROWS, 1))
    left, right = length // 4, length // 3
    positions[1] = np.r_[-np.ones(left), 230 + np.arange(length - left)]
    positions[2, length - right :] = -1
    return rng.standard_normal((ROWS, length, width)), positions


def fill(module, framework, arrays, device):
    """The module with these weights, given by its own names, on that device."""
    if framework == "torch":
        state = {name: torch.tensor(np.ascontiguousarray(a)) for name, a in arrays.items()}
        module.load_state_dict(state, strict=True)
        return module.to(device)
    graphdef, state = nnx.split(module)
    params = nnx.to_pure_dict(state)
    assert {f"{m}.{leaf}" for m in params for leaf in params[m]} == arrays.keys()
    for name, array in arrays.items():
        path, _, leaf = name.partition(".")
        assert params[path][leaf].shape == array.shape
        params[path][leaf] = jax.device_put(array, device)
    return nnx.merge(graphdef, params)


class Module:
    """One twin in float64, with weights through the map; takes and gives numpy arrays."""

    def __init__(self, framework, shape, device, *, weights=None, causal=True, window=None, use_bias=True):
        options = {"window": window, "use_bias": use_bias}
        if shape.name != "CachedMultiHeadAttention":
            options["causal"] = causal
        cls, table = getattr(MODELS[framework], shape.name), shape.table(use_bias)
        weights = moved(table, draw(table) if weights is None else weights, "torch", framework)
        if framework == "jax":
            # Shapes only: drawing initial values would compile a program for each of them.
            module = nnx.eval_shape(
                lambda: cls(*shape.arguments, dtype=jnp.float64, rngs=nnx.Rngs(0), **options)
            )
        else:
            module = cls(*shape.arguments, dtype=torch.float64, **options)
        self.framework, self.device = framework, device
        self.module = fill(module, framework, weights, device)
        self.call, self.weigh = self.module, self.module.weights
        if framework == "jax":
            # A function of its own for each module: what a test plants must not be compiled away.
            (call, params), (weigh, _) = functional(self.module), functional(self.module, "weights")
            self.call = partial(jax.jit(call, donate_argnames="cache"), params)
            self.weigh = partial(jax.jit(weigh), params)

    def put(self, x):
        return put(x, self.framework, self.device)

    def weights(self, x, positions):
        with torch.inference_mode():
            return numpy(self.weigh(self.put(x), self.put(positions)))

    def __call__(self, x, positions):
        with torch.inference_mode():
            out = self.call(self.put(x), self.put(positions))
        return numpy(out[0] if isinstance(out, tuple) else out)

    def cached(self, x, positions, chunks, length, cache=None):
        """The output of consecutive calls on slices of T, and the cache after them."""
        cache = self.module.empty_cache(len(x), length) if cache is None else cache
        parts = []
        with torch.inference_mode():
            for part in chunks:
                out, cache = self.call(self.put(x[:, part]), self.put(positions[:, part]), cache=cache)
                parts.append(numpy(out))
        return np.concatenate(parts, 1), cache


def put(x, framework, device):
    return jax.device_put(x, device) if framework == "jax" else torch.tensor(x, device=device)


def numpy(x):
    assert "float64" in str(x.dtype)
    return x.cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


@pytest.fixture
def devices(jax_device, torch_device):
    return {"jax": jax_device, "torch": torch_device}


def check(left, right, positions, limit=LIMIT):
    """Fails unless both agree at every real token, whose axis is the second last; NaN agrees with nothing."""
    real = np.broadcast_to((positions >= 0)[..., None], positions.shape + left.shape[-1:])
    if left.ndim == 4:
        real = np.broadcast_to(real[:, None], left.shape)
    assert left.shape == right.shape
    assert np.isfinite(left).all() and np.isfinite(right[real]).all()
    assert np.abs(left - right)[real].max() / np.abs(right[real]).max() <= limit


def sees(query, key, causal, window):
    """The rule for one query's position and one key's, in words of one syllable."""
    if key < 0:
        return False
    if causal and key > query:
        return False
    return window is None or query - window < key < query + window


def mask_by_rule(positions, causal, window):
    return np.array([[[sees(q, k, causal, window) for k in row] for q in row] for row in positions])


def by_hand(shape, weights, x, positions, causal, window):
    """Output and weights token by token and head by head, in plain numpy: [B, T, D] and [B, N, T, S]."""

    def project(name, x):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    B, T, _ = x.shape
    N, K, H = shape.N, shape.K, shape.H
    mask = mask_by_rule(positions, causal, window)
    found, mixed = np.zeros((B, N, T, T)), np.zeros((B, T, N * H))
    for b in range(B):
        q, k, v = (project(name, x[b]) for name in ("q_proj", "k_proj", "v_proj"))
        for n in range(N):
            own, shared = slice(n * H, (n + 1) * H), n // (N // K)
            shared = slice(shared * H, (shared + 1) * H)
            for t in range(T):
                keys = np.flatnonzero(mask[b, t])
                if positions[b, t] < 0:
                    continue
                scores = np.exp(k[keys, shared] @ q[t, own] / np.sqrt(H))
                found[b, n, t, keys] = scores / scores.sum()
                mixed[b, t, own] = found[b, n, t] @ v[:, shared]
    return project("o_proj", mixed), found


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_visible_matches_matrices_checked_by_eye(framework, devices):
    positions = np.array([[-1, 3, 4, 5, 6]], np.int32)
    expected = {
        (True, None): ["01000", "01100", "01110", "01111"],
        (True, 2): ["01000", "01100", "00110", "00011"],
        (True, 1): ["01000", "00100", "00010", "00001"],
        (False, None): ["01111", "01111", "01111", "01111"],
        (False, 2): ["01100", "01110", "00111", "00011"],
    }
    given_positions = put(positions, framework, devices[framework])
    for (causal, window), rows in expected.items():
        seen = LAYERS[framework].visible(given_positions, given_positions, window, causal=causal)
        found = ["".join(str(int(cell)) for cell in row) for row in np.asarray(seen.tolist())[0, 1:]]
        assert found == rows, (causal, window)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize(
    ("kind", "causal"),
    # What keeps a cache is causal by nature.
    [(kind, causal) for kind in SHAPES for causal in (True, False) if causal or kind != "cached"],
)
def test_twins_match_each_other_and_plain_numpy(kind, causal, window, use_bias, devices):
    shape, options = SHAPES[kind], {"causal": causal, "window": window, "use_bias": use_bias}
    x, positions = inputs()
    left, right = (Module(f, shape, devices[f], **options) for f in FRAMEWORKS)
    out, weights = by_hand(shape, draw(shape.table(use_bias)), x, positions, causal, window)
    weights = weights[:, 0] if kind == "one-head" else weights
    check(left(x, positions), right(x, positions), positions)
    check(left(x, positions), out, positions)
    check(right(x, positions), out, positions)
    check(left.weights(x, positions), right.weights(x, positions), positions)
    check(left.weights(x, positions), weights, positions)
    check(right.weights(x, positions), weights, positions)


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_twins_match_plain_numpy_at_random_shapes(data, devices):
    size = st.integers(1, 5)
    B, T, D, K, G, H = (data.draw(size, label=letter) for letter in "BTDKGH")
    causal, use_bias = data.draw(st.booleans()), data.draw(st.booleans())
    window = data.draw(st.none() | st.integers(1, 4))
    first = data.draw(st.lists(st.integers(0, 300), min_size=B, max_size=B), label="first positions")
    padding = data.draw(st.lists(st.integers(0, T - 1), min_size=B, max_size=B), label="padding")
    left_padded = data.draw(st.booleans())
    positions = np.full((B, T), -1, np.int32)
    for row in range(B):
        count = T - padding[row]
        start = padding[row] if left_padded else 0
        positions[row, start : start + count] = first[row] + np.arange(count)
    x = np.random.default_rng(B * T).standard_normal((B, T, D))
    shape = Shape("GroupedQueryAttention", D=D, N=K * G, K=K, H=H)
    out, weights = by_hand(shape, draw(shape.table(use_bias)), x, positions, causal, window)
    for framework in FRAMEWORKS:
        module = Module(framework, shape, devices[framework], causal=causal, window=window, use_bias=use_bias)
        check(module(x, positions), out, positions)
        check(module.weights(x, positions), weights, positions)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("general", "special"),
    [
        (Shape("GroupedQueryAttention"), Shape("MultiHeadAttention")),
        (Shape("GroupedQueryAttention", K=1), Shape("MultiQueryAttention", K=1)),
        (Shape("MultiHeadAttention", N=1, K=1), Shape("SelfAttention", N=1, K=1)),
        (Shape("MultiHeadAttention"), Shape("CachedMultiHeadAttention")),
    ],
    ids=lambda shape: shape.name,
)
def test_a_mechanism_that_contains_another_equals_it(framework, general, special, devices):
    x, positions = inputs()
    for window in (None, WINDOW):
        left, right = (
            Module(framework, shape, devices[framework], window=window) for shape in (general, special)
        )
        check(left(x, positions), right(x, positions), positions)
        a, b = left.weights(x, positions), right.weights(x, positions)
        check(a[:, 0] if b.ndim == 3 else a, b, positions)


# --- the cache


def slices(length, chunk):
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]


@pytest.mark.parametrize("chunk", [1, 5, 7, 48])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_cached_decoding_matches_full_pass(framework, window, chunk, devices):
    x, positions = inputs(length=48)
    module = Module(framework, SHAPES["cached"], devices[framework], window=window)
    # With a window the smallest cache that is allowed, which the longer rows overflow several times.
    length = 512 if window is None else window + chunk - 1
    found, _ = module.cached(x, positions, slices(48, chunk), length)
    check(found, module(x, positions), positions)


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_cached_rows_of_different_length_match_their_own_full_passes(framework, window, devices):
    prompts, width, steps = [9, 17, 23], 23, 12
    rng = np.random.default_rng(8)
    rows = [rng.standard_normal((n + steps, WIDTH)) for n in prompts]
    x, positions = np.zeros((ROWS, width + steps, WIDTH)), np.full((ROWS, width + steps), -1, np.int32)
    for row, n in enumerate(prompts):  # the prompts padded on the right, then one token per row and step
        x[row, :n], positions[row, :n] = rows[row][:n], np.arange(n)
        x[row, width:], positions[row, width:] = rows[row][n:], n + np.arange(steps)
    module = Module(framework, SHAPES["cached"], devices[framework], window=window)
    calls = [slice(0, width)] + [slice(t, t + 1) for t in range(width, width + steps)]
    found, _ = module.cached(x, positions, calls, 64 if window is None else window + width - 1)
    for row, n in enumerate(prompts):
        alone = module(rows[row][None], np.arange(n + steps, dtype=np.int32)[None])
        check(found[row : row + 1, positions[row] >= 0], alone, np.zeros((1, n + steps)))


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_cache_reordered_along_its_batch_axis_follows_its_beams(framework, window, devices):
    x, positions = inputs(length=30)
    beams, half = np.array([2, 0, 0]), 19
    module = Module(framework, SHAPES["cached"], devices[framework], window=window)
    _, cache = module.cached(x, positions, [slice(0, half)], 64)
    index = module.put(beams)
    cache = cache._replace(k=cache.k[:, index], v=cache.v[:, index], positions=cache.positions[index])
    second = np.random.default_rng(2).standard_normal((ROWS, 30 - half, WIDTH))
    last = positions[beams, :half].max(1, keepdims=True)
    places = (last + 1 + np.arange(30 - half)).astype(np.int32)
    found, _ = module.cached(second, places, slices(30 - half, 1), 64, cache)
    whole_x = np.concatenate([x[beams, :half], second], 1)
    whole_positions = np.concatenate([positions[beams, :half], places], 1)
    check(found, module(whole_x, whole_positions)[:, half:], places)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_window_needs_window_plus_tokens_minus_one_slots(framework, devices, monkeypatch):
    x, positions = inputs(length=48)
    module = Module(framework, SHAPES["cached"], devices[framework], window=WINDOW)
    with pytest.raises(UsageError) as error:
        module.cached(x, positions, slices(48, 5), WINDOW + 5 - 2)
    assert "call of 5 tokens" in str(error.value) and "window of 7" in str(error.value)
    assert "= 11 slots" in error.value.expected and error.value.found == "10 slots"
    # The bound is exact: with one slot less, and nobody to say so, keys are lost.
    place = LAYERS[framework].place
    monkeypatch.setattr(MODELS[framework], "place", lambda positions, cache, window: place(positions, cache))
    found, _ = module.cached(x, positions, slices(48, 5), WINDOW + 5 - 2)
    with pytest.raises(AssertionError):
        check(found, module(x, positions), positions, limit=1e-3)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_bad_arguments_are_refused_by_name(framework, devices):
    for kv_heads in (4, 0, 12):
        with pytest.raises(UsageError, match="num_kv_heads"):
            Module(framework, Shape("GroupedQueryAttention", K=kv_heads), devices[framework])
    with pytest.raises(UsageError, match="window"):
        Module(framework, SHAPES["multi-head"], devices[framework], window=0)(*inputs())


# --- the frameworks' own


def torch_attention(q, k, v, positions, causal, window):
    """F.scaled_dot_product_attention on [B, T, N, H]; key-value heads repeated by the library."""
    q, k, v = (torch.from_numpy(a).transpose(1, 2) for a in (q, k, v))
    mask = torch.from_numpy(mask_by_rule(positions, causal, window))[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2).numpy()


@pytest.fixture
def wide_softmax(monkeypatch):
    """Makes jax.nn.dot_product_attention, whose softmax is float32 whatever it is given, truly float64.

    flax.nnx.MultiHeadAttention calls it too: without this, both are off by 1e-7.
    """

    class Wide:
        float32 = np.float64

        def __getattr__(self, name):
            return getattr(np, name)

    function = inspect.unwrap(jax.nn.dot_product_attention)
    assert function.__globals__["np"] is np
    monkeypatch.setitem(function.__globals__, "np", Wide())


def jax_attention(q, k, v, **options):
    return numpy(jax.nn.dot_product_attention(*map(jnp.asarray, (q, k, v)), **options))


def heads(key_heads):
    rng = np.random.default_rng(key_heads)
    return [rng.standard_normal((ROWS, LENGTH, n, SIZE)) for n in (HEADS, key_heads, key_heads)]


def attended(framework, device, q, k, v, positions, causal, window):
    layers, (q, k, v, positions) = (
        LAYERS[framework],
        (put(a, framework, device) for a in (q, k, v, positions)),
    )
    return numpy(layers.attend(q, k, v, layers.visible(positions, positions, window, causal=causal)))


def flat(x):
    return x.reshape(*x.shape[:2], -1)


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_attend_matches_torch_and_jax_functions(framework, causal, window, key_heads, devices, wide_softmax):
    q, k, v = heads(key_heads)
    _, positions = inputs()
    found = attended(framework, devices[framework], q, k, v, positions, causal, window)
    check(flat(found), flat(torch_attention(q, k, v, positions, causal, window)), positions)
    mask = mask_by_rule(positions, causal, window)[:, None]
    check(flat(found), flat(jax_attention(q, k, v, mask=jnp.asarray(mask))), positions)
    # Without padding, their own masks: how far to the left and to the right a query sees.
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    found = attended(framework, devices[framework], q, k, v, positions, causal, window)
    sides = None if window is None else (window - 1, 0 if causal else window - 1)
    theirs = jax_attention(q, k, v, is_causal=causal, local_window_size=sides)
    check(flat(found), flat(theirs), positions)
    if window is None:
        q, k, v = (torch.from_numpy(a).transpose(1, 2) for a in (q, k, v))
        theirs = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=True
        ).transpose(1, 2)
        check(flat(found), flat(theirs.numpy()), positions)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("causal", [True, False])
def test_multi_head_matches_torch_nn(causal, window, use_bias, devices):
    shape = Shape("MultiHeadAttention", D=HEADS * SIZE)  # the only width that torch's module knows
    table, (x, positions) = shape.table(use_bias), inputs(width=HEADS * SIZE)
    theirs = torch.nn.MultiheadAttention(
        shape.D, shape.N, bias=use_bias, batch_first=True, dtype=torch.float64
    )
    theirs = fill(theirs, "torch", moved(table, draw(table), "torch", "torch.nn"), "cpu")
    hidden = ~mask_by_rule(positions, causal, window).repeat(shape.N, axis=0)  # [B N, T, S]
    with torch.inference_mode():
        query = torch.from_numpy(x)
        out, weights = theirs(
            query, query, query, attn_mask=torch.from_numpy(hidden), average_attn_weights=False
        )
    # Back through the map: what the twins get is what lies in torch's module.
    state = {name: numpy(tensor) for name, tensor in theirs.state_dict().items()}
    for framework in FRAMEWORKS:
        module = Module(
            framework,
            shape,
            devices[framework],
            weights=moved(table, state, "torch.nn", "torch"),
            causal=causal,
            window=window,
            use_bias=use_bias,
        )
        check(module(x, positions), numpy(out), positions)
        check(module.weights(x, positions), numpy(weights), positions)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("causal", [True, False])
def test_multi_head_matches_flax_nnx(causal, window, use_bias, devices, wide_softmax):
    shape, (x, positions) = SHAPES["multi-head"], inputs()
    table = shape.table(use_bias)
    theirs = nnx.MultiHeadAttention(
        shape.N,
        shape.D,
        qkv_features=shape.N * shape.H,
        use_bias=use_bias,
        decode=False,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    theirs = fill(theirs, "jax", moved(table, draw(table), "torch", "flax.nnx"), devices["jax"])
    mask = mask_by_rule(positions, causal, window)[:, None]  # [B, 1, T, S]
    out = numpy(theirs(put(x, "jax", devices["jax"]), mask=put(mask, "jax", devices["jax"])))
    params = nnx.to_pure_dict(nnx.split(theirs)[1])
    state = {f"{m}.{leaf}": numpy(params[m][leaf]) for m in params for leaf in params[m]}
    for framework in FRAMEWORKS:
        module = Module(
            framework,
            shape,
            devices[framework],
            weights=moved(table, state, "flax.nnx", "torch"),
            causal=causal,
            window=window,
            use_bias=use_bias,
        )
        check(module(x, positions), out, positions)


# --- gradients


def jax_gradients(module, x, positions, pull):
    apply, params = functional(module.module)

    def loss(params, x):
        out = apply(params, x, positions)
        return jnp.sum((out[0] if isinstance(out, tuple) else out) * pull)

    params, x = jax.jit(jax.grad(loss, (0, 1)))(params, module.put(x))
    return {f"{m}.{leaf}": numpy(params[m][leaf]) for m in params for leaf in params[m]}, numpy(x)


def torch_gradients(module, x, positions, pull):
    x = module.put(x).requires_grad_()
    out = module.module(x, module.put(positions))
    ((out[0] if isinstance(out, tuple) else out) * module.put(pull)).sum().backward()
    return {name: numpy(p.grad) for name, p in module.module.named_parameters()}, numpy(x.grad)


@pytest.mark.parametrize("kind", SHAPES)
def test_gradients_of_every_parameter_and_of_x_match(kind, devices):
    shape, (x, positions) = SHAPES[kind], inputs()
    table = shape.table(True)
    pull = np.random.default_rng(4).standard_normal(x.shape) * (positions >= 0)[..., None]
    left, right = (Module(f, shape, devices[f], window=WINDOW) for f in FRAMEWORKS)
    left, left_x = jax_gradients(left, x, positions, pull)
    right, right_x = torch_gradients(right, x, positions, pull)
    left = moved(table, left, "jax", "torch")
    assert left.keys() == right.keys() == table.tensors("torch").keys()
    largest = max(np.abs(g).max() for g in right.values())
    # The gradient of the keys' bias is 0 in exact arithmetic: softmax does not see a shift of all scores.
    assert np.abs(right["k_proj.bias"]).max() <= 1e-12 * largest
    for name in right:
        scale = max(np.abs(right[name]).max(), 1e-3 * largest)
        assert np.abs(left[name] - right[name]).max() <= GRADIENT_LIMIT * scale, name
    assert np.abs(left_x - right_x).max() <= GRADIENT_LIMIT * np.abs(right_x).max()
    assert np.abs(left_x[positions < 0]).max() == np.abs(right_x[positions < 0]).max() == 0


# --- lower precision


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["one-head", "grouped-query"])
def test_lower_precision_keeps_its_dtype_and_weighs_in_float32(kind, dtype):
    shape, (x, positions) = SHAPES[kind], inputs()
    left, right = (getattr(MODELS[f], shape.name) for f in FRAMEWORKS)
    left = left(*shape.arguments, causal=True, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    right = right(*shape.arguments, causal=True, dtype=getattr(torch, dtype))
    with jax.enable_x64(False), torch.inference_mode():
        given = jnp.asarray(x, dtype), torch.tensor(x, dtype=getattr(torch, dtype))
        for module, x in zip((left, right), given, strict=True):
            at = positions if module is left else torch.from_numpy(positions)
            both = lambda module, x, at: (module(x, at), module.weights(x, at))  # noqa: E731
            out, weights = (nnx.jit(both) if module is left else both)(module, x, at)
            assert str(out.dtype).removeprefix("torch.") == dtype
            assert str(weights.dtype).removeprefix("torch.") == "float32"
            assert np.abs(np.asarray(weights.sum(-1)) - 1).max() <= 1e-5


# --- mistakes that must be caught


def off_by_one(framework):
    """The window one position too wide."""
    visible = LAYERS[framework].visible

    def wrong(positions, key_positions, window=None, *, causal=True):
        return visible(positions, key_positions, None if window is None else window + 1, causal=causal)

    return {"visible": wrong}


def tiled(framework):
    """Query head n reads key-value head n % K instead of n // G."""

    def fold(q, K):
        B, T, N, H = q.shape
        return q.reshape(B, T, N // K, K, H).swapaxes(2, 3).reshape(B, T, N, H)

    def unfold(x, K):
        B, T, N, H = x.shape
        return x.reshape(B, T, K, N // K, H).swapaxes(2, 3).reshape(B, T, N, H)

    attend = LAYERS[framework].attend
    return {"attend": lambda q, k, v, mask: unfold(attend(fold(q, k.shape[2]), k, v, mask), k.shape[2])}


def unscaled(framework):
    """The division by sqrt(H) left out."""
    attend = LAYERS[framework].attend
    return {"attend": lambda q, k, v, mask: attend(q * SIZE**0.5, k, v, mask)}


@pytest.mark.parametrize("mistake", [off_by_one, tiled, unscaled])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_planted_mistakes_are_caught(framework, mistake, devices, monkeypatch):
    kind = "grouped-query"
    test_twins_match_each_other_and_plain_numpy(kind, True, WINDOW, True, devices)
    for name, function in mistake(framework).items():
        monkeypatch.setattr(MODELS[framework], name, function)
    with pytest.raises(AssertionError):
        test_twins_match_each_other_and_plain_numpy(kind, True, WINDOW, True, devices)
    # In both twins at once, only the reference can tell.
    other = FRAMEWORKS[framework == "jax"]
    for name, function in mistake(other).items():
        monkeypatch.setattr(MODELS[other], name, function)
    x, positions = inputs()
    left, right = (Module(f, SHAPES[kind], devices[f], window=WINDOW) for f in FRAMEWORKS)
    check(left(x, positions), right(x, positions), positions)
    with pytest.raises(AssertionError):
        test_twins_match_each_other_and_plain_numpy(kind, True, WINDOW, True, devices)
