"""GPT-2: Flax against PyTorch and against transformers, on configurations in which nothing coincides."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import torch

import twinformers
from twinformers.checkpoints import convert, open_checkpoint
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.configs import config_from_hf, preset
from twinformers.errors import ConfigError, WeightsError
from twinformers.parity.reference import precise, reference_model
from twinformers.weight_maps import weight_map

TINY = preset("gpt2-tiny")
CONFIGS = {
    "tied": TINY,
    "untied": TINY.replace(tie_word_embeddings=False),
    "exact-gelu": TINY.replace(activation_function="gelu"),
}
LIMIT = 1e-12


def inputs(config, length=40):
    """Rows with no, left and right padding; the second one begins at position 230."""
    tokens = np.random.default_rng(5).integers(0, config.vocab_size, (3, length)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (3, 1))
    positions[1] = np.r_[-np.ones(9), 230 + np.arange(length - 9)]
    positions[2, -7:] = -1
    return tokens, positions


def run(framework, config, tokens, positions, chunk=None):
    """The logits in float64, of one pass or piece by piece over a cache."""
    with jax.enable_x64(True), torch.inference_mode():
        model = twinformers.load(PresetCheckpoint("test", config), framework, "float64")
        array = {"jax": jax.numpy.asarray, "torch": torch.tensor}[framework]
        cache = model.empty_cache(len(tokens), 300) if chunk else None
        out = []
        for start in range(0, tokens.shape[1], chunk or tokens.shape[1]):
            part = slice(start, start + chunk if chunk else None)
            logits, cache = model(array(tokens[:, part]), array(positions[:, part]), cache)
            out.append(np.asarray(logits))
    assert out[0].dtype == np.float64
    return np.concatenate(out, 1)


def difference(left, right, positions):
    """Largest difference over real tokens, relative to the largest value."""
    real = positions >= 0
    assert np.isfinite(left).all() and np.isfinite(right).all()
    return np.abs(left - right)[real].max() / np.abs(right[real]).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_submodule_matches_twin_and_transformers(name):
    dtypes = ["float64", "float32", "bfloat16"] if name == "tied" else ["float64"]
    report = twinformers.verify(PresetCheckpoint("test", CONFIGS[name]), dtypes=dtypes)
    assert [r for r in report.checks if not r.ok] == []
    exact = [r for r in report.checks if r.dtype == "float64" and r.path]
    assert len({r.path for r in exact}) == 3 * 11 + 3 + (name == "untied")
    assert all(r.limit == LIMIT for r in exact)
    # Of queries, keys and values apart there is no module in transformers.
    compared = {r.path for r in exact if r.check == "reference"}
    assert {"position_embed", "layers.2.mlp.fc1", "layers.0.attn.o_proj"} <= compared
    assert "layers.0.attn.q_proj" not in compared


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_cached_decoding_matches_full_pass(framework, chunk):
    tokens, positions = inputs(TINY)
    full = run(framework, TINY, tokens, positions)
    assert difference(run(framework, TINY, tokens, positions, chunk), full, positions) <= LIMIT


def test_gradients_and_updates_with_dropout():
    report = twinformers.verify(
        "preset:gpt2-tiny", checks=["gradients", "training"], dtypes=["float64"], steps=3
    )
    assert {r.check for r in report.checks} == {"gradients", "training"}
    assert [r for r in report.checks if not r.ok] == []
    assert TINY.embd_pdrop and TINY.attn_pdrop and TINY.resid_pdrop


FIELDS = {
    "layer_norm_epsilon": 1e-2,
    "num_attention_heads": 10,
    "num_hidden_layers": 2,
    "hidden_size": 60,
    "intermediate_size": 90,
    "vocab_size": 300,
    "activation_function": "relu",
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_changes_both_twins_alike(field):
    tokens, positions = inputs(TINY)
    changed = TINY.replace(**{field: FIELDS[field]})
    before = run("torch", TINY, tokens, positions)
    left, right = (run(name, changed, tokens, positions) for name in ("jax", "torch"))
    assert difference(left, right, positions) <= LIMIT
    assert right.shape != before.shape or difference(right, before, positions) > 1e-6


@pytest.mark.parametrize("rate", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_every_rate_drops_the_same_in_both_twins(rate):
    tokens, positions = inputs(TINY)
    none = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    source = PresetCheckpoint("test", TINY.replace(**none | {rate: 0.3}))
    with jax.enable_x64(True), torch.inference_mode():
        from jax_models.random import key as jax_key
        from torch_models.random import key as torch_key

        flax = twinformers.load(source, "jax", "float64")
        left, _ = flax(tokens, positions, key=jax_key(7))
        other = twinformers.load(source, "torch", "float64")
        given = torch.tensor(tokens), torch.tensor(positions)
        right, whole = other(*given, key=torch_key(7))[0].numpy(), other(*given)[0].numpy()
    assert difference(np.asarray(left), right, positions) <= LIMIT
    assert difference(right, whole, positions) > 1e-3


def test_the_list_of_perturbed_fields_is_complete():
    # The number of positions is that of the table's rows; what stands in them is seen by `position_embed`.
    others = {"max_position_embeddings", "embd_pdrop", "attn_pdrop", "resid_pdrop"}
    assert set(FIELDS) == set(TINY.to_dict()) - others


def test_published_sizes():
    # The figures of the model cards' safetensors headers, without the masks that are no parameters.
    published = {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
        "distilgpt2": 81_912_576,
    }
    assert {name: weight_map(preset(name)).parameters for name in published} == published


# Files


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_every_direction_of_the_weight_map_is_bit_identical(name, tmp_path):
    first = source = tmp_path / "0"
    twinformers.port(PresetCheckpoint("test", CONFIGS[name]), first, to="hf", dtype="bfloat16")
    for n, to in enumerate(["jax", "torch", "hf"], 1):
        twinformers.port(source, tmp_path / str(n), to=to)
        source = tmp_path / str(n)
    assert (source / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert (source / "config.json").read_bytes() == (first / "config.json").read_bytes()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A model of transformers, all of it random, as it saves itself with its head and without."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=251,
        n_embd=50,
        n_layer=3,
        n_head=5,
        n_positions=512,
        n_inner=88,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(3)
    model = transformers.GPT2LMHeadModel(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder / "whole")
    model.transformer.save_pretrained(folder / "base")
    return model, folder


@pytest.mark.parametrize("kind", ["whole", "base", "masks"])
def test_folders_of_transformers(kind, theirs, tmp_path):
    from safetensors.numpy import load_file, save_file

    model, folder = theirs
    place = folder / ("base" if kind == "masks" else kind)
    names = load_file(place / "model.safetensors")
    assert all(name.startswith("transformer.") for name in names) == (kind == "whole")
    if kind == "masks":  # what hub's `gpt2` looks like: names of the base model, and masks beside them
        names |= {f"h.{i}.attn.bias": np.ones((1, 1, 512, 512), np.float32) for i in range(3)}
        save_file(names, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_bytes((place / "config.json").read_bytes())
        place = tmp_path
    tokens, positions = (x[:1] for x in inputs(TINY))
    with torch.inference_mode():
        right = model(torch.tensor(tokens).long()).logits.numpy()
        left, _ = twinformers.load(place, "torch")(torch.tensor(tokens), torch.tensor(positions))
    assert difference(left.numpy(), right, positions) <= 1e-5
    for source in (place, place / "model.safetensors"):
        with open_checkpoint(source) as checkpoint:
            found = dict(convert(checkpoint, "hf"))
        for name, x in model.state_dict().items():
            if name != "lm_head.weight":  # the embedding
                assert np.array_equal(found[name], x.numpy()), name


def test_a_stranger_is_not_taken_for_the_base_model(theirs, tmp_path):
    from safetensors.numpy import save_file

    _, folder = theirs
    save_file(
        {"wte.weight": np.ones((251, 50), np.float32), "odd": np.ones(1, np.float32)},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_bytes((folder / "base" / "config.json").read_bytes())
    with pytest.raises(WeightsError, match="missing") as caught:
        twinformers.load(tmp_path, "torch")
    assert "odd" in str(caught.value)


def test_legacy_flax_files(theirs, tmp_path):
    """transformers 4's Flax class: Conv1D's kernels are [out, in], norms have a `scale`."""
    from flax.serialization import msgpack_serialize

    model, folder = theirs
    tree: dict = {}
    for name, x in model.transformer.state_dict().items():
        *path, leaf = ["transformer", *name.split(".")]
        if leaf == "weight":
            leaf = (
                "embedding"
                if path[-1] in ("wte", "wpe")
                else "kernel"
                if path[-1].startswith("c_")
                else "scale"
            )
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = (x.T if leaf == "kernel" else x).contiguous().numpy()
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack_serialize(tree))
    (tmp_path / "config.json").write_bytes((folder / "whole" / "config.json").read_bytes())
    with open_checkpoint(tmp_path) as checkpoint:
        found = dict(convert(checkpoint, "hf"))
    for name, x in model.transformer.state_dict().items():
        assert np.array_equal(found[f"transformer.{name}"], x.numpy()), name


def test_gguf_as_llama_cpp_has_it(theirs, tmp_path):
    """Names and layouts read by the gguf library; and back."""
    import gguf

    model, folder = theirs
    twinformers.port(folder / "whole", tmp_path / "model.gguf", to="gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["general.architecture"].contents() == "gpt2"
    assert reader.fields["gpt2.feed_forward_length"].contents() == 88
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 3)
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    expected = {}
    for name, x in model.transformer.state_dict().items():
        matrix = name.endswith("weight") and ".c_" in name
        ours = names.get_name(f"transformer.{name}", try_suffixes=(".weight", ".bias"))
        expected[ours] = (x.T if matrix else x).numpy()  # llama.cpp's are [out, in]
    assert tensors.keys() == expected.keys()
    assert all(np.array_equal(tensors[name], x) for name, x in expected.items())
    twinformers.port(tmp_path / "model.gguf", tmp_path / "back", to="hf")
    with open_checkpoint(folder / "whole") as before, open_checkpoint(tmp_path / "back") as after:
        again = dict(convert(after, "hf"))
        assert all(np.array_equal(x, again[name]) for name, x in convert(before, "hf"))
        # GGUF holds it in float32.
        assert after.config == before.config.replace(layer_norm_epsilon=float(np.float32(1e-5)))


@pytest.mark.parametrize(
    ("change", "said"),
    [({"activation_function": "relu"}, "activation_function"), ({"tie_word_embeddings": False}, "tie_word")],
)
def test_what_gguf_cannot_express(change, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        twinformers.port(PresetCheckpoint("test", TINY.replace(**change)), tmp_path / "x.gguf", to="gguf")
    assert not list(tmp_path.iterdir())


# Configuration


def test_config_of_the_hub():
    """OpenAI's smallest model, the fields that its config.json has."""
    raw = {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "vocab_size": 50257,
    }
    assert config_from_hf(raw) == preset("gpt2") == config_from_hf({"model_type": "gpt2"})
    assert config_from_hf(json.loads(json.dumps(TINY.to_hf()))) == TINY
    assert config_from_hf({"model_type": "gpt2", "hidden_size": 96, "n_head": 6}).intermediate_size == 384


