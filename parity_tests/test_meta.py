"""LLaMA from Meta's own files: written here in that layout, and run here by a model of Meta's design.

Nothing below the line of imports uses the reader or the weight map to make what it expects: the state is
split with plain torch, the reference turns interleaved pairs as complex numbers, and tokenizers are compared
with SentencePiece and with tiktoken's algorithm.
"""

from __future__ import annotations

import base64
import collections
import io
import itertools
import json
import os
import pathlib

import jax
import numpy as np
import pytest
import torch

import twinformers
from twinformers import verify
from twinformers.checkpoints import open_checkpoint
from twinformers.cli.app import run as command
from twinformers.configs import preset
from twinformers.configs.llama import LlamaConfig
from twinformers.errors import (
    ConfigError,
    DestinationError,
    FormatError,
    SourceError,
    TwinformersError,
    WeightsError,
)

LIMIT = 1e-12
# Heads and key-value heads that 8 ranks can share; 360 is what the formula makes of the two MLP parameters.
PARAMS = {
    "dim": 96,
    "n_layers": 2,
    "n_heads": 16,
    "n_kv_heads": 8,
    "vocab_size": -1,
    "multiple_of": 40,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5,
}
V, D, N, K, H, F = 264, 96, 16, 8, 6, 360
LLAMA3 = PARAMS | {"rope_theta": 500000.0, "vocab_size": V, "use_scaled_rope": True}
RANKS = [1, 2, 4, 8]


# Meta's files


