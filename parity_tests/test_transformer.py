"""The Transformer: twin against twin, against torch.nn.Transformer, and against Marian and FSMT."""

from __future__ import annotations

import logging
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import jax_models.layers
import jax_models.random
import jax_models.transformer
import torch_models.layers
import torch_models.random
import torch_models.transformer
import twinformers
from jax_models import functional
from twinformers.checkpoints import open_checkpoint
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.configs import config_from_hf, preset
from twinformers.configs.transformer import NEUTRAL, SPELLINGS, TransformerConfig
from twinformers.errors import ConfigError, WeightsError
from twinformers.parity.recording import record_jax, record_torch
from twinformers.parity.reference import float64_throughout
from twinformers.weight_maps import weight_map
from twinformers.weight_maps.transformer import layer_map

LIMIT = 1e-12
GRADIENT_LIMIT = 1e-10
TINY = preset("transformer-tiny")
APART = TINY.replace(share_embeddings=False, tie_word_embeddings=False, source_vocab_size=97)
FSMT = APART.replace(model_type="fsmt", pad_token_id=1, eos_token_id=2)
CONFIGS = {
    "paper": TINY,
    "paper-all-apart": APART,
    "paper-input-shared": TINY.replace(tie_word_embeddings=False),
    "paper-output-shared": APART.replace(tie_word_embeddings=True, activation_function="gelu"),
    "marian": TINY.replace(model_type="marian", activation_function="swish"),
    "marian-output-shared": APART.replace(model_type="marian", tie_word_embeddings=True),
    "marian-all-apart": APART.replace(model_type="marian", scale_embedding=False),
    "fsmt": FSMT,
    "fsmt-shared": TINY.replace(model_type="fsmt", pad_token_id=3, activation_function="silu"),
}
RELEASED = {name: config for name, config in CONFIGS.items() if config.model_type != "transformer"}
# These programs run once: XLA's optimizations would cost more than they save.
QUICK = {"xla_backend_optimization_level": 0}
DROPS = {"dropout": 0.3, "attention_dropout": 0.2, "activation_dropout": 0.25}


# Inputs and calls


def inputs(config, lengths=(23, 19), start=0):
    """Source and target, three rows: no padding and positions from `start` on, left, right padding."""
    rng = np.random.default_rng(5)
    pairs = []
    for length, vocabulary in zip(lengths, (config.source_vocab_size, config.target_vocab_size), strict=True):
        # The padding token itself stands only where padding is: FSMT tells padding by it.
        tokens = rng.choice(np.setdiff1d(np.arange(vocabulary), config.pad_token_id), (3, length))
        positions = np.tile(np.arange(length), (3, 1))
        positions[0] += start
        positions[1] = np.r_[-np.ones(5), np.arange(length - 5)]
        positions[2, -4:] = -1
        pairs += [np.where(positions < 0, config.pad_token_id, tokens), positions]
    return tuple(x.astype(np.int32) for x in pairs)


@cache
def loaded(config, framework, dtype="float64"):
    with jax.enable_x64(dtype == "float64"):
        return twinformers.load(PresetCheckpoint("test", config), framework, dtype)


@cache
def compiled(config, dtype="float64", method="__call__"):
    apply, params = functional(loaded(config, "jax", dtype), method)
    return jax.jit(apply, compiler_options=QUICK), params


def run_jax(config, given, dtype="float64", seed=None):
    with jax.enable_x64(dtype == "float64"):
        apply, params = compiled(config, dtype)
        key = None if seed is None else jax_models.random.key(seed)
        logits, _ = apply(params, *given, key=key)
        assert str(logits.dtype) == dtype
        return np.asarray(logits, np.promote_types(np.float32, logits.dtype))


def run_torch(config, given, dtype="float64", seed=None):
    key = None if seed is None else torch_models.random.key(seed)
    with torch.inference_mode():
        logits, _ = loaded(config, "torch", dtype)(*map(torch.tensor, given), key=key)
        assert logits.dtype == getattr(torch, dtype)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).numpy()


def difference(left, right, positions):
    """Largest difference over real tokens, relative to the largest value; NaN fails."""
    real = positions >= 0
    assert left.shape == right.shape and np.isfinite(left).all() and np.isfinite(right).all()
    return np.abs(left - right)[real].max() / np.abs(right[real]).max()