def test_defaults_are_those_of_transformers():
    import transformers

    theirs = transformers.GPT2Config()
    ours = config_from_hf({"model_type": "gpt2"})
    for name, value in ours.to_dict().items():
        if name != "intermediate_size":
            assert getattr(theirs, name) == value, name
    assert theirs.n_inner is None


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"n_embd": 100}, "n_embd"),
        ({"n_embd": 96, "hidden_size": 64}, "two names"),
        ({"activation_function": "mish"}, "activation_function"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"n_layer": "12"}, "num_hidden_layers"),
        ({"n_inner": -1}, "intermediate_size"),
        ({"attn_pdrop": 1.0}, "attn_pdrop"),
    ],
)
def test_what_is_not_implemented_is_refused(raw, said):
    with pytest.raises(ConfigError, match=said):
        config_from_hf({"model_type": "gpt2", **raw})


# Generation


def test_generation_is_that_of_transformers():
    from jax_models.generate import Generator as JaxGenerator
    from torch_models.generate import Generator as TorchGenerator

    prompts, new = [[3, 5, 7], [11, 13, 17, 19, 23, 29, 31], [2] * 17 + [40]], 24
    with open_checkpoint("preset:gpt2-tiny") as checkpoint, precise("float64"):
        model = reference_model(checkpoint, "float64")
        model.generation_config.eos_token_id = None
        expected = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0
            )
            expected.append(out[0, len(prompt) :].tolist())
    with jax.enable_x64(True):
        for name, engine in (("jax", JaxGenerator), ("torch", TorchGenerator)):
            twin = twinformers.load("preset:gpt2-tiny", name, "float64", decoding=True)
            steps = engine(twin).stream(prompts, max_new_tokens=new)
            assert [list(row) for row in zip(*steps, strict=True)] == expected, name