def full_state(params=PARAMS, vocab=V, dtype=torch.float32, inner=F):
    """All tensors of one model by Meta's names, unsplit; norms away from 1, as in every test model here."""
    g = torch.Generator().manual_seed(7)

    def matrix(rows, columns, scale=1.5):
        return (torch.randn(rows, columns, generator=g) * scale / columns**0.5).to(dtype)

    def norm():
        return (1 + 0.3 * torch.randn(D, generator=g)).to(dtype)

    kv = H * (params.get("n_kv_heads") or N)
    state = {"tok_embeddings.weight": matrix(vocab, D, D**0.5)}
    for i in range(params["n_layers"]):
        state |= {
            f"layers.{i}.attention.wq.weight": matrix(N * H, D),
            f"layers.{i}.attention.wk.weight": matrix(kv, D),
            f"layers.{i}.attention.wv.weight": matrix(kv, D),
            f"layers.{i}.attention.wo.weight": matrix(D, N * H),
            f"layers.{i}.feed_forward.w1.weight": matrix(inner, D),
            f"layers.{i}.feed_forward.w2.weight": matrix(D, inner),
            f"layers.{i}.feed_forward.w3.weight": matrix(inner, D),
            f"layers.{i}.attention_norm.weight": norm(),
            f"layers.{i}.ffn_norm.weight": norm(),
        }
    state |= {"norm.weight": norm(), "output.weight": matrix(vocab, D), "rope.freqs": torch.ones(H // 2)}
    return state


def split(state, ranks, embedding_axis=1):
    """What each rank of a model-parallel group holds: `torch.chunk` of the matrices, all of the vectors."""
    rows = (".wo.", ".w2.")
    pieces = [{} for _ in range(ranks)]
    for name, tensor in state.items():
        if tensor.ndim == 2:
            axis = 1 if any(r in name for r in rows) else 0
            axis = embedding_axis if name.startswith("tok_") else axis
            parts = [part.clone() for part in tensor.chunk(ranks, axis)]
        else:
            parts = [tensor] * ranks
        for piece, part in zip(pieces, parts, strict=True):
            piece[name] = part
    return pieces


def write(folder, pieces, params=PARAMS):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    for i, piece in enumerate(pieces):
        torch.save(piece, folder / f"consolidated.{i:02d}.pth")
    return folder


# The reference: Touvron et al. 2023 as Meta computes it, on the unsplit state, in float64 throughout


def frequencies(params, factor):
    theta = params.get("rope_theta", 10000.0)
    f = 1.0 / theta ** (torch.arange(0, H, 2, dtype=torch.float64) / H)
    if factor is None:
        return f
    wavelength = 2 * torch.pi / f
    smooth = (8192 / wavelength - 1) / (4 - 1)
    between = (1 - smooth) * f / factor + smooth * f
    low, high = wavelength > 8192 / 1, wavelength < 8192 / 4
    return torch.where(high, f, torch.where(low, f / factor, between))


def turn(x, angles):
    """Neighbouring dimensions are one complex number, multiplied by e^(i angle). [T, heads, H] -> same"""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], H // 2, 2))
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(turned).flatten(-2)


def reference_logits(state, tokens, positions, params=PARAMS, factor=None):
    """Logits [T, V] of one sequence."""
    w = {name: tensor.double() for name, tensor in state.items()}
    angles = torch.outer(torch.as_tensor(positions, dtype=torch.float64), frequencies(params, factor))
    hidden = torch.full((len(tokens),) * 2, float("-inf"), dtype=torch.float64).triu(1)

    def norm(x, scale):
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + params["norm_eps"]) * scale

    x = w["tok_embeddings.weight"][torch.as_tensor(tokens).long()]
    for i in range(params["n_layers"]):
        p = f"layers.{i}"
        y = norm(x, w[f"{p}.attention_norm.weight"])
        q, k, v = ((y @ w[f"{p}.attention.w{n}.weight"].T).unflatten(-1, (-1, H)) for n in "qkv")
        q, k = turn(q, angles), turn(k, angles)
        k, v = (z.repeat_interleave(N // z.shape[1], dim=1) for z in (k, v))
        scores = torch.einsum("tnh,snh->nts", q, k) / H**0.5 + hidden
        mixed = torch.einsum("nts,snh->tnh", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ w[f"{p}.attention.wo.weight"].T
        y = norm(x, w[f"{p}.ffn_norm.weight"])
        gate, up = (y @ w[f"{p}.feed_forward.w{n}.weight"].T for n in (1, 3))
        x = x + (gate * torch.sigmoid(gate) * up) @ w[f"{p}.feed_forward.w2.weight"].T
    head = w.get("output.weight", w["tok_embeddings.weight"])
    return (norm(x, w["norm.weight"]) @ head.T).numpy()


TOKENS = np.random.default_rng(3).integers(0, V, (1, 70)).astype(np.int32)
POSITIONS = 300 + np.arange(70, dtype=np.int32)[None]


def twin_logits(folder, framework, device):
    if framework == "torch":
        model = twinformers.load(folder, "torch", "float64", device)
        with torch.inference_mode():
            inputs = (torch.tensor(x, device=device) for x in (TOKENS, POSITIONS))
            return model(*inputs)[0][0].cpu().numpy()
    with jax.enable_x64(True):
        model = twinformers.load(folder, "jax", "float64", device)
        return np.asarray(model(*(jax.device_put(x, device) for x in (TOKENS, POSITIONS)))[0][0])


def difference(left, right):
    assert np.isfinite(left).all() and np.isfinite(right).all() and left.dtype == right.dtype == np.float64
    return np.abs(left - right).max() / np.abs(right).max()


LAYOUTS = {
    # name: parameters, axis on which the embedding is split, stored dtype, the factor that scaling must have
    "llama2": (PARAMS, 1, torch.float32, None),
    "llama2-bfloat16": (PARAMS, 1, torch.bfloat16, None),
    "multi-head": ({k: v for k, v in PARAMS.items() if k != "n_kv_heads"}, 1, torch.float16, None),
    "code-llama": (PARAMS | {"rope_theta": 1000000}, 1, torch.bfloat16, None),
    "llama3.1": (LLAMA3, 0, torch.bfloat16, 8),
}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_of_both_twins_match_metas_model(layout, ranks, tmp_path, jax_device, torch_device):
    params, axis, dtype, factor = LAYOUTS[layout]
    state = full_state(params, dtype=dtype)
    folder = write(tmp_path / "meta", split(state, ranks, axis), params)
    expected = reference_logits(state, TOKENS[0], POSITIONS[0], params, factor)
    assert difference(twin_logits(folder, "torch", torch_device), expected) <= LIMIT
    assert difference(twin_logits(folder, "jax", jax_device), expected) <= LIMIT


@pytest.mark.parametrize("head", ["absent", "equal"])
def test_tied_head_of_llama_3_2(head, tmp_path, jax_device, torch_device):
    state = full_state(LLAMA3)
    state["output.weight"] = state["tok_embeddings.weight"].clone()
    if head == "absent":
        del state["output.weight"]
    folder = write(tmp_path / "meta", [state], LLAMA3)
    config = twinformers.load_config(folder)
    assert config.tie_word_embeddings and config.rope_scaling.factor == 32
    expected = reference_logits(state, TOKENS[0], POSITIONS[0], LLAMA3, 32)
    assert difference(twin_logits(folder, "torch", torch_device), expected) <= LIMIT
    assert difference(twin_logits(folder, "jax", jax_device), expected) <= LIMIT
    assert difference(expected, reference_logits(state, TOKENS[0], POSITIONS[0], LLAMA3, 8)) > 1e-6


def test_head_that_is_almost_the_embedding_is_not_taken_for_it(tmp_path):
    state = full_state(vocab=640)
    state["output.weight"] = state["tok_embeddings.weight"].clone()
    state["output.weight"][1, 0] += 1  # a row that the sample passes over
    write(tmp_path / "meta", [state])
    with pytest.raises(WeightsError, match="ties two tensors that differ") as caught:
        twinformers.port(tmp_path / "meta", tmp_path / "hf", to="hf")
    assert "output.weight" in caught.value.where and not (tmp_path / "hf").exists()


# Ports


def hugging_face_state(state):
    """The same weights by Hugging Face's names, each head's even dimensions before its odd ones."""

    def halves(w):
        heads = w.reshape(-1, H, D)
        return torch.cat([heads[:, 0::2], heads[:, 1::2]], 1).reshape(-1, D)

    names = {"attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj"}
    names |= {f"feed_forward.w{n}": f"mlp.{m}_proj" for n, m in ((1, "gate"), (2, "down"), (3, "up"))}
    names |= {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    result = {
        "model.embed_tokens.weight": state["tok_embeddings.weight"],
        "model.norm.weight": state["norm.weight"],
        "lm_head.weight": state["output.weight"],
    }
    for i in range(PARAMS["n_layers"]):
        for theirs, ours in names.items():
            result[f"model.layers.{i}.{ours}.weight"] = state[f"layers.{i}.{theirs}.weight"]
        for n in "qk":
            result[f"model.layers.{i}.self_attn.{n}_proj.weight"] = halves(
                state[f"layers.{i}.attention.w{n}.weight"]
            )
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_port_is_bit_identical_whatever_the_ranks(dtype, tmp_path):
    from safetensors.torch import load_file

    state = full_state(dtype=dtype)
    expected = hugging_face_state(state)
    files = set()
    for ranks in RANKS:
        for axis in (0, 1):
            folder = write(tmp_path / f"meta{ranks}{axis}", split(state, ranks, axis))
            out = tmp_path / f"hf{ranks}{axis}"
            result = twinformers.port(folder, out, to="hf")
            assert (result.source_format, result.tensors) == ("meta", len(expected))
            files.add((out / "model.safetensors").read_bytes() + (out / "config.json").read_bytes())
    assert len(files) == 1
    found = load_file(out / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("to", ["jax", "torch"])
def test_port_to_a_twin_and_on_to_hugging_face(to, tmp_path):
    folder = write(tmp_path / "meta", split(full_state(dtype=torch.bfloat16), 4))
    twinformers.port(folder, tmp_path / "direct", to="hf")
    twinformers.port(folder, tmp_path / "twin", to=to)
    twinformers.port(tmp_path / "twin", tmp_path / "back", to="hf")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("direct", "back")]
    assert files[0] == files[1]


def test_array_outlives_the_checkpoint_and_the_file(tmp_path):
    state = full_state()
    folder = write(tmp_path / "meta", [state])
    with open_checkpoint(folder) as checkpoint:
        for name in ("norm.weight", "layers.0.attention.wq.weight"):
            array = checkpoint.read(name)
            assert array.flags.c_contiguous and array.flags.owndata
            array[:] = 0
            assert torch.equal(torch.from_numpy(checkpoint.read(name)), state[name])
    with pytest.raises(SourceError, match="closed"):
        checkpoint.read("norm.weight")


def test_views_and_parameters_read_like_tensors(tmp_path):
    """Meta's pieces are views of larger storages, and may be saved as parameters or transposed."""
    state = full_state()
    pieces = split(state, 2)
    for piece in pieces:
        piece["norm.weight"] = torch.nn.Parameter(torch.stack([state["norm.weight"]] * 3)[1])
        for name in ("layers.0.attention.wo.weight", "layers.0.attention.wq.weight"):
            piece[name] = piece[name].T.contiguous().T
    with open_checkpoint(write(tmp_path / "meta", pieces)) as checkpoint:
        for name in state:
            assert checkpoint.read(name).flags.c_contiguous
            assert torch.equal(torch.from_numpy(checkpoint.read(name)), state[name])


# Configurations of released models, from Meta's own params.json; the tensors' headers suffice


RELEASED = {
    "llama2-7b": dict(dim=4096, n_layers=32, n_heads=32, multiple_of=256, norm_eps=1e-5, vocab_size=-1),
    "llama2-13b": dict(dim=5120, n_layers=40, n_heads=40, multiple_of=256, norm_eps=1e-5, vocab_size=-1),
    "llama2-70b": dict(
        dim=8192,
        n_layers=80,
        n_heads=64,
        n_kv_heads=8,
        multiple_of=4096,
        ffn_dim_multiplier=1.3,
        norm_eps=1e-5,
        vocab_size=-1,
    ),
    "llama3-8b": dict(
        dim=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        vocab_size=128256,
        multiple_of=1024,
        ffn_dim_multiplier=1.3,
        norm_eps=1e-5,
        rope_theta=500000.0,
    ),
    "llama3.1-405b": dict(
        dim=16384,
        n_layers=126,
        n_heads=128,
        n_kv_heads=8,
        vocab_size=128256,
        multiple_of=4096,
        ffn_dim_multiplier=1.2,
        norm_eps=1e-5,
        rope_theta=500000.0,
        use_scaled_rope=True,
    ),
    "llama3.2-1b": dict(
        dim=2048,
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        vocab_size=128256,
        multiple_of=256,
        ffn_dim_multiplier=1.5,
        norm_eps=1e-5,
        rope_theta=500000.0,
        use_scaled_rope=True,
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_params_of_released_models_match_their_presets(name):
    expected = preset(name)
    headers = {
        "tok_embeddings.weight": torch.empty(expected.vocab_size, expected.hidden_size, device="meta"),
        "layers.0.feed_forward.w1.weight": torch.empty(
            expected.intermediate_size, expected.hidden_size, device="meta"
        ),
    }
    assert LlamaConfig.from_meta(RELEASED[name], headers, expected.tie_word_embeddings) == expected


# What is refused


def fails(folder, error, match, where=""):
    """Opening or porting ends in that error, and leaves nothing behind."""
    with pytest.raises(error, match=match) as caught:
        twinformers.port(folder, folder.parent / "out", to="hf")
    assert where in caught.value.where
    assert caught.value.expected or caught.value.hint
    assert not (folder.parent / "out").exists()


BAD_PARAMS = {
    "no-dim": ({"dim": None}, "missing", "dim"),
    "no-layers": ({"n_layers": None}, "missing", "n_layers"),
    "no-heads": ({"n_heads": None}, "missing", "n_heads"),
    "no-multiple": ({"multiple_of": None}, "missing", "multiple_of"),
    "no-epsilon": ({"norm_eps": None}, "missing", "norm_eps"),
    "text-for-number": ({"n_heads": "16"}, "bad value", "n_heads"),
    "true-for-number": ({"n_layers": True}, "bad value", "n_layers"),
    "other-heads": ({"n_heads": 7}, "bad value", "n_heads"),
    "other-kv-heads": ({"n_kv_heads": 3}, "shared out evenly", "num_key_value_heads"),
    "other-vocabulary": ({"vocab_size": 32000}, "disagree", "vocab_size"),
    "zero-vocabulary": ({"vocab_size": 0}, "bad value", "vocab_size"),
    "other-multiple": ({"multiple_of": 50}, "disagree", "multiple_of"),
    "no-multiplier": ({"ffn_dim_multiplier": None}, "disagree", "ffn_dim_multiplier"),
    "endless-multiplier": ({"ffn_dim_multiplier": 1e308}, "bad value", "ffn_dim_multiplier"),
    "window": ({"sliding_window": 4096}, "not implemented", "sliding_window"),
    "quantised": ({"quantization_args": {"group_size": 256}}, "not implemented", "quantization_args"),
    "experts": ({"moe": {"num_experts": 8}}, "not implemented", "moe"),
    "images": ({"vision_chunk_size": 448}, "not implemented", "vision_chunk_size"),
    "scaling-as-number": ({"use_scaled_rope": 1}, "bad value", "use_scaled_rope"),
}


@pytest.mark.parametrize("case", BAD_PARAMS)
def test_params_that_do_not_fit_are_refused_by_field(case, tmp_path):
    change, match, field = BAD_PARAMS[case]
    params = {k: v for k, v in (PARAMS | change).items() if v is not None}
    folder = write(tmp_path / "meta", split(full_state(), 2), params)
    fails(folder, ConfigError, match, field)
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(folder)
    assert str(folder / "params.json") in caught.value.where


@pytest.mark.parametrize(
    "change", [{"dim": 192, "ffn_dim_multiplier": 0.65}, {"n_layers": 1}, {"n_layers": 3}]
)
def test_params_of_another_model_are_refused_by_tensor(change, tmp_path):
    folder = write(tmp_path / "meta", split(full_state(), 2), PARAMS | change)
    fails(folder, WeightsError, "shape|left over|missing")


@pytest.mark.parametrize("content", ["[1]", "{", "", "\xff"])
def test_params_that_are_no_object_are_refused(content, tmp_path):
    folder = write(tmp_path / "meta", [full_state()])
    (folder / "params.json").write_text(content, encoding="latin-1")
    with pytest.raises(FormatError, match="JSON") as caught:
        open_checkpoint(folder)
    assert caught.value.where == str(folder / "params.json")


@pytest.mark.parametrize("missing", [0, 1, 3])
def test_missing_rank_is_refused(missing, tmp_path):
    folder = write(tmp_path / "meta", split(full_state(), 4))
    (folder / f"consolidated.{missing:02d}.pth").unlink()
    if missing < 3:
        fails(folder, FormatError, "rank's file is missing", str(folder))
    else:  # no gap in the numbers: the sizes tell
        fails(folder, ConfigError, "disagree", "params.json")


def test_rank_twice_and_no_rank_are_refused(tmp_path):
    folder = write(tmp_path / "meta", split(full_state(), 2))
    first = folder / "consolidated.00.pth"
    (folder / "consolidated.0.pth").write_bytes(first.read_bytes())
    fails(folder, FormatError, "rank's file", str(folder))
    for path in folder.glob("*.pth"):
        path.unlink()
    fails(folder, FormatError, "no weights", str(folder))


def rename(piece):
    piece["layers.0.attention.wx.weight"] = piece.pop("layers.0.attention.wq.weight")


def drop(piece):
    del piece["layers.1.ffn_norm.weight"]


def reshape(piece):
    piece["layers.1.feed_forward.w1.weight"] = piece["layers.1.feed_forward.w1.weight"][:-1].clone()


def recast(piece):
    piece["layers.1.attention.wo.weight"] = piece["layers.1.attention.wo.weight"].half()


def revalue(piece):
    piece["layers.1.attention_norm.weight"] = piece["layers.1.attention_norm.weight"].clone()
    piece["layers.1.attention_norm.weight"][5] += 1e-6


@pytest.mark.parametrize("change", [rename, drop, reshape, recast, revalue])
def test_ranks_that_disagree_are_refused(change, tmp_path):
    pieces = split(full_state(), 4)
    change(pieces[2])
    fails(write(tmp_path / "meta", pieces), WeightsError, "the ranks", "consolidated.02.pth: layers.")


@pytest.mark.parametrize("change", [rename, drop, reshape])
def test_tensors_that_the_model_does_not_have_are_refused(change, tmp_path):
    pieces = split(full_state(), 2)
    for piece in pieces:
        change(piece)
    fails(write(tmp_path / "meta", pieces), WeightsError, "missing|shape")


@pytest.mark.parametrize(
    "value",
    [
        "text",
        torch.ones(D, dtype=torch.int64),
        torch.ones(D).to(torch.float8_e4m3fn),
        torch.ones(D).to_sparse(),
        torch.ones(D, device="meta"),
        torch.ones(1).expand(2**40),
    ],
    ids=["text", "integers", "float8", "sparse", "empty", "endless"],
)
def test_value_that_is_no_plain_tensor_is_refused(value, tmp_path):
    state = full_state() | {"norm.weight": value}
    fails(write(tmp_path / "meta", [state]), FormatError, "plain tensor", "norm.weight")


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
@pytest.mark.parametrize("name", ["tok_embeddings", "output", "layers.0.feed_forward.w1", "norm"])
def test_tensor_of_another_rank_is_refused(name, shape, tmp_path):
    pieces = split(full_state() | {f"{name}.weight": torch.ones(shape)}, 1) * 2
    fails(write(tmp_path / "meta", pieces), TwinformersError, "matrix|shape|split|disagree")


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_pickle_that_asks_for_code_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "executed"
    folder = write(tmp_path / "meta", [full_state() | {"norm.weight": Harm(mark)}])
    fails(folder, FormatError, "asks for code", "consolidated.00.pth")
    assert not mark.exists()
    torch.load(folder / "consolidated.00.pth", weights_only=False)  # it would have worked
    assert mark.exists()


def test_truncated_and_foreign_files_are_refused(tmp_path):
    folder = write(tmp_path / "meta", split(full_state(), 2))
    path = folder / "consolidated.01.pth"
    whole = path.read_bytes()
    for length in [0, 10, *range(1000, len(whole), len(whole) // 7), len(whole) - 1]:
        path.write_bytes(whole[:length])
        fails(folder, FormatError, "readable PyTorch", "consolidated.01.pth")
    torch.save({}, path, _use_new_zipfile_serialization=False)
    fails(folder, WeightsError, "the ranks disagree", "consolidated.01.pth")
    torch.save([torch.ones(3)], path)
    fails(folder, FormatError, "not a dictionary", "consolidated.01.pth")


def test_destination_that_holds_the_source_is_refused(tmp_path):
    folder = write(tmp_path / "meta", [full_state()])
    before = sorted(folder.iterdir())
    with pytest.raises(DestinationError, match="the destination"):
        twinformers.port(folder, folder, to="hf", overwrite=True)
    assert sorted(folder.iterdir()) == before


# Tokenizers


TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two leading, three   inside and a trailing ",
    "digits 1 12 123 1234567890 3.14159",
    "line\nbreaks\n\n\nand\ttabs\r\n \n end\n",
    "naïve café, Grüße, Ελληνικά, Русский, العربية, 日本語, 한국어",
    "emoji 🙂🙂 👩‍👩‍👧‍👦",
    "it's they've I'LL we'D can't",
    "def f(x):\n    return x ** 2  # comment\n",
    "a" * 100,
]


def train_sentencepiece(**options):
    import sentencepiece

    model = io.BytesIO()
    lines = [line for text in TEXTS * 3 for line in text.splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        num_threads=1,
        minloglevel=2,
        hard_vocab_limit=False,
        **{
            "vocab_size": 400,
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "split_digits": True,
            "allow_whitespace_only_pieces": True,
            "character_coverage": 0.99,
            **options,
        },
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def sentencepiece_model():
    return train_sentencepiece()


@pytest.mark.parametrize("place", ["folder", "parent"])
def test_sentencepiece_model_matches_sentencepiece(place, sentencepiece_model, tmp_path):
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    folder = write(tmp_path / "meta", split(full_state(vocab=400), 2))
    (folder if place == "folder" else tmp_path).joinpath("tokenizer.model").write_bytes(sentencepiece_model)
    ours = twinformers.load_tokenizer(folder)
    assert ours.vocab_size == theirs.get_piece_size()
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_id(), (theirs.eos_id(),)) == (1, (2,))
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text, special=False) == ids, text
        assert ours.encode(text) == [1, *ids]
        assert ours.decode(ids) == theirs.decode(ids)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.assets["tokenizer.model"] == sentencepiece_model


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nfkc"},
        {"remove_extra_whitespaces": True},
        {"treat_whitespace_as_suffix": True},
    ],
    ids=lambda o: next(iter(o)),
)
def test_sentencepiece_model_of_another_kind_is_refused(options, tmp_path):
    folder = write(tmp_path / "meta", [full_state(vocab=640)])
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(**options))
    with pytest.raises(FormatError, match="SentencePiece") as caught:
        twinformers.load_tokenizer(folder)
    assert caught.value.where.endswith("tokenizer.model")


def test_sentencepiece_without_a_dummy_prefix(tmp_path):
    import sentencepiece

    model = train_sentencepiece(add_dummy_prefix=False)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    folder = write(tmp_path / "meta", [full_state(vocab=400)])
    (folder / "tokenizer.model").write_bytes(model)
    ours = twinformers.load_tokenizer(folder)
    for text in TEXTS:
        assert ours.encode(text, special=False) == theirs.encode(text)


# Meta's published pattern of Llama 3
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_ranks(count=150):
    """A tiny tiktoken vocabulary: all bytes, then the most frequent pair of neighbours, again and again."""
    import regex

    words = [[bytes([b]) for b in w.encode()] for text in TEXTS for w in regex.findall(PATTERN, text)]
    ranks = {bytes([b]): rank for rank, b in enumerate(sorted(range(256), key=lambda b: (b < 33, b)))}
    while len(ranks) < 256 + count:
        pairs = collections.Counter(p for word in words for p in itertools.pairwise(word))
        left, right = min(pairs, key=lambda p: (-pairs[p], p))
        ranks[left + right] = len(ranks)
        words = [merge(word, ranks, only=left + right) for word in words]
    return ranks


def merge(parts, ranks, only=None):
    """tiktoken's algorithm: join the neighbours whose whole has the lowest rank, the leftmost first."""
    parts = list(parts)
    while True:
        wholes = [(a + b, i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        known = [(ranks[w], i) for w, i in wholes if (w in ranks if only is None else w == only)]
        if not known:
            return parts
        _, i = min(known)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def tiktoken_ids(text, ranks):
    import regex

    ids = []
    for word in (w.encode() for w in regex.findall(PATTERN, text)):
        # A word that is a token as a whole is taken as it is.
        parts = [word] if word in ranks else merge([bytes([b]) for b in word], ranks)
        ids += [ranks[p] for p in parts]
    return ids


@pytest.fixture(scope="module")
def ranks():
    return train_ranks()


def tiktoken_file(ranks):
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


@pytest.mark.parametrize("params", [PARAMS, LLAMA3], ids=["3", "3.1"])
def test_tiktoken_model_matches_tiktokens_algorithm(params, ranks, tmp_path):
    size = len(ranks) + 256
    folder = write(tmp_path / "meta", [full_state(vocab=size)], params | {"vocab_size": size})
    (folder / "tokenizer.model").write_bytes(tiktoken_file(ranks))
    ours = twinformers.load_tokenizer(folder)
    begin, end, turn_end = len(ranks), len(ranks) + 1, len(ranks) + 9
    assert (ours.vocab_size, ours.bos_id, ours.eos_ids) == (size, begin, (end, turn_end))
    rng = np.random.default_rng(0)  # words that the vocabulary was not made from: merges compete in them
    strange = ["".join(rng.choice(list("aeinrst "), 60)) for _ in range(100)]
    for text in [*TEXTS, *strange]:
        ids = tiktoken_ids(text, ranks)
        assert ours.encode(text, special=False) == ids, text
        assert ours.encode(text) == [begin, *ids]
        assert ours.decode(ids) == text
    chat = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    ids = ours.encode(chat, special=False)
    assert [i - begin for i in ids if i >= begin] == [0, 6, 7, 9]
    newer = {"<|finetune_right_pad_id|>": 4, "<|eom_id|>": 8, "<|python_tag|>": 10}
    older = {f"<|reserved_special_token_{n}|>": i for n, i in ((0, 2), (3, 5), (4, 8), (5, 10), (250, 255))}
    for name, place in (newer if params is LLAMA3 else older).items():
        assert ours.encode(name, special=False) == [begin + place]
    assert ours.pad_id == (begin + 4 if params is LLAMA3 else None)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"\n\xff",
        b"IQ==\n",
        b"IQ== 0\nIQ== 1\n",
        b"IQ== 1\n",
        b"!!! 0\n",
        b"IQ== x\n",
        b"\x80\x81",
    ],
)
def test_damaged_tokenizer_is_refused_by_file(data, tmp_path):
    folder = write(tmp_path / "meta", [full_state()])
    (folder / "tokenizer.model").write_bytes(data)
    with pytest.raises(FormatError, match="not a tokenizer") as caught:
        twinformers.load_tokenizer(folder)
    assert caught.value.where.endswith("tokenizer.model")


def test_every_truncated_sentencepiece_model_raises_a_typed_error(sentencepiece_model):
    from twinformers.checkpoints.meta_tokenizer import tokenizer_assets

    config = preset("llama-tiny").replace(vocab_size=1000)
    tokenizer_assets(sentencepiece_model, config, "whole")
    cuts = [sentencepiece_model[:length] for length in range(0, len(sentencepiece_model), 97)]
    for data in [*cuts, sentencepiece_model + b"\x0a\x7f", sentencepiece_model + b"\x0a" + b"\xff" * 11]:
        with pytest.raises(FormatError):
            tokenizer_assets(data, config, "cut")


def test_tokenizer_of_another_model_is_refused(sentencepiece_model, tmp_path):
    folder = write(tmp_path / "meta", [full_state()])
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    with pytest.raises(FormatError, match="more tokens than the model"):
        twinformers.load_tokenizer(folder)


def test_folder_without_a_tokenizer_ports_and_says_so(tmp_path):
    folder = write(tmp_path / "meta", [full_state()])
    twinformers.port(folder, tmp_path / "hf", to="hf")
    with pytest.raises(SourceError, match="no tokenizer"):
        twinformers.load_tokenizer(folder)


# The verbs


@pytest.fixture(scope="module")
def spoken(sentencepiece_model, tmp_path_factory) -> pathlib.Path:
    folder = write(tmp_path_factory.mktemp("verbs") / "meta", split(full_state(vocab=400), 4))
    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    return folder


def test_inspect_shows_the_joined_tensors(spoken, capsys):
    assert command(["inspect", str(spoken), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["format"], facts["architecture"]) == ("meta", "llama")
    shapes = {t["name"]: t["shape"] for t in facts["tensors"]}
    assert shapes["tok_embeddings.weight"] == [400, D]
    assert shapes["layers.1.attention.wk.weight"] == [K * H, D]
    assert shapes["layers.1.feed_forward.w2.weight"] == [D, F]
    state = full_state(vocab=400)
    assert facts["parameters"] == sum(t.numel() for n, t in state.items() if n != "rope.freqs")
    assert {"tokenizer.json", "tokenizer.model"} <= set(facts["assets"])


def test_generate_speaks_alike_in_both_frameworks(spoken, capsys):
    arguments = ["--prompt", "Hello", "--framework", "both", "--max-new-tokens", "8", "--json"]
    assert command(["generate", str(spoken), *arguments]) == 0
    left, right = json.loads(capsys.readouterr().out)["outputs"]
    assert left["tokens"] == right["tokens"] and len(left["tokens"]) > 0
    assert left["text"] == right["text"]


def test_port_carries_the_tokenizer(spoken, tmp_path, capsys):
    import transformers

    assert command(["port", str(spoken), str(tmp_path / "hf"), "--to", "hf", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source_format"] == "meta"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = twinformers.load_tokenizer(spoken)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


def test_verify_passes(spoken):
    report = verify(spoken, dtypes=["float64"])
    assert report.ok and {"logits", "reference", "generation"} <= {r.check for r in report.checks}


def test_bad_folder_is_one_message_and_exit_code_2(spoken, tmp_path, capsys):
    folder = write(tmp_path / "meta", split(full_state(), 2))
    (folder / "consolidated.00.pth").unlink()
    assert command(["inspect", str(folder)]) == 2
    assert "rank's file is missing" in capsys.readouterr().err
