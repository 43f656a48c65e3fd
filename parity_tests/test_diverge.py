"""`diverge`: planted mistakes are found where they are and explained as what they are, on either side."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import jax_models.attention
import jax_models.layers
import jax_models.llama
import jax_models.transformer
import torch_models.attention
import torch_models.layers
import torch_models.llama
import torch_models.transformer
from twinformers import diverge, load, port
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.cli.app import run
from twinformers.configs import preset
from twinformers.errors import UsageError
from twinformers.parity.diverging.values import Layout, expand, pair_leaves

LLAMA, TRANSFORMER = "preset:llama-tiny", "preset:transformer-tiny"
LAYERS = {"jax": jax_models.layers, "torch": torch_models.layers}
MODELS = {
    ("jax", LLAMA): jax_models.llama,
    ("torch", LLAMA): torch_models.llama,
    ("jax", TRANSFORMER): jax_models.transformer,
    ("torch", TRANSFORMER): torch_models.transformer,
}
NUMPY = {"jax": jnp, "torch": torch}
CALL = {"jax": "__call__", "torch": "forward"}
SILU = {"jax": jax.nn.silu, "torch": torch.nn.functional.silu}
GELU = {
    "jax": lambda x: jax.nn.gelu(x, approximate=True),
    "torch": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def compared(source=LLAMA, **options):
    return diverge(f"jax:{source}", f"torch:{source}", **options)


# Mistakes, each written once for both frameworks: `np_` is jax.numpy or torch.


def rotary_neighbours(plant, side, model, np_):
    def rotate(x, cos, sin):
        a, b = x[..., 0::2], x[..., 1::2]
        cos, sin = cos[:, :, None, :], sin[:, :, None, :]
        return np_.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)

    plant(model, "rotate", rotate)


def theta(plant, side, model, np_):
    right = model.rotary_angles
    size = preset("llama-tiny").head_dim

    def rotary_angles(positions, frequencies, dtype):
        return right(positions, tuple(1e4 ** (-2 * j / size) for j in range(size // 2)), dtype)

    plant(model, "rotary_angles", rotary_angles)


def epsilon(plant, side, model, np_):
    init = model.RMSNorm.__init__
    plant(model.RMSNorm, "__init__", lambda self, size, eps, **options: init(self, size, 1e-6, **options))


def layer_norm_epsilon(plant, side, model, np_):
    init = model.LayerNorm.__init__
    plant(model.LayerNorm, "__init__", lambda self, size, eps, **options: init(self, size, 3e-5, **options))


def norm_offset(plant, side, model, np_):
    def call(self, x):
        weight = self.scale[...] if side == "jax" else self.weight
        return x / np_.sqrt((x * x).mean(-1)[..., None] + self.eps) * (1 + weight)

    plant(model.RMSNorm, CALL[side], call)


def gelu(plant, side, model, np_):
    def call(self, x):
        return self.down_proj(GELU[side](self.gate_proj(x)) * self.up_proj(x))

    plant(model.MLP, CALL[side], call)


def gate_and_up(plant, side, model, np_):
    plant(
        model.MLP, CALL[side], lambda self, x: self.down_proj(self.gate_proj(x) * SILU[side](self.up_proj(x)))
    )


def relu_to_gelu(plant, side, model, np_):
    plant(model, "ACTIVATIONS", {"relu": GELU[side]})


def unscaled(plant, side, model, np_):
    right = LAYERS[side].attention_weights
    plant(LAYERS[side], "attention_weights", lambda q, k, mask: right(q * q.shape[-1] ** 0.5, k, mask))


def tile(plant, side, model, np_):
    right = model.attend

    def attend(q, k, v, mask, **options):
        B, T, N, H = q.shape
        K = k.shape[2]
        turned = np_.swapaxes(q.reshape(B, T, N // K, K, H), 2, 3).reshape(q.shape)
        found = right(turned, k, v, mask, **options).reshape(B, T, K, N // K, H)
        return np_.swapaxes(found, 2, 3).reshape(q.shape)

    plant(model, "attend", attend)


def changed_mask(change):
    def mistake(plant, side, model, np_):
        right = model.visible

        def visible(positions, key_positions, *args, **options):
            distance = positions[:, :, None] - key_positions[:, None, :]
            return change(right(positions, key_positions, *args, **options), distance)

        plant(model, "visible", visible)

    return mistake


def unscaled_embeddings(plant, side, model, np_):
    right = model.Transformer._place
    plant(model.Transformer, "_place", lambda self, x, *rest: right(self, x / x.shape[-1] ** 0.5, *rest))


def moved_positions(plant, side, model, np_):
    right = model.sinusoids
    plant(model, "sinusoids", lambda positions, *rest: right(positions + 1, *rest))


def other_head(plant, side, model, np_):
    if side == "jax":
        plant(model.Llama, "head", lambda self, x: self.embed.attend(x))
    else:
        plant(model.Llama, "head", lambda self, x: x @ self.embed.weight.T)


def float32_norm(plant, side, model, np_):
    call = getattr(model.RMSNorm, CALL[side])

    def narrow(self, x):
        small = x.astype("float32") if side == "jax" else x.float()
        found = call(self, small)
        return found.astype(x.dtype) if side == "jax" else found.to(x.dtype)

    plant(model.RMSNorm, CALL[side], narrow)


#: name: (source, mistake, the path that is to blame, the hypothesis that explains it)
MISTAKES = {
    "rotary pairs": (LLAMA, rotary_neighbours, "layers.0.attn", "rotary pairs"),
    "theta": (LLAMA, theta, "", "theta"),
    "epsilon": (LLAMA, epsilon, "layers.0.attn_norm", "epsilon"),
    "epsilon of a layer norm": (TRANSFORMER, layer_norm_epsilon, "encoder.0.self_attn_norm", "epsilon"),
    "norm offset": (LLAMA, norm_offset, "layers.0.attn_norm", "norm offset"),
    "GELU": (LLAMA, gelu, "layers.0.mlp", "activation"),
    "GELU for ReLU": (TRANSFORMER, relu_to_gelu, "encoder.0.mlp", "activation"),
    "gate and up": (LLAMA, gate_and_up, "layers.0.mlp", "exchanged weights"),
    "scale": (LLAMA, unscaled, "layers.0.attn", "attention scale"),
    "scale with biases": (TRANSFORMER, unscaled, "encoder.0.self_attn", "attention scale"),
    "tile": (LLAMA, tile, "layers.0.attn", "repeat against tile"),
    "strict mask": (LLAMA, changed_mask(lambda seen, d: seen & (d != 0)), "", "mask"),
    "padding": (LLAMA, changed_mask(lambda seen, d: d >= 0), "", "mask"),
    "window": (LLAMA, changed_mask(lambda seen, d: seen & (d < 101)), "", "mask"),
    "embedding scale": (TRANSFORMER, unscaled_embeddings, "", "embedding scale"),
    "position offset": (TRANSFORMER, moved_positions, "", "position offset"),
    "head": (LLAMA, other_head, "", "tied or untied head"),
    "float32 in a norm": (LLAMA, float32_norm, "layers.0.attn_norm", "dtype"),
}


@pytest.fixture
def plant(monkeypatch):
    return lambda owner, name, value: monkeypatch.setattr(owner, name, value)


#: PyTorch's twin damaged, then Flax's: of the latter only some in a quick run.
BOTH = ("theta", "tile", "float32 in a norm", "GELU")
PLANTED = [
    *((name, "torch") for name in MISTAKES),
    *(pytest.param(name, "jax", marks=() if name in BOTH else pytest.mark.slow) for name in MISTAKES),
]


@pytest.mark.parametrize(("name", "side"), PLANTED)
def test_planted_mistake_is_located_and_explained(name, side, plant):
    source, mistake, path, hypothesis = MISTAKES[name]
    mistake(plant, side, MODELS[side, source], NUMPY[side])
    report = compared(source)
    assert (report.culprit, report.hypothesis) == (path, hypothesis), report.verdict


# Weights: the same code, other numbers.


def damaged(source, change):
    """The PyTorch twin with some of its parameters changed in place."""
    model = load(source, "torch", "float64")
    with torch.no_grad():
        change(model)
    return model


def exchange(a, b):
    a.weight.data, b.weight.data = b.weight.data.clone(), a.weight.data.clone()


def transpose(linear):
    linear.weight.data = linear.weight.data.T.clone()


WEIGHTS = {
    "transposed": (
        TRANSFORMER,
        lambda m: transpose(m.decoder[1].cross_attn.o_proj),
        "decoder.1.cross_attn.o_proj",
        "transposed kernel",
    ),
    "reshaped": (
        LLAMA,
        lambda m: m.layers[1].mlp.down_proj.weight.copy_(
            m.layers[1].mlp.down_proj.weight.T.clone().reshape(48, 88)
        ),
        "layers.1.mlp.down_proj",
        "transposed kernel",
    ),
    "exchanged": (
        LLAMA,
        lambda m: exchange(m.layers[2].attn.k_proj, m.layers[2].attn.v_proj),
        "layers.2.attn.k_proj",
        "exchanged weights",
    ),
    "rounded": (
        LLAMA,
        lambda m: m.layers[1].mlp.up_proj.bfloat16().double(),
        "layers.1.mlp.up_proj",
        "rounded weights",
    ),
    "a factor": (LLAMA, lambda m: m.norm.weight.mul_(-2), "norm", "constant factor"),
    "a bias": (
        TRANSFORMER,
        lambda m: m.encoder[1].mlp.fc1.bias.zero_(),
        "encoder.1.mlp.fc1",
        "missing bias",
    ),
    "one number": (LLAMA, lambda m: m.lm_head.weight[5, 7].add_(1e-3), "lm_head", None),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_changed_weight_is_located_and_explained(name):
    source, change, path, hypothesis = WEIGHTS[name]
    report = diverge(f"jax:{source}", damaged(source, change))
    assert (report.culprit, report.hypothesis) == (path, hypothesis), report.verdict
    by_path = {step.path: step for step in report.steps}
    assert by_path[path].verdict == "cause" and by_path[path].same_inputs > report.limit
    assert all(step.verdict == "equal" for step in report.steps[:-1])


def test_what_comes_closest_is_named_where_nothing_explains():
    """Two mistakes in one place: the larger one is undone, the smaller one remains."""

    def change(model):
        transpose(model.encoder[1].self_attn.q_proj)
        model.encoder[1].self_attn.q_proj.weight[3, 5] += 1e-5

    report = diverge(f"jax:{TRANSFORMER}", damaged(TRANSFORMER, change))
    assert (report.culprit, report.hypothesis) == ("encoder.1.self_attn.q_proj", None)
    assert report.best.hypothesis == "transposed kernel" and report.best.after < 1e-4 < report.best.before
    assert "None of the hypotheses explains it. The closest, transposed kernel" in report.verdict
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["best"]["change"] == "weight transposed"


def test_consequences_are_not_blamed(plant):
    """What lies behind the mistake differs as recorded, and agrees when it is given the same inputs."""
    unscaled_embeddings(plant, "torch", torch_models.transformer, torch)
    report = compared(TRANSFORMER)
    behind = [step for step in report.steps if step.verdict == "consequence"]
    assert {"encoder.0.self_attn", "encoder.1", "decoder.0.cross_attn.q_proj"} <= {s.path for s in behind}
    assert all(s.recorded > 1e-3 and s.same_inputs < 1e-12 for s in behind)
    assert [s.path for s in report.steps if s.verdict == "cause"] == [""]
    assert "before encoder.0, whose arguments already differ: x (" in report.where


@pytest.mark.parametrize("source", [LLAMA, TRANSFORMER])
def test_equal_models_do_not_diverge(source):
    report = compared(source, limit=1e-12)
    assert (report.diverged, report.culprit, report.explanation) == (False, None, None)
    assert len(report.steps) > 30 and {s.verdict for s in report.steps} == {"equal"}


# transformers, and other configurations.


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    """A folder of a model whose o_proj is square, and one in which a port has transposed it."""
    from safetensors.numpy import load_file, save_file

    config = preset("llama-tiny").replace(head_dim=8)
    folders = [tmp_path_factory.mktemp("square") / name for name in ("right", "wrong")]
    for folder in folders:
        port(PresetCheckpoint("square", config), folder, to="hf")
    file = folders[1] / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    save_file(tensors, file, metadata={"format": "pt"})
    return folders


@pytest.mark.parametrize("side", ["jax", "torch", "hf"])
def test_transposed_kernel_of_a_folder_is_located_against_transformers(square, side):
    right, wrong = square
    report = diverge(f"{side}:{right}", f"hf:{wrong}")
    assert (report.culprit, report.hypothesis) == ("layers.1.attn.o_proj", "transposed kernel")
    assert not diverge(f"{side}:{right}", f"hf:{right}", gradients=True).diverged


def test_two_models_of_one_framework(square):
    """Flax against Flax: no operation can be rewritten, but parameters can be moved."""
    right, wrong = square
    report = diverge(f"jax:{right}", f"jax:{wrong}")
    assert (report.culprit, report.hypothesis) == ("layers.1.attn.o_proj", "transposed kernel")


@pytest.mark.parametrize(
    ("changes", "hypothesis"),
    [({"rope_theta": 1e4}, "theta"), ({"rms_norm_eps": 1e-6}, "epsilon"), ({"rope_scaling": None}, "theta")],
)
def test_other_configuration_is_explained_against_transformers(changes, hypothesis, tmp_path):
    for name, config in {
        "right": preset("llama-tiny"),
        "wrong": preset("llama-tiny").replace(**changes),
    }.items():
        port(PresetCheckpoint("other", config), tmp_path / name, to="hf")
    report = diverge(f"jax:{tmp_path / 'right'}", f"hf:{tmp_path / 'wrong'}")
    assert report.hypothesis == hypothesis, report.verdict
    assert any(next(iter(changes)) in note for note in report.notes)


# Gradients.


def stopped_scale(plant, side, model):
    def call(self, x):
        weight = jax.lax.stop_gradient(self.scale[...]) if side == "jax" else self.weight.detach()
        return x * ((x * x).mean(-1)[..., None] + self.eps) ** -0.5 * weight

    plant(model.RMSNorm, CALL[side], call)


def stopped_keys(plant, side, model):
    right = model.attend
    stop = jax.lax.stop_gradient if side == "jax" else torch.Tensor.detach
    plant(model, "attend", lambda q, k, v, mask: right(q, stop(k), v, mask))


def half_gradient(plant, side, model):
    stop = jax.lax.stop_gradient if side == "jax" else torch.Tensor.detach

    def call(self, x):
        h = self.gate_proj(x)
        h = SILU[side]((h + stop(h)) / 2) * self.up_proj(x)
        h = self.down_proj(h)
        return (h + stop(h)) / 2

    plant(model.MLP, CALL[side], call)


BACKWARD = {
    "stopped scale": (stopped_scale, "norm", "no gradient", "parameter weight"),
    "stopped keys": (stopped_keys, "layers.2.attn", "no gradient", "parameter k_proj.weight"),
    "half a gradient": (half_gradient, "layers.2.mlp", "constant factor", "parameter down_proj.weight"),
}


@pytest.mark.parametrize("side", ["jax", "torch"])
@pytest.mark.parametrize("name", BACKWARD)
def test_planted_gradient_is_located_and_explained(name, side, plant):
    mistake, path, reason, parameter = BACKWARD[name]
    mistake(plant, side, MODELS[side, LLAMA])
    assert not compared().diverged
    report = compared(gradients=True)
    assert (report.culprit, report.hypothesis) == (path, reason), report.verdict
    assert (
        parameter in report.steps[-1].note and ("left" if side == "jax" else "right") in report.steps[-1].note
    )


def test_parameter_that_does_not_train_is_named():
    model = damaged(LLAMA, lambda m: m.layers[1].mlp.up_proj.requires_grad_(False))
    report = diverge(f"jax:{LLAMA}", model, gradients=True)
    assert (report.culprit, report.hypothesis) == ("layers.1.mlp.up_proj", "no gradient")


@pytest.mark.slow
def test_gradients_of_equal_models_agree():
    report = compared(TRANSFORMER, gradients=True)
    assert not report.diverged and report.of == "submodules' gradients"
    assert max(step.same_inputs for step in report.steps) < 1e-12


# Strangers: modules that share nothing with this repository.


class TheirMLP(nnx.Module):
    def __init__(self, rngs):
        self.enter = nnx.Linear(5, 7, rngs=rngs)
        self.norm = nnx.LayerNorm(7, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.leave = nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, x):
        return self.leave(jax.nn.gelu(self.norm(self.enter(x)), approximate=False))


class OurMLP(torch.nn.Module):
    def __init__(self, eps=1e-5, approximate="none"):
        super().__init__()
        self.steps = torch.nn.ModuleList(
            [torch.nn.Linear(5, 7), torch.nn.LayerNorm(7, eps=eps), torch.nn.Linear(7, 3)]
        )
        self.act = torch.nn.GELU(approximate=approximate)

    def forward(self, inputs):
        h = self.act(self.steps[1](self.steps[0](inputs)))
        return {"result": self.steps[2](h)}


PATHS = {"enter": "steps.0", "norm": "steps.1", "leave": "steps.2"}


def pair_of_mlps(**options):
    theirs, ours = TheirMLP(nnx.Rngs(3)), OurMLP(**options)
    for name, other in PATHS.items():
        module, target = getattr(theirs, name), ours.get_submodule(other)
        weight = module.kernel[...].T if hasattr(module, "kernel") else module.scale[...]
        target.weight.data = torch.tensor(np.asarray(weight))
        target.bias.data = torch.tensor(np.asarray(module.bias[...]))
    return theirs, ours


X = np.random.default_rng(1).standard_normal((4, 6, 5))


def test_strangers_that_agree():
    theirs, ours = pair_of_mlps()
    report = diverge(theirs, ours, inputs=[X], paths=PATHS, gradients=True, limit=1e-12)
    assert not report.diverged and [s.path for s in report.steps] == ["leave", "norm", "enter", ""]
    assert theirs.enter.kernel[...].dtype == jnp.float32 and next(ours.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "path", "hypothesis"),
    [({"eps": 1e-3}, "norm", "epsilon"), ({"approximate": "tanh"}, "", "activation")],
)
@pytest.mark.parametrize("turned", [False, True])
def test_strangers_that_differ(options, path, hypothesis, turned):
    theirs, ours = pair_of_mlps(**options)
    if turned:
        back = {b: a for a, b in PATHS.items()}
        report = diverge(ours, theirs, inputs=[X], paths=back)
        path = PATHS.get(path, path)
    else:
        report = diverge(theirs, ours, inputs=[X], paths=PATHS)
    assert (report.culprit, report.hypothesis) == (path, hypothesis), report.verdict


@pytest.mark.parametrize("window", [8, 9])
def test_attention_with_another_window(window):
    """Two attentions of this repository, as strangers: their masks are made inside."""
    sizes = dict(hidden_size=12, num_heads=4, num_kv_heads=2, head_dim=6, causal=True)
    theirs = jax_models.attention.GroupedQueryAttention(**sizes, window=8, rngs=nnx.Rngs(0))
    ours = torch_models.attention.GroupedQueryAttention(**sizes, window=window)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        kernel = np.asarray(getattr(theirs, name).kernel[...])
        getattr(ours, name).weight.data = torch.tensor(kernel.T.copy())
    x = np.random.default_rng(0).standard_normal((2, 20, 12))
    report = diverge(theirs, ours, inputs=[x, np.tile(np.arange(20, dtype=np.int32), (2, 1))])
    assert (report.culprit, report.hypothesis) == ((None, None) if window == 8 else ("", "mask"))
    if window == 9:
        assert report.explanation.change == "a window shorter by one"


class TheirLayers(nnx.Module):
    """Batch first, two of one kind, the second of which is called twice."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(5, 5, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        return self.layers[1](jnp.tanh(self.layers[1](self.layers[0](x)))).reshape(*x.shape)