# Twin against twin


@pytest.mark.parametrize("start", [0, 250])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_jax_matches_torch(name, start):
    given = inputs(CONFIGS[name], start=start)
    left, right = run_jax(CONFIGS[name], given), run_torch(CONFIGS[name], given)
    assert difference(left, right, given[3]) <= LIMIT


def test_padding_changes_nothing():
    source, source_positions, tokens, positions = inputs(TINY)
    whole = run_torch(TINY, (source, source_positions, tokens, positions))
    for row in (1, 2):
        s, t = source_positions[row] >= 0, positions[row] >= 0
        alone = [source[row, s], source_positions[row, s], tokens[row, t], positions[row, t]]
        logits = run_torch(TINY, [x[None] for x in alone])
        assert difference(logits, whole[row, t][None], positions[row, t][None]) <= LIMIT


@pytest.mark.parametrize("chunk", [1, 5, 19])
@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("name", ["paper", "marian", "fsmt"])
def test_cached_decoding_matches_full_pass(name, framework, chunk):
    config, given = CONFIGS[name], inputs(CONFIGS[name], start=250)
    source, source_positions, tokens, positions = given
    parts = [slice(s, s + chunk) for s in range(0, tokens.shape[1], chunk)]
    out = []
    if framework == "jax":
        with jax.enable_x64(True):
            model = loaded(config, "jax")
            cross = model.cross_cache(model.encode(source, source_positions), source_positions)
            (step, params), kept = compiled(config, method="decode"), model.empty_cache(3, 512)
            for part in parts:
                logits, kept = step(params, tokens[:, part], positions[:, part], cross, kept)
                out.append(np.asarray(logits))
        full = run_jax(config, given)
    else:
        with torch.inference_mode():
            model, (s, sp, t, p) = loaded(config, "torch"), map(torch.tensor, given)
            cross, kept = model.cross_cache(model.encode(s, sp), sp), model.empty_cache(3, 512)
            for part in parts:
                x, kept = model.decode_hidden(t[:, part], p[:, part], cross, kept)
                out.append(model.head(x).numpy())
        full = run_torch(config, given)
    assert difference(np.concatenate(out, 1), full, positions) <= LIMIT


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_lower_precision_twins_run_and_agree_to_their_precision(dtype):
    given = inputs(CONFIGS["marian"], start=250)
    truth = run_torch(CONFIGS["marian"], given)
    roundoff = {"float32": 2**-24, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    for run in (run_jax, run_torch):
        # A sanity bound: some hundred roundings along the longest path.
        assert difference(run(CONFIGS["marian"], given, dtype), truth, given[3]) <= 100 * roundoff


# Dropout


@pytest.mark.parametrize("name", ["paper", "marian"])
def test_dropout_jax_matches_torch(name):
    config = CONFIGS[name].replace(**DROPS)
    given = inputs(config)
    dropped = [run_torch(config, given, seed=seed) for seed in (3, 4)]
    for seed, right in zip((3, 4), dropped, strict=True):
        assert difference(run_jax(config, given, seed=seed), right, given[3]) <= LIMIT
    without = run_torch(config, given)
    assert difference(without, run_torch(CONFIGS[name], given), given[3]) == 0
    assert difference(dropped[0], dropped[1], given[3]) > 0.01
    assert difference(dropped[0], without, given[3]) > 0.01


def test_dropout_masks_are_equal_and_have_their_rate():
    x = np.random.default_rng(0).standard_normal((50, 7, 200)).astype(np.float32)
    for rate in (0.1, 0.5, 0.9):
        left = np.asarray(jax_models.layers.dropout(x, rate, jax_models.random.key(8)))
        right = torch_models.layers.dropout(torch.tensor(x), rate, torch_models.random.key(8)).numpy()
        assert np.array_equal(left, right)
        kept = left != 0
        assert abs((~kept).mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / x.size)
        assert np.allclose(left[kept], x[kept] / (1 - rate), rtol=1e-6)


# Gradients


def smoothed_loss_jax(logits, labels, real):
    smooth = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), 0.1)
    return (optax.softmax_cross_entropy(logits, smooth) * real).sum() / real.sum()


