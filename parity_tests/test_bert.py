"""BERT: Flax against PyTorch and against transformers, with every set of parts that a file may have."""

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
from twinformers.errors import ConfigError, FormatError, UsageError, WeightsError
from twinformers.parity.kinds import kind
from twinformers.parity.limits import SMALL_GRADIENT
from twinformers.parity.reference import precise, reference_model
from twinformers.weight_maps import weight_map

TINY = preset("bert-tiny")
CONFIGS = {
    "pre-trained": TINY,
    "masked-lm": TINY.replace(pooler=False),
    "base": TINY.replace(masked_lm_head=False),
    "encoder": TINY.replace(masked_lm_head=False, pooler=False),
    "tanh-gelu": TINY.replace(hidden_act="gelu_new"),
}
LIMIT = 1e-12


def inputs(config, length=40):
    """Rows with no, left and right padding; the second one begins at position 230."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(1, config.vocab_size, (3, length)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (3, 1))
    positions[1] = np.r_[-np.ones(9), 230 + np.arange(length - 9)]
    positions[2, -7:] = -1
    segments = rng.integers(0, config.type_vocab_size, (3, length)).astype(np.int32)
    return tokens, positions, segments


def run(framework, config, *given, method="__call__", key=None):
    """What a twin answers, in float64."""
    source = PresetCheckpoint("test", config)
    with jax.enable_x64(True), torch.inference_mode():
        model = twinformers.load(source, framework, "float64")
        make = {"jax": jax.numpy.asarray, "torch": torch.tensor}[framework]
        call = model if method == "__call__" else getattr(model, method)
        options = {}
        if key is not None:
            from jax_models.random import key as jax_key
            from torch_models.random import key as torch_key

            options["key"] = {"jax": jax_key, "torch": torch_key}[framework](key)
        out = call(*map(make, given), **options)
        out = out if isinstance(out, tuple) else (out,)
        return [None if x is None else np.asarray(x) for x in out]


def difference(left, right):
    assert left.dtype == right.dtype == np.float64 and left.shape == right.shape
    assert np.isfinite(left).all() and np.isfinite(right).all()
    return np.abs(left - right).max() / np.abs(right).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_submodule_matches_twin_and_transformers(name):
    config = CONFIGS[name]
    dtypes = ["float64", "float32", "bfloat16"] if name == "pre-trained" else ["float64"]
    report = twinformers.verify(PresetCheckpoint("test", config), dtypes=dtypes)
    assert [r for r in report.checks if not r.ok] == []
    exact = [r for r in report.checks if r.dtype == "float64" and r.path]
    parts = 3 * config.masked_lm_head + config.pooler
    assert len({r.path for r in exact}) == 3 * 11 + 4 + parts
    assert all(r.limit == LIMIT for r in exact)
    compared = {r.path for r in exact if r.check == "reference"}
    assert {"segment_embed", "layers.2.mlp.fc1", "layers.0.attn.q_proj", "layers.1"} <= compared
    assert {"pooler"} & compared == ({"pooler"} if config.pooler else set())
    assert {"head.norm", "head"} <= compared or not config.masked_lm_head
    # Nothing is generated: those checks are neither made nor said to have passed.
    assert {r.check for r in report.checks} <= {"logits", "activations", "reference", "rounding"}


def test_checks_of_generation_alone_are_refused():
    with pytest.raises(UsageError, match="generates nothing"):
        twinformers.verify("preset:bert-tiny", checks=["cache", "generation"])


def test_gradients_and_updates_with_dropout():
    report = twinformers.verify(
        "preset:bert-tiny", checks=["gradients", "reference", "training"], dtypes=["float64"], steps=3
    )
    assert {r.check for r in report.checks} == {"gradients", "reference", "training"}
    assert [r for r in report.checks if not r.ok] == []
    named = {r.path for r in report.checks if r.check == "gradients" and r.right == "transformers"}
    assert {"embed.weight", "head.bias", "layers.1.attn.k_proj.bias", "segment_embed.weight"} <= named
    assert TINY.hidden_dropout_prob and TINY.attention_probs_dropout_prob


def test_pre_training_learns_both_tasks_as_transformers_does():
    """Its loss, of masked tokens and of the next sentence, and the gradient of every parameter."""
    from flax import nnx

    tokens, positions, segments = (x[[0, 2]] for x in inputs(TINY))
    labels = np.where(np.arange(40) % 5 == 0, tokens, -100) * (positions >= 0) + -100 * (positions < 0)
    follows = np.array([1, 0])
    with open_checkpoint("preset:bert-tiny") as checkpoint:
        with precise("float64"):
            model = reference_model(checkpoint, "float64")
            theirs = model(
                input_ids=torch.tensor(tokens).long(),
                attention_mask=torch.tensor(positions >= 0).long(),
                token_type_ids=torch.tensor(segments).long(),
                position_ids=torch.tensor(positions).long().clamp(min=0),
                labels=torch.tensor(labels),
                next_sentence_label=torch.tensor(follows),
            ).loss
            theirs.backward()
        expected = {n: p.grad.numpy() for n, p in model.named_parameters()}
        table = weight_map(checkpoint.config)

    def loss(model, given, log_softmax, labels, where, follows):
        logits, pooled = model(*given)
        rows = log_softmax(logits)[where]  # [masked, V]
        told = log_softmax(model.next_sentence(pooled))  # [B, 2]
        return -rows[np.arange(len(rows)), labels].mean() - told[np.arange(len(told)), follows].mean()

    rest = (labels[labels >= 0], np.nonzero(labels >= 0), follows)
    twin = twinformers.load("preset:bert-tiny", "torch", "float64")
    with torch.enable_grad():
        ours = loss(
            twin,
            [torch.tensor(x) for x in (tokens, positions, segments)],
            lambda x: torch.log_softmax(x, -1),
            *rest,
        )
        ours.backward()
    found = {"torch": {n: p.grad.numpy() for n, p in twin.named_parameters()}}
    assert abs(ours.item() - theirs.item()) <= LIMIT * theirs.item()
    with jax.enable_x64(True):
        flax = twinformers.load("preset:bert-tiny", "jax", "float64")
        graphdef, state = nnx.split(flax)

        def of(params):
            return loss(nnx.merge(graphdef, params), (tokens, positions, segments), jax.nn.log_softmax, *rest)

        value, gradient = jax.value_and_grad(of)(nnx.to_pure_dict(state))
    assert abs(float(value) - theirs.item()) <= LIMIT * theirs.item()
    leaves = jax.tree_util.tree_flatten_with_path(gradient)[0]
    found["jax"] = {".".join(str(k.key) for k in path): np.asarray(x) for path, x in leaves}
    largest = max(np.abs(x).max() for x in expected.values())
    for side, gradients in found.items():
        for name in table.leaves(side):
            right = table.produce(name, side, expected.__getitem__, "hf")
            floor = SMALL_GRADIENT * largest  # that of keys' biases is zero but for rounding
            assert np.abs(gradients[name] - right).max() <= 1e-10 * max(np.abs(right).max(), floor), name


@pytest.mark.parametrize("method", ["__call__", "mean", "first"])
def test_padding_says_nothing(method):
    """A text alone, with padding before it and with padding behind it: the same outputs, the same vectors."""
    tokens, positions, segments = (x[:1] for x in inputs(TINY))
    alone = run("torch", TINY, tokens, positions, segments, method=method)
    for pad in ((11, 0), (0, 11), (4, 7)):
        wide = [
            np.pad(x, [(0, 0), pad], constant_values=v)
            for x, v in zip((tokens, positions, segments), (3, -1, 1), strict=True)
        ]
        for framework in ("jax", "torch"):
            found = run(framework, TINY, *wide, method=method)
            if method == "__call__":
                found[0] = found[0][:, pad[0] : pad[0] + 40]
            assert len(found) == len(alone)
            for left, right in zip(found, alone, strict=True):
                assert difference(left, right) <= LIMIT


def test_what_stands_for_the_whole_is_that_of_transformers():
    tokens, positions, segments = (x[[0, 2]] for x in inputs(TINY))
    with open_checkpoint("preset:bert-tiny") as checkpoint, precise("float64"), torch.inference_mode():
        model = reference_model(checkpoint, "float64")
        given = {
            "input_ids": torch.tensor(tokens).long(),
            "attention_mask": torch.tensor(positions >= 0).long(),
            "position_ids": torch.tensor(positions).long().clamp(min=0),
        }
        # Without segments all are 0, there as here.
        out = model.bert(**given)
        follows = model(**given).seq_relationship_logits.numpy()
    hidden, real = out.last_hidden_state.numpy(), (positions >= 0)[..., None]
    mean = (hidden * real).sum(1) / real.sum(1)
    for framework in ("jax", "torch"):
        _, pooled = run(framework, TINY, tokens, positions)
        assert difference(pooled, out.pooler_output.numpy()) <= LIMIT
        (found,) = run(framework, TINY, tokens, positions, method="mean")
        assert difference(found, mean / np.linalg.norm(mean, axis=-1, keepdims=True)) <= LIMIT
        (found,) = run(framework, TINY, tokens, positions, method="first")
        first = hidden[:, 0]
        assert difference(found, first / np.linalg.norm(first, axis=-1, keepdims=True)) <= LIMIT
        (found,) = run(framework, TINY, pooled, method="next_sentence")
        assert difference(found, follows) <= LIMIT


FIELDS = {
    "layer_norm_eps": 1e-2,
    "num_attention_heads": 10,
    "num_hidden_layers": 2,
    "hidden_size": 60,
    "intermediate_size": 90,
    "vocab_size": 300,
    "hidden_act": "relu",
    "masked_lm_head": False,
}


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_changes_both_twins_alike(field):
    given = inputs(TINY)
    changed = TINY.replace(**{field: FIELDS[field]})
    before, _ = run("torch", TINY, *given)
    (left, _), (right, _) = (run(name, changed, *given) for name in ("jax", "torch"))
    assert difference(left, right) <= LIMIT
    assert right.shape != before.shape or difference(right, before) > 1e-6


@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_every_rate_drops_the_same_in_both_twins(rate):
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = TINY.replace(**none | {rate: 0.3})
    given = inputs(TINY)
    real = given[1] >= 0
    left, right = (run(name, config, *given, key=7)[0][real] for name in ("jax", "torch"))
    assert difference(left, right) <= LIMIT
    assert difference(right, run("torch", config, *given)[0][real]) > 1e-3


def test_the_list_of_perturbed_fields_is_complete():
    # Two are the numbers of a table's rows; without a pooler there is one result less.
    others = {"max_position_embeddings", "type_vocab_size", "pooler"}
    others |= {"hidden_dropout_prob", "attention_probs_dropout_prob"}
    assert set(FIELDS) == set(TINY.to_dict()) - others


def test_published_sizes():
    # Of BertForPreTraining and of BertModel, as the model cards' safetensors headers add up.
    published = {
        "bert-base-uncased": 110_106_428,
        "bert-large-uncased": 336_226_108,
        "minilm-l6": 22_713_216,
        "minilm-l12": 33_360_000,
    }
    assert {name: weight_map(preset(name)).parameters for name in published} == published
    base = preset("bert-base-uncased")
    assert weight_map(base.replace(masked_lm_head=False)).parameters == 109_482_240
    assert weight_map(base.replace(pooler=False)).parameters == 109_514_298


# Files


@pytest.mark.parametrize("name", list(CONFIGS)[:4])
def test_every_direction_of_the_weight_map_is_bit_identical(name, tmp_path):
    first = source = tmp_path / "0"
    twinformers.port(PresetCheckpoint("test", CONFIGS[name]), first, to="hf", dtype="bfloat16")
    for n, to in enumerate(["jax", "torch", "hf"], 1):
        twinformers.port(source, tmp_path / str(n), to=to)
        source = tmp_path / str(n)
        with open_checkpoint(source) as checkpoint:
            assert checkpoint.config == CONFIGS[name]
    assert (source / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert (source / "config.json").read_bytes() == (first / "config.json").read_bytes()


CLASSES = {
    "BertForPreTraining": "pre-trained",
    "BertForMaskedLM": "masked-lm",
    "BertModel": "base",
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Models of transformers, all of them random, as they save themselves."""
    import transformers

    raw = {k: v for k, v in TINY.to_hf().items() if k not in ("architectures", "model_type")}
    folder, models = tmp_path_factory.mktemp("bert"), {}
    torch.manual_seed(3)
    for name in CLASSES:
        models[name] = model = getattr(transformers, name)(transformers.BertConfig(**raw)).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        model.save_pretrained(folder / name)
    return models, folder