class OurLayers(torch.nn.Module):
    """Time first."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(5, 5) for _ in range(2)])

    def forward(self, x):
        x = x.transpose(0, 1)
        return self.blocks[1](torch.tanh(self.blocks[1](self.blocks[0](x))))


@pytest.mark.parametrize("damage", [False, True])
def test_layouts_numbers_and_repeated_calls(damage):
    theirs, ours = TheirLayers(nnx.Rngs(0)), OurLayers()
    for n, layer in enumerate(theirs.layers):
        kernel = np.asarray(layer.kernel[...])
        ours.blocks[n].weight.data = torch.tensor((kernel if damage and n == 1 else kernel.T).copy())
        ours.blocks[n].bias.data.zero_()
    options = dict(inputs=[X], paths={"layers.{i}": "blocks.{i}"}, layouts={"*": "b t d -> t b d"})
    report = diverge(theirs, ours, **options, gradients=True)
    if damage:
        assert (report.culprit, report.hypothesis) == ("layers.1", "transposed kernel")
    else:
        paths = [s.path for s in report.steps]
        assert not report.diverged and paths == ["layers.1#2", "layers.1", "layers.0", ""]


class Doubled(nnx.Linear):
    """Its call is its base class's, twice."""

    def __call__(self, x):
        return super().__call__(x) * 2