def smoothed_loss_torch(logits, labels, real):
    target = torch.where(real, labels.long(), -100).flatten()
    return nn.functional.cross_entropy(logits.flatten(0, 1), target, label_smoothing=0.1)


@pytest.mark.parametrize(("name", "seed"), [("paper", None), ("paper", 6), ("marian", 6), ("fsmt", None)])
def test_gradients_jax_match_torch(name, seed):
    config = CONFIGS[name].replace(**DROPS)
    given = inputs(config)
    labels = np.roll(given[2], -1, axis=1)
    with jax.enable_x64(True):
        apply, params = functional(loaded(config, "jax"))
        key = None if seed is None else jax_models.random.key(seed)

        def loss(params):
            return smoothed_loss_jax(apply(params, *given, key=key)[0], labels, given[3] >= 0)

        left_loss, gradients = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)
        leaves = {
            ".".join(str(part.key) for part in path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
        }
    model = loaded(config, "torch")
    model.zero_grad()
    key = None if seed is None else torch_models.random.key(seed)
    logits, _ = model(*map(torch.tensor, given), key=key)
    right_loss = smoothed_loss_torch(logits, torch.tensor(labels), torch.tensor(given[3] >= 0))
    right_loss.backward()
    assert abs(float(left_loss) - right_loss.item()) <= LIMIT * right_loss.item()
    parameters = dict(model.named_parameters())
    largest = max(p.grad.abs().max().item() for p in parameters.values())
    compared = set()
    for name, leaf in weight_map(config).leaves("torch").items():
        ours = leaves[leaf.name("jax")]
        if not leaf.trains:
            assert name not in parameters and not ours.any()
            continue
        compared.add(name)
        right = leaf.move(parameters[name].grad.numpy(), "torch", "jax")
        scale = max(np.abs(right).max(), 1e-3 * largest)
        assert np.abs(ours - right).max() <= GRADIENT_LIMIT * scale, name
    assert compared == parameters.keys() and len(leaves) == len(weight_map(config).leaves("jax"))


# Against torch.nn.Transformer


def sinusoids(length, d_model):
    """Section 3.5, entry by entry."""
    table = np.zeros((length, d_model))
    for position in range(length):
        for dimension in range(d_model):
            angle = position / 10000 ** (2 * (dimension // 2) / d_model)
            table[position, dimension] = np.sin(angle) if dimension % 2 == 0 else np.cos(angle)
    return table


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_hidden_states_match_torch_nn_transformer(activation):
    config = APART.replace(activation_function=activation)
    given = inputs(config, start=250)
    model = loaded(config, "torch")
    common = {"activation": activation, "batch_first": True, "dtype": torch.float64}
    D = config.d_model
    encoder = nn.TransformerEncoderLayer(D, config.encoder_attention_heads, config.encoder_ffn_dim, **common)
    decoder = nn.TransformerDecoderLayer(D, config.decoder_attention_heads, config.decoder_ffn_dim, **common)
    theirs = nn.Transformer(
        D,
        # What nn.Transformer builds by itself ends each stack with a norm that the paper does not have.
        custom_encoder=nn.TransformerEncoder(encoder, config.encoder_layers, enable_nested_tensor=False),
        custom_decoder=nn.TransformerDecoder(decoder, config.decoder_layers),
        batch_first=True,
    ).eval()
    table, state = layer_map(config), model.state_dict()
    theirs.load_state_dict(
        {
            name: torch.tensor(table.produce(name, "torch.nn", lambda n: state[n].numpy(), "torch"))
            for name in table.tensors("torch.nn")
        },
        strict=True,
    )
    waves = sinusoids(300, D)
    placed = []
    for embed, tokens, positions in (
        (state["source_embed.weight"], *given[:2]),
        (state["embed.weight"], *given[2:]),
    ):
        placed.append(torch.tensor(embed.numpy()[tokens] * np.sqrt(D) + waves[positions]))
    absent = torch.tensor(given[1] < 0)
    # Padding sees itself, so that a row which sees nothing does not become NaN; nobody else sees padding.
    T = given[2].shape[1]
    seen = np.tril(np.ones((T, T), bool)) & (given[3] >= 0)[:, None] | np.eye(T, dtype=bool)  # [B, T, T]
    unseen = torch.tensor(~seen).repeat_interleave(config.decoder_attention_heads, 0)  # [B N, T, T]
    with torch.no_grad():
        masks = {"src_key_padding_mask": absent, "memory_key_padding_mask": absent}
        memory = theirs.encoder(placed[0], src_key_padding_mask=absent)
        right = theirs(*placed, tgt_mask=unseen, **masks)
        source, source_positions, tokens, positions = map(torch.tensor, given)
        encoded = model.encode(source, source_positions)
        left, _ = model.decode_hidden(tokens, positions, model.cross_cache(encoded, source_positions))
    assert difference(encoded.numpy(), memory.numpy(), given[1]) <= LIMIT
    assert difference(left.numpy(), right.numpy(), given[3]) <= LIMIT


# Against transformers


def random_transformers(config, folder, dtype=torch.float32):
    """A random model of transformers' own making, saved by transformers: nothing of ours is in the folder."""
    theirs = transformers.AutoConfig.for_model(**config.to_hf())
    model = getattr(transformers, config.hf_class)(theirs)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            if "embed_positions" in name:
                continue
            x.normal_(generator=generator)
            if "norm" in name and name.endswith("weight"):
                x.mul_(0.3).add_(1)
            elif x.ndim == 2 and "embed" not in name and "shared" not in name and "final" not in name:
                x.mul_(1.5 * x.shape[1] ** -0.5)
            else:
                x.mul_(0.5)
    model.to(dtype).save_pretrained(folder)


def exact_transformers(config, folder, monkeypatch, mode="eval"):
    """The saved model in nothing less than float64, its table of positions made anew by its own code."""
    monkeypatch.setattr(torch, "FloatTensor", torch.DoubleTensor)  # Marian's table is cast with it
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with float64_throughout():
            theirs = transformers.AutoConfig.from_pretrained(folder, attn_implementation="eager")
            model = getattr(transformers, config.hf_class)(theirs)
    finally:
        torch.set_default_dtype(before)
    state = {n: x.double() for n, x in load_file(folder / "model.safetensors").items()}
    state = {n: x for n, x in state.items() if "embed_positions" not in n}
    with torch.no_grad():
        missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    # What is missing is the tables of positions, and tables that are one with a loaded one.
    shared = {x.data_ptr() for n, x in model.state_dict().items() if n in state}
    assert all("embed_positions" in n or model.state_dict()[n].data_ptr() in shared for n in missing)
    return getattr(model, mode)()


def call_transformers(model, given):
    source, source_positions, tokens, positions = map(torch.tensor, given)
    with float64_throughout():
        return model(
            input_ids=source.long(),
            attention_mask=(source_positions >= 0).long(),
            decoder_input_ids=tokens.long(),
            decoder_attention_mask=(positions >= 0).long(),
            use_cache=False,
        ).logits


def their_inputs(config, lengths=(23, 19)):
    """Inputs as transformers understands them: Marian counts positions from the row's start, padding too."""
    source, source_positions, tokens, positions = inputs(config, lengths)
    if config.model_type == "marian":
        source_positions, positions = (
            np.where(p < 0, -1, np.arange(p.shape[1], dtype=np.int32)) for p in (source_positions, positions)
        )
    return source, source_positions, tokens, positions


@pytest.mark.parametrize("name", RELEASED)
def test_every_submodule_matches_transformers(name, tmp_path, monkeypatch):
    config = RELEASED[name]
    random_transformers(config, tmp_path)
    given = their_inputs(config, (270, 261))
    table = weight_map(config)
    right, theirs = record_torch(
        exact_transformers(config, tmp_path, monkeypatch),
        lambda model: call_transformers(model, given),
        table.module_paths(),
    )
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config == config
        model = twinformers.load(checkpoint, "torch", "float64")
        torch_logits, torch_seen = record_torch(model, lambda m: m(*map(torch.tensor, given))[0])
        with jax.enable_x64(True):
            jax_logits, jax_seen = record_jax(twinformers.load(checkpoint, "jax", "float64"), *given)
    assert list(jax_seen) == list(torch_seen)
    for seen, logits in ((jax_seen, jax_logits), (torch_seen, torch_logits)):
        assert difference(logits, right, given[3]) <= LIMIT
        for path, x in theirs.items():
            x = x if x.shape[0] == 3 else x.swapaxes(0, 1)  # FSMT's layers have time first
            positions = given[1] if x.shape[1] == 270 else given[3]
            assert difference(seen[path], x, positions) <= LIMIT, path
    # Nothing is left out but the MLP as a whole, for which transformers has no module.
    assert torch_seen.keys() - theirs.keys() == {path for path in torch_seen if path.endswith(".mlp")}


@pytest.mark.parametrize("name", [n for n in RELEASED if n.startswith("marian")])
def test_dropout_stands_where_transformers_has_it(name, tmp_path, monkeypatch):
    config = RELEASED[name].replace(**DROPS)
    random_transformers(config, tmp_path)
    given = their_inputs(config)
    # Our keys in the order in which transformers drops: embedding, then each layer's sites in turn.
    fold, key = torch_models.random.fold_in, torch_models.random.key(9)
    E, D = config.encoder_layers, config.decoder_layers
    keys = [fold(key, E + D)] + [fold(fold(key, i), site) for i in range(E) for site in range(4)]
    keys += [fold(key, E + D + 1)] + [fold(fold(key, E + i), site) for i in range(D) for site in range(6)]
    keys = iter(keys)

    def drop(x, p, training):
        assert training
        return torch_models.layers.dropout(x, p, next(keys))

    model = exact_transformers(config, tmp_path, monkeypatch, "train")
    monkeypatch.setattr(nn.functional, "dropout", drop)
    with torch.inference_mode():
        right = call_transformers(model, given).numpy()
    assert next(keys, None) is None
    twin = twinformers.load(tmp_path, "torch", "float64")
    with torch.inference_mode():
        left, _ = twin(*map(torch.tensor, given), key=key)
    assert difference(left.numpy(), right, given[3]) <= LIMIT


# Conversion


def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", RELEASED)
def test_round_trip_of_a_saved_model_is_bit_identical(name, dtype, tmp_path):
    config = RELEASED[name]
    source = tmp_path / "theirs"
    random_transformers(config, source, getattr(torch, dtype))
    for to in ("jax", "torch", "hf"):
        twinformers.port(source, tmp_path / to, to=to)
        source = tmp_path / to
    before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "hf")
    assert after.keys() == before.keys()
    for name, x in before.items():
        assert x.dtype == after[name].dtype == getattr(torch, dtype)
        if "embed_positions" in name:  # FSMT computes its table in float32, we in float64: both round it
            limit = 1e-2 if dtype == "bfloat16" else 1e-4
            assert (x.double() - after[name].double()).abs().max() < limit
        else:
            assert torch.equal(x.view(torch.uint8), after[name].view(torch.uint8)), name
    theirs, ours = (transformers.AutoConfig.from_pretrained(tmp_path / f) for f in ("theirs", "hf"))
    known = {SPELLINGS[config.model_type].names.get(f, f) for f in config.to_dict()}
    assert {n: getattr(theirs, n) for n in known} == {n: getattr(ours, n) for n in known}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_direction_of_the_weight_map_is_bit_identical(name, tmp_path):
    hops = ["jax", "torch", "hf"] if name in RELEASED else ["jax", "torch"]
    first = source = tmp_path / "first"
    twinformers.port(PresetCheckpoint("test", CONFIGS[name]), first, to=hops[-1])
    for to in hops:
        twinformers.port(source, tmp_path / to, to=to)
        source = tmp_path / to
    assert (source / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert (source / "config.json").read_bytes() == (first / "config.json").read_bytes()


@pytest.mark.parametrize("name", RELEASED)
def test_ported_folder_loads_in_transformers_and_matches(name, tmp_path, caplog):
    config, given = RELEASED[name], their_inputs(RELEASED[name])
    twinformers.port(PresetCheckpoint("test", config), tmp_path / "hf", to="hf")
    level = transformers.logging.get_verbosity()
    transformers.logging.enable_propagation()
    try:
        transformers.logging.set_verbosity_warning()
        with caplog.at_level(logging.WARNING):
            theirs, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(
                tmp_path / "hf", attn_implementation="eager", output_loading_info=True
            )
    finally:
        transformers.logging.disable_propagation()
        transformers.logging.set_verbosity(level)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert caplog.messages == []
    assert type(theirs).__name__ == config.hf_class
    with torch.inference_mode():
        source, source_positions, tokens, positions = map(torch.tensor, given)
        right = theirs(
            input_ids=source.long(),
            attention_mask=(source_positions >= 0).long(),
            decoder_input_ids=tokens.long(),
            decoder_attention_mask=(positions >= 0).long(),
            use_cache=False,
        ).logits
    # float32 on their side; the exact comparison stands above.
    assert difference(run_torch(config, given), right.numpy(), given[3]) <= 1e-5


def test_the_papers_own_layout_is_refused_as_hf(tmp_path):
    with pytest.raises(WeightsError, match="sinusoids alternate"):
        twinformers.port(PresetCheckpoint("test", TINY), tmp_path / "hf", to="hf")
    assert not list(tmp_path.iterdir())
    assert TINY.hf_class is None
    report = twinformers.verify(PresetCheckpoint("test", TINY), dtypes=["float64"], checks=["reference"])
    assert [(r.limit, r.ok, "sinusoids alternate" in r.note) for r in report.checks] == [(None, True, True)]


# Configuration


@pytest.mark.parametrize("model_type", ["marian", "fsmt"])
def test_defaults_match_transformers(model_type, caplog):
    theirs = transformers.AutoConfig.for_model(model_type)
    with caplog.at_level(logging.WARNING):
        assert config_from_hf({"model_type": model_type}) == config_from_hf(theirs.to_dict())
    assert caplog.messages == []  # nothing that transformers writes is unknown here
    spelling = SPELLINGS[model_type]
    for name, default in spelling.defaults.items():
        assert default == getattr(theirs, name) or (name == "decoder_vocab_size" and default is None)
    for name, implemented in TransformerConfig.HF_FIXED.items():
        assert getattr(theirs, name, implemented) == implemented


OPUS = {  # Helsinki-NLP/opus-mt-en-de, as published
    "_num_labels": 3,
    "activation_dropout": 0.0,
    "activation_function": "swish",
    "add_bias_logits": False,
    "add_final_layer_norm": False,
    "architectures": ["MarianMTModel"],
    "attention_dropout": 0.0,
    "bad_words_ids": [[58100]],
    "bos_token_id": 0,
    "classif_dropout": 0.0,
    "d_model": 512,
    "decoder_attention_heads": 8,
    "decoder_ffn_dim": 2048,
    "decoder_layerdrop": 0.0,
    "decoder_layers": 6,
    "decoder_start_token_id": 58100,
    "dropout": 0.1,
    "encoder_attention_heads": 8,
    "encoder_ffn_dim": 2048,
    "encoder_layerdrop": 0.0,
    "encoder_layers": 6,
    "eos_token_id": 0,
    "forced_eos_token_id": 0,
    "gradient_checkpointing": False,
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "max_length": 512,
    "max_position_embeddings": 512,
    "model_type": "marian",
    "normalize_before": False,
    "normalize_embedding": False,
    "num_beams": 4,
    "num_hidden_layers": 6,
    "pad_token_id": 58100,
    "scale_embedding": True,
    "static_position_embeddings": True,
    "use_cache": True,
    "vocab_size": 58101,
}


def test_published_configuration_is_the_preset(caplog):
    with caplog.at_level(logging.WARNING):
        assert config_from_hf(OPUS) == preset("opus-mt-en-de")
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("normalize_before", {"normalize_before": True}),
        ("normalize_embedding", {"normalize_embedding": True}),
        ("add_final_layer_norm", {"add_final_layer_norm": True}),
        ("static_position_embeddings", {"static_position_embeddings": False}),
        ("activation_function", {"activation_function": "gelu_new"}),
        ("quantization_config", {"quantization_config": {"quant_method": "gptq"}}),
        ("share_encoder_decoder_embeddings", {"tie_word_embeddings": False}),
        ("decoder_vocab_size", {"decoder_vocab_size": 58102}),
        ("vocab_size", {"vocab_size": "many"}),
        ("d_model", {"d_model": 513}),
        ("encoder_attention_heads", {"encoder_attention_heads": 7}),
        ("decoder_attention_heads", {"decoder_attention_heads": 7}),
        ("dropout", {"dropout": 1.0}),
        ("attention_dropout", {"attention_dropout": -0.1}),
        ("pad_token_id", {"pad_token_id": 58101}),
        ("eos_token_id", {"eos_token_id": [0, 1]}),
        ("decoder_start_token_id", {"decoder_start_token_id": -1}),
        ("model_type", {"model_type": "bart"}),
    ],
)
def test_what_is_not_implemented_is_refused_by_the_files_name(name, changes):
    with pytest.raises(ConfigError, match=rf"config\.json: {name}: "):
        config_from_hf({**OPUS, **changes})


def test_every_neutral_field_is_one_that_changes_nothing():
    """None of them is a field of ours, nor one that transformers' models read in evaluation."""
    assert not NEUTRAL & (set(TINY.to_dict()) | TransformerConfig.HF_FIXED.keys())


def test_parameters_match_the_paper():
    for name, stated in (("transformer-base", 65e6), ("transformer-big", 213e6)):
        c, count = preset(name), weight_map(preset(name)).parameters
        D, F, V = c.d_model, c.encoder_ffn_dim, 37000
        attention, mlp, norm = 4 * (D * D + D), 2 * D * F + F + D, 2 * D
        assert count == 6 * (attention + mlp + 2 * norm) + 6 * (2 * attention + mlp + 3 * norm) + V * D
        # 63,082,496 and 214,245,376. Table 3 rounds, and leaves open what "about 37000 tokens" exactly are.
        assert abs(count - stated) < 0.03 * stated


FIELDS = {
    "model_type": "marian",
    "source_vocab_size": 103,
    "target_vocab_size": 101,
    "d_model": 36,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 44,
    "decoder_ffn_dim": 60,
    "activation_function": "swish",
    "dropout": 0.4,
    "attention_dropout": 0.35,
    "activation_dropout": 0.3,
    "scale_embedding": False,
    "share_embeddings": True,
    "tie_word_embeddings": True,
    "pad_token_id": 4,
}


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_changes_both_twins_alike(field):
    base = {"pad_token_id": FSMT, "share_embeddings": APART.replace(source_vocab_size=89)}.get(field, APART)
    base = base.replace(**DROPS)
    changed = base.replace(**{field: FIELDS[field]})
    given, seed = inputs(changed.replace(pad_token_id=0)), 7 if "dropout" in field else None
    # A larger vocabulary shows in the tokens that it adds.
    known = [
        np.minimum(given[0], base.source_vocab_size - 1),
        np.minimum(given[2], base.target_vocab_size - 1),
    ]
    before = run_torch(base, (known[0], given[1], known[1], given[3]), seed=seed)
    left, right = run_jax(changed, given, seed=seed), run_torch(changed, given, seed=seed)
    assert difference(left, right, given[3]) <= LIMIT
    assert right.shape != before.shape or difference(right, before, given[3]) > 1e-6


def test_the_list_of_perturbed_fields_is_complete():
    # Lengths bound what engines accept, the other two tokens say where they begin and stop.
    outside = {"max_position_embeddings", "eos_token_id", "decoder_start_token_id"}
    assert set(FIELDS) == set(TINY.to_dict()) - outside


# Mistakes, planted one at a time in the Flax twin: each is caught, at the first submodule that it reaches


def plant_offset(monkeypatch):
    right = jax_models.transformer.sinusoids
    wrong = lambda positions, config, dtype: right(positions + 1, config, dtype)  # noqa: E731
    monkeypatch.setattr(jax_models.transformer, "sinusoids", wrong)


def plant_layout(monkeypatch):
    right = jax_models.transformer.sinusoids

    def wrong(positions, config, dtype):
        x = right(positions, config, dtype)
        return x.reshape(*x.shape[:2], -1, 2).swapaxes(2, 3).reshape(x.shape)

    monkeypatch.setattr(jax_models.transformer, "sinusoids", wrong)


def plant_no_scale(monkeypatch):
    right = jax_models.transformer.Transformer._place

    def wrong(self, x, positions, key):
        return right(self, x / self.config.d_model**0.5, positions, key)

    monkeypatch.setattr(jax_models.transformer.Transformer, "_place", wrong)


def plant_epsilon(monkeypatch):
    right = jax_models.layers.LayerNorm.__init__
    wrong = lambda self, size, eps, *, dtype: right(self, size, eps / 10, dtype=dtype)  # noqa: E731
    monkeypatch.setattr(jax_models.layers.LayerNorm, "__init__", wrong)


def plant_no_cross_mask(monkeypatch):
    right = jax_models.transformer.Transformer.cross_cache

    def wrong(self, memory, source_positions):
        return right(self, memory, jnp.zeros_like(source_positions))

    monkeypatch.setattr(jax_models.transformer.Transformer, "cross_cache", wrong)


def plant_gelu(monkeypatch):
    wrong = {**jax_models.layers.ACTIVATIONS, "gelu": jax.nn.gelu}
    monkeypatch.setattr(jax_models.transformer, "ACTIVATIONS", wrong)


MISTAKES = {
    plant_offset: "encoder.0.self_attn.k_proj",
    plant_layout: "encoder.0.self_attn.k_proj",
    plant_no_scale: "encoder.0.self_attn.k_proj",
    plant_epsilon: "encoder.0.self_attn_norm",
    plant_no_cross_mask: "decoder.0.cross_attn.o_proj",
    plant_gelu: "encoder.0.mlp.fc2",
}


def first_difference(config, given):
    checkpoint = PresetCheckpoint("test", config)
    with jax.enable_x64(True):
        logits, left = record_jax(twinformers.load(checkpoint, "jax", "float64"), *given)
    expected, right = record_torch(loaded(config, "torch"), lambda m: m(*map(torch.tensor, given))[0])
    for path in left:
        positions = given[1] if left[path].shape[1] == given[1].shape[1] else given[3]
        if difference(left[path], right[path], positions) > LIMIT:
            assert difference(logits, expected, given[3]) > LIMIT
            return path
    assert difference(logits, expected, given[3]) <= LIMIT
    return None


@pytest.mark.parametrize("plant", [None, *MISTAKES], ids=lambda plant: getattr(plant, "__name__", "none"))
def test_planted_mistake_is_caught_and_located(plant, monkeypatch):
    config = CONFIGS["paper-output-shared"]
    if plant is not None:
        plant(monkeypatch)
    assert first_difference(config, inputs(config)) == MISTAKES.get(plant)


def test_mistake_in_both_twins_is_caught_by_transformers(tmp_path, monkeypatch):
    config = RELEASED["fsmt"]
    given = their_inputs(config)
    random_transformers(config, tmp_path)
    with torch.inference_mode():
        right = call_transformers(exact_transformers(config, tmp_path, monkeypatch), given).numpy()
    wrong = config.replace(model_type="marian").position_frequencies
    monkeypatch.setattr(TransformerConfig, "position_frequencies", wrong)
    with torch.inference_mode():
        left = twinformers.load(tmp_path, "torch", "float64")(*map(torch.tensor, given))[0].numpy()
    assert difference(left, right, given[3]) > 1e-6


@pytest.mark.parametrize(
    "name",
    [n if n == next(iter(RELEASED)) else pytest.param(n, marks=pytest.mark.slow) for n in RELEASED],
)
def test_saved_model_ported_passes_verify(name, tmp_path):
    random_transformers(RELEASED[name], tmp_path / "theirs")
    twinformers.port(tmp_path / "theirs", tmp_path / "ours", to="jax")
    checks = ["logits", "activations", "cache", "generation", "reference", "gradients"]
    report = twinformers.verify(tmp_path / "ours", dtypes=["float64"], checks=checks)
    assert [r for r in report.checks if not r.ok] == []
    compared = {(r.check, r.left, r.right) for r in report.checks if r.limit is not None}
    assert {("reference", "jax", "transformers"), ("gradients", "jax", "transformers")} <= compared