def tensors(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def written(folder, like, names):
    """A folder with tensors of these names, and the configuration of another one."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    save_file(names, folder / "model.safetensors")
    (folder / "config.json").write_bytes((like / "config.json").read_bytes())
    return folder


def same_outputs(place, model):
    tokens, positions, segments = (x[:1] for x in inputs(TINY))
    with torch.inference_mode():
        right = model(torch.tensor(tokens).long(), token_type_ids=torch.tensor(segments).long())[0].numpy()
        left, _ = twinformers.load(place, "torch")(*map(torch.tensor, (tokens, positions, segments)))
    assert left.shape == right.shape
    assert np.abs(left.numpy() - right).max() <= 1e-5 * np.abs(right).max()


@pytest.mark.parametrize("name", CLASSES)
def test_folders_of_transformers(name, theirs):
    models, folder = theirs
    for source in (folder / name, folder / name / "model.safetensors"):
        with open_checkpoint(source) as checkpoint:
            assert checkpoint.config == CONFIGS[CLASSES[name]]
            found = dict(convert(checkpoint, "hf"))
        state = models[name].state_dict()
        assert found.keys() == {n for n in state if ".decoder." not in n and not n.endswith("_ids")}
        assert all(np.array_equal(x, state[n].numpy()) for n, x in found.items())
        same_outputs(source, models[name])


def test_the_tensors_tell_which_parts_there_are(theirs, tmp_path):
    """What hub's `bert-base-uncased` looks like: early names of norms, more parts than config.json says."""
    models, folder = theirs
    names = {}
    for name, x in tensors(folder / "BertForPreTraining").items():
        if name.endswith("LayerNorm.weight"):
            name = name.removesuffix("weight") + "gamma"
        if name.endswith("LayerNorm.bias"):
            name = name.removesuffix("bias") + "beta"
        names[name] = x
    names["bert.embeddings.position_ids"] = np.arange(340)[None]
    place = written(tmp_path / "model", folder / "BertForMaskedLM", names)
    for source in (place, place / "model.safetensors"):
        with open_checkpoint(source) as checkpoint:
            assert checkpoint.config == TINY
        same_outputs(source, models["BertForPreTraining"])
    twinformers.port(place, tmp_path / "again", to="hf")
    written_config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written_config["architectures"] == ["BertForPreTraining"]
    assert tensors(tmp_path / "again").keys() == tensors(folder / "BertForPreTraining").keys()


def test_an_encoder_without_pooler_and_one_with_a_name(theirs, tmp_path):
    models, folder = theirs
    bare = {f"bert.{n}": x for n, x in tensors(folder / "BertModel").items() if not n.startswith("pooler.")}
    place = written(tmp_path, folder / "BertModel", bare)
    with open_checkpoint(place) as checkpoint:
        assert checkpoint.config == CONFIGS["encoder"]
    same_outputs(place, models["BertModel"])


def test_a_tensor_under_both_names_is_refused(theirs, tmp_path):
    _, folder = theirs
    names = tensors(folder / "BertModel")
    names["embeddings.LayerNorm.gamma"] = names["embeddings.LayerNorm.weight"]
    with pytest.raises(FormatError, match="two names") as caught:
        open_checkpoint(written(tmp_path, folder / "BertModel", names))
    assert "embeddings.LayerNorm" in str(caught.value)


@pytest.mark.parametrize(
    "lost", ["cls.predictions.bias", "pooler.dense.bias", "encoder.layer.2.output.dense.bias"]
)
def test_a_missing_tensor_is_named(lost, theirs, tmp_path):
    _, folder = theirs
    names = tensors(folder / "BertForPreTraining")
    del names[next(n for n in names if n.endswith(lost))]
    with pytest.raises(WeightsError, match="missing") as caught:
        twinformers.load(written(tmp_path, folder / "BertForPreTraining", names), "torch")
    assert lost in str(caught.value)


@pytest.mark.parametrize("name", ["BertForPreTraining", "BertModel"])
def test_legacy_flax_files(name, theirs, tmp_path):
    """transformers 4's Flax classes: kernels [in, out], norms have a `scale`, tables an `embedding`."""
    from flax.serialization import msgpack_serialize

    models, folder = theirs
    tree: dict = {}
    for path, x in models[name].state_dict().items():
        *owner, leaf = path.split(".")
        if ".decoder." in path or path.endswith("_ids"):
            continue
        if leaf == "weight":
            leaf = {"LayerNorm": "scale"}.get(owner[-1], "kernel")
            leaf = "embedding" if owner[-1].endswith("embeddings") else leaf
        node = tree
        for part in owner:
            node = node.setdefault(part, {})
        node[leaf] = (x.T if leaf == "kernel" else x).contiguous().numpy()
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack_serialize(tree))
    (tmp_path / "config.json").write_bytes((folder / name / "config.json").read_bytes())
    same_outputs(tmp_path, models[name])