class Plain(nnx.Module):
    """A linear map that no model here has by itself."""

    def __init__(self, size, _, use_bias, rngs):
        self.kernel = nnx.Param(rngs.normal((size, size)))

    def __call__(self, x):
        return x @ self.kernel[...]


class Inherited(Plain):
    """Its call is its base class's."""


class TheirFamily(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b, self.c = (
            kind(5, 5, use_bias=False, rngs=rngs) for kind in (nnx.Linear, Doubled, Inherited)
        )
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.c(self.b(self.a(x))))


class OurFamily(torch.nn.Module):
    def __init__(self, theirs):
        super().__init__()
        for name in "abc":
            linear = torch.nn.Linear(5, 5, bias=False)
            linear.weight.data = torch.tensor(np.asarray(getattr(theirs, name).kernel[...]).T.copy())
            setattr(self, name, torch.nn.Sequential(linear))
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.c(self.b(self.a(x)) * 2))


def test_inherited_calls_are_seen_once_and_dropout_is_off():
    theirs = TheirFamily(nnx.Rngs(0))
    report = diverge(theirs, OurFamily(theirs), inputs=[X])
    assert [s.path for s in report.steps] == ["a", "b"] and report.culprit == "b"
    assert (report.hypothesis, report.explanation.change) == ("constant factor", "the right times 2")
    assert nnx.Linear.__call__ is vars(nnx.Linear)["__call__"] and "__call__" not in vars(Inherited)
    report = diverge(theirs, OurFamily(theirs), inputs=[X], paths={"a": "a", "c": "c", "drop": "drop"})
    assert not report.diverged and [s.path for s in report.steps] == ["a", "c", "drop", ""]


def test_a_call_of_ones_own():
    theirs, ours = pair_of_mlps()
    report = diverge(
        theirs,
        ours,
        inputs=[X],
        paths=PATHS,
        call_left=lambda m, x: m(x) * 2,
        call_right=lambda m, x: m(inputs=x),
    )
    assert report.culprit == "" and report.hypothesis == "constant factor"


# Bad input, and the parts.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("jax", "torch:preset:llama-tiny"), "no such side"),
        (("flax:demo", "torch:demo"), "no such side"),
        ((LLAMA, "torch:preset:llama-tiny"), "no such side"),
        (("jax:preset:llama-tiny", "torch:preset:transformer-tiny"), "two architectures"),
    ],
)
def test_sides_that_make_no_sense_are_refused(arguments, said, capsys):
    with pytest.raises(UsageError, match=said):
        diverge(*arguments)
    assert run(["diverge", *arguments]) == 2 and said in capsys.readouterr().err


def test_modules_that_make_no_sense_are_refused():
    theirs, ours = pair_of_mlps()
    for options, said in [
        ({}, "nothing to feed"),
        ({"inputs": [X], "paths": {"enter": "steps.9"}}, "no such submodule"),
        ({"inputs": [X], "paths": {"layers.{i}": "steps.{i}"}}, "no such submodule"),
        ({"inputs": [X]}, "no submodule in common"),
        ({"inputs": [X[..., :4]], "paths": PATHS}, "cannot be called"),
        ({"inputs": [X], "paths": PATHS, "limit": 0.0}, "bad value"),
    ]:
        with pytest.raises(UsageError, match=said):
            diverge(theirs, ours, **options)
    with pytest.raises(UsageError, match="cannot be compared"):
        diverge(theirs, torch.ones(3), inputs=[X])