# Configuration


def test_config_of_the_hub():
    """all-MiniLM-L6-v2, the fields that its config.json has."""
    raw = {
        "_name_or_path": "nreimers/MiniLM-L6-H384-uncased",
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": False,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 384,
        "initializer_range": 0.02,
        "intermediate_size": 1536,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "num_attention_heads": 12,
        "num_hidden_layers": 6,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "type_vocab_size": 2,
        "use_cache": True,
        "vocab_size": 30522,
    }
    assert config_from_hf(raw) == preset("minilm-l6")
    for config in CONFIGS.values():
        assert config_from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_defaults_are_those_of_transformers():
    import transformers

    theirs = transformers.BertConfig()
    ours = config_from_hf({"model_type": "bert"})
    for name, value in ours.to_dict().items():
        if name not in ("masked_lm_head", "pooler"):
            assert getattr(theirs, name) == value, name
    assert (ours.masked_lm_head, ours.pooler) == (False, True)  # AutoModel's class


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"hidden_size": 100}, "hidden_size"),
        ({"hidden_act": "mish"}, "hidden_act"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"architectures": ["BertForSequenceClassification"]}, "architectures"),
        ({"architectures": 3}, "architectures"),
        ({"num_hidden_layers": "12"}, "num_hidden_layers"),
        ({"type_vocab_size": 0}, "type_vocab_size"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob"),
    ],
)
def test_what_is_not_implemented_is_refused(raw, said):
    with pytest.raises(ConfigError, match=said):
        config_from_hf({"model_type": "bert", **raw})


def test_inputs_of_the_checks_are_what_they_say():
    tokens, positions, segments = kind(TINY).inputs(TINY)
    assert tokens.min() > 0 and segments.max() == TINY.type_vocab_size - 1
    assert positions.max() > 256 and (positions[1] < 0).sum() == 25 and positions[1, 0] == 200
    few = TINY.replace(max_position_embeddings=4)  # of which a fifth is none
    assert (kind(few).inputs(few)[1] == np.arange(4)).all()


@pytest.mark.parametrize("verb", ["generate", "compare"])
def test_what_an_encoder_does_not_do_is_refused(verb):
    call = {
        "generate": lambda: twinformers.generate("preset:bert-tiny", "x"),
        "compare": lambda: twinformers.compare("preset:bert-tiny"),
    }
    with pytest.raises(UsageError) as caught:
        call[verb]()
    assert "bert" in str(caught.value) and "twinformers" in caught.value.hint