def test_command(plant, capsys):
    assert run(["diverge", f"jax:{LLAMA}", f"torch:{LLAMA}"]) == 0
    assert "No divergence: 40 submodules agree" in capsys.readouterr().out
    gelu(plant, "torch", torch_models.llama, torch)
    assert run(["diverge", f"jax:{LLAMA}", f"torch:{LLAMA}"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"layers\.0\.mlp +\S+ +\S+ +cause", out) and "activation (SiLU in its place)" in out
    assert run(["diverge", f"jax:{LLAMA}", f"torch:{LLAMA}", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["culprit"], found["hypothesis"], found["diverged"]) == ("layers.0.mlp", "activation", True)


def test_arguments_are_paired_by_name_then_value_then_order():
    a, b, c = (np.full((2, 3), float(n)) for n in range(3))
    mask = np.ones((2, 3), bool)
    assert pair_leaves({"x": a, "y": b}, {"y": b, "x": a}) == {"y": "y", "x": "x"}
    assert pair_leaves({"x": a, "cos": b, "sin": c}, {"h": a + 9, "t.0": c, "t.1": b}) == {
        "h": "x",
        "t.0": "sin",
        "t.1": "cos",
    }
    assert pair_leaves({"x": a, "mask": mask}, {"h": b, "mask": c}) == {"h": "x"}


def test_numbers_in_paths_and_layouts():
    names = ["a.0.b", "a.12.b", "a.x.b", "c"]
    assert expand({"a.{i}.b": "z.{i}", "c": "d"}, names) == {"a.0.b": "z.0", "a.12.b": "z.12", "c": "d"}
    x = np.arange(120.0).reshape(2, 3, 4, 5)
    layout = Layout("b t n h -> t b (n h)")
    assert layout.to_right(x).shape == (3, 2, 20)
    assert np.array_equal(layout.to_left(layout.to_right(x), x), x)
    assert Layout("b t -> t b").to_right(x) is x


GUIDE = Path(__file__).parent.parent / "docs" / "diverge.md"


def test_the_guide_runs_and_shows_what_it_prints(capsys):
    """Its Python blocks are one program; what follows each as text is what it prints."""
    blocks = re.findall(r"```(python|text)\n(.*?)```", GUIDE.read_text(), re.S)
    scope: dict = {"__name__": "guide"}
    shown = 0
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, str(GUIDE), "exec"), scope)
        else:
            assert capsys.readouterr().out.split() == text.split()
            shown += 1
    assert shown >= 3
