"""What `test_sharding_torch.py` has each of some processes do: a model on a mesh, and the same on its own."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from mutations.planting import Edit, planted
from saving_run import most
from saving_run import refused as refused_saving
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import twinformers
from torch_models.generate import Generator
from torch_models.layers import dropout
from torch_models.llama import Llama
from torch_models.random import fold_in, key
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.configs import preset
from twinformers.errors import UsageError
from twinformers.sharding import AXES, DATA, FSDP, TENSOR, saving
from twinformers.sharding.torch_loading import load_sharded
from twinformers.sharding.torch_saving import save_sharded
from twinformers.sharding.torch_side import make_mesh, shard, shard_batch
from twinformers.training.adamw import AdamW
from twinformers.training.step import Batch
from twinformers.training.torch_step import make_step

ROWS, LENGTH = 8, 13
#: Everything divides by four, so that every rule cuts.
EVEN = preset("llama-tiny").replace(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=8,
)
#: One key-value head, an embedding that is the head, and a vocabulary that nothing divides.
ODD = preset("llama-tiny").replace(num_key_value_heads=1, tie_word_embeddings=True)
#: One whose weights have an axis that "tensor" cuts, and then "fsdp" into parts that are not alike.
STRIDED = ODD.replace(hidden_size=33, num_attention_heads=3)
#: A table of positions, biases and dropout.
GPT2 = preset("gpt2-tiny").replace(
    vocab_size=256, hidden_size=64, intermediate_size=96, num_attention_heads=8
)
#: Three tables and a head, and biases.
APART = preset("transformer-tiny").replace(share_embeddings=False, tie_word_embeddings=False)
#: An encoder: three tables, a head that reads one of them, and a pooler.
BERT = preset("bert-tiny").replace(
    vocab_size=256, hidden_size=64, intermediate_size=96, num_attention_heads=8
)
#: One that also has a buffer, which is no parameter; one whose folder has tables that are computed.
MARIAN = preset("transformer-tiny").replace(model_type="marian", activation_function="swish")
FSMT = APART.replace(model_type="fsmt", pad_token_id=1, eos_token_id=2)
#: By what each is saved as: format, dtype, bytes of a file at the most.
SAVED = {
    "even": (EVEN, "hf", "float32", 50_000),
    "odd": (STRIDED, "torch", "bfloat16", 1 << 30),
    "apart": (APART, "torch", "float64", 1 << 30),
    "marian": (MARIAN, "hf", "float32", 1 << 30),
    "fsmt": (FSMT, "hf", "float32", 1 << 30),
    "bert": (BERT, "hf", "float32", 1 << 30),
    "flax": (EVEN, "jax", "float32", 1 << 30),
}
PLANTED = "layers.1.mlp.up_proj"

SIDE, STEP = "twinformers.sharding.torch_side", "twinformers.training.torch_step"
MISTAKES = {
    "mean of processes": Edit(f"{SIDE}:_split", "divide_factor(1.0)", "divide_factor(2.0)"),
    "tokens of one process": Edit(
        f"{STEP}:Step.__call__", "self._sum(torch.sum(targets >= 0))", "torch.sum(targets >= 0)"
    ),
    "loss of one process": Edit(f"{STEP}:Step.__call__", "self._sum(loss)", "loss"),
    "norm without tensor": Edit(
        f"{SIDE}:total_norm", "dist.all_reduce(squares[0]", "(lambda *a, **k: 0)(squares[0]"
    ),
    "norm without fsdp": Edit(f"{SIDE}:total_norm", "dist.all_reduce(square,", "(lambda *a, **k: 0)(square,"),
    "whole weights counted twice": Edit(f"{SIDE}:total_norm", "cut if parted else whole", "cut"),
    "clipped by parts": Edit(
        "twinformers.training.adamw:torch_adamw",
        "norm = total_norm(gradients, mesh)",
        "norm = total_norm(gradients, mesh) / 2",
    ),
    "outside of the blocks forgotten": Edit(
        f"{SIDE}:head_passes", "gradient_sync(True", "gradient_sync(False"
    ),
}


def load(config, dtype="float64"):
    return twinformers.load(PresetCheckpoint("test", config), "torch", dtype)


def both(config, mesh, dtype="float64", **options):
    """A model on its own, and the same on the mesh."""
    return load(config, dtype), shard(load(config, dtype), mesh, **options)


def far(left, right):
    """The largest difference of any tensor, relative to that tensor's largest value."""
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        assert a.shape == b.shape, (a.shape, b.shape)
        if a.numel():
            worst = max(worst, ((a - b).abs().max() / a.abs().max().clamp(min=1e-300)).item())
    return worst


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def weights(model):
    return [whole(p.detach()) for p in model.parameters()]


def inputs(config):
    """Rows with 13 real tokens and with fewer: blocks of rows do not weigh the same."""
    rng = np.random.default_rng(0)
    vocabulary = getattr(config, "vocab_size", None) or config.target_vocab_size
    tokens = rng.integers(0, vocabulary, (ROWS, LENGTH)).astype(np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    positions[1] = np.r_[[-1] * 4, np.arange(LENGTH - 4)]
    positions[5, 3:] = positions[6, 8:] = -1
    return torch.from_numpy(tokens), torch.from_numpy(positions)


def decoded(step, cache, tokens, positions):
    """Logits of three calls with a cache."""
    out = []
    for part in (slice(0, 7), slice(7, 8), slice(8, LENGTH)):
        logits, cache = step(tokens[:, part], positions[:, part], cache)
        out.append(logits)
    return torch.cat(out, 1)


def real(logits, positions):
    return logits * (positions >= 0)[..., None]


def compared(config, mesh, dtype="float64", plant=False):
    """Logits of a full pass and of cached decoding, each against the model on its own."""
    one, many = load(config, dtype), load(config, dtype)
    if plant:  # one weight in one place: what a wrong part would do at the least
        many.get_submodule(PLANTED).weight.data[5, 3] += 1
    shard(many, mesh)
    tokens, positions = inputs(config)
    mine = shard_batch((tokens, positions), mesh)
    with torch.no_grad():
        expected = shard_batch(real(one(tokens, positions)[0], positions), mesh)
        forward = many(*mine)[0]
        cached = decoded(many, many.empty_cache(mine[0].shape[0], 32), *mine)
    return {
        "forward": far([expected], [real(forward, mine[1])]),
        "cache": far([expected], [real(cached, mine[1])]),
    }


def share(model):
    """The part of a model's numbers that this process holds."""
    held = sum(p.to_local().numel() for p in model.parameters())
    return held / sum(p.numel() for p in model.parameters())


def batch(config):
    tokens, positions = (x.numpy() for x in inputs(config))
    targets = np.random.default_rng(1).integers(0, config.vocab_size, tokens.shape).astype(np.int32)
    return Batch(tokens, positions, np.where(np.arange(LENGTH) == 2, -1, targets).astype(np.int32))


def trained(model, data, **options):
    """Losses and gradient norms of two updates, and the weights and shares after them."""
    step = make_step(model, AdamW(warmup=2, clip=0.5), **options)
    state, told = step.init(model), []
    for _ in range(2):
        state, metrics = step(state, data)
        told += [metrics.loss, metrics.norm]
    return [*told, *weights(model)]


@functools.cache
def alone(config, dtype):
    return trained(load(config, dtype), batch(config))


def updates(config, mesh, dtype="float64", **options):
    """Two updates against the same of the model on its own, and what is held afterwards."""
    expected, data = alone(config, dtype), batch(config)
    many = shard(load(config, dtype), mesh)
    assert float(expected[1]) > 0.5, "nothing would be clipped"
    with torch.no_grad():  # an evaluation, which leaves something gathered
        many.head(many.hidden(*shard_batch(inputs(config), mesh))[0])
    found = trained(many, shard_batch(data, mesh), **options)
    return {"update": far(expected, found), "share after": share(many)}


def translated(mesh):
    """The encoder-decoder: a full pass with its gradients, and cached decoding."""
    config = APART
    one, many = both(config, mesh)
    tokens, positions = inputs(config)
    source = tokens.flip(0), positions.flip(0)
    mine, mine_source = shard_batch((tokens, positions), mesh), shard_batch(source, mesh)
    expected, _ = one(*source, tokens, positions)
    logits, _ = many(*mine_source, *mine)
    with torch.no_grad():
        cross = many.cross_cache(many.encode(*mine_source), mine_source[1])
        cache = many.empty_cache(mine[0].shape[0], 32)
        cached = decoded(lambda t, p, c: many.decode(t, p, cross, c), cache, *mine)
    wanted = shard_batch(real(expected.detach(), positions), mesh)
    (real(expected, positions) ** 2).sum().backward()
    (real(logits, mine[1]) ** 2).sum().backward()
    scale = max(p.grad.abs().max() for p in one.parameters())
    worst = max(
        ((p.grad - whole(q.grad)).abs().max() / torch.maximum(p.grad.abs().max(), 1e-3 * scale)).item()
        for p, q in zip(one.parameters(), many.parameters(), strict=True)
    )
    return {
        "translate": far([wanted], [real(logits.detach(), mine[1])]),
        "translate cached": far([wanted], [real(cached, mine[1])]),
        "translate gradients": worst,
    }


def encoded(mesh):
    """The encoder: a full pass with all its parts, and their gradients."""
    one, many = both(BERT, mesh)
    given = (*inputs(BERT), torch.arange(ROWS * LENGTH, dtype=torch.int32).reshape(ROWS, LENGTH) % 4)
    mine = shard_batch(given, mesh)
    told = []
    for model, own_given in ((one, given), (many, mine)):
        logits, pooled = model(*own_given)
        told.append((real(logits, own_given[1]), pooled))
        sum((x**2).sum() for x in told[-1]).backward()
    expected = shard_batch(tuple(x.detach() for x in told[0]), mesh)
    scale = max(p.grad.abs().max() for p in one.parameters() if p.grad is not None)
    worst = max(
        ((p.grad - whole(q.grad)).abs().max() / torch.maximum(p.grad.abs().max(), 1e-3 * scale)).item()
        for p, q in zip(one.parameters(), many.parameters(), strict=True)
        if p.grad is not None
    )
    return {"encode": far(expected, [x.detach() for x in told[1]]), "encode gradients": worst}


def stored(mesh, folder):
    """How many tensors loaded into shards are not what `shard` makes of `load`; each model is then saved."""
    wrong, block = 0, saving.BLOCK_BYTES
    saving.BLOCK_BYTES = 10_000  # so that matrices take several
    for name, (config, to, dtype, size) in SAVED.items():
        source = PresetCheckpoint("test", config)
        one, many = shard(load(config, dtype), mesh), load_sharded(source, mesh, dtype)
        assert many.training is False and many.mesh is mesh
        left, right = ([*m.named_parameters(), *m.named_buffers()] for m in (one, many))
        wrong += sum(not alike(a, b) for a, b in zip(left, right, strict=True))
        if name == "even":
            with torch.no_grad():  # an evaluation, which leaves something gathered
                many.head(many.hidden(*shard_batch(inputs(config), mesh))[0])
        save_sharded(many, folder / name, to=to, source=source, shard_size=size)
    saving.BLOCK_BYTES = block
    return {"loaded": float(wrong)}


def alike(left, right):
    """Whether two named tensors are the same one: on the mesh, and here to the last bit."""
    (name, a), (same, b) = left, right
    where = [(type(x), x.dtype, x.requires_grad, getattr(x, "placements", None)) for x in (a, b)]
    return name == same and where[0] == where[1] and torch.equal(*(own(x.detach()) for x in (a, b)))


def own(x):
    return x.to_local() if isinstance(x, DTensor) else x


def memory(folder):
    """Bytes that loading took at the most, of this process's weights, and of both and saving; the worst."""
    mesh = make_mesh(fsdp=2, device="cpu")
    dist.barrier()
    before = most()
    model = load_sharded(folder / "big", mesh)
    after = most()
    held = sum(own(p).nbytes for p in model.parameters())
    save_sharded(model, folder / "big again")
    worst = torch.tensor([after - before, held, most() - before])
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return dict(zip(("peak", "held", "saving"), worst.tolist(), strict=True))


def generated(mesh):
    """Greedy tokens of prompts that every process has, by the engine as it is."""
    one, many = both(ODD.replace(num_key_value_heads=6), mesh, "float32")
    prompts = [[5, 7, 11], [3, 1, 4, 1, 5, 9, 2, 6]]
    texts = [list(Generator(m).stream(prompts, max_new_tokens=6)) for m in (one, many)]
    return {"generated": float(texts[0] != texts[1])}


def mixed(mesh):
    """Losses of a step that computes in bfloat16, with an embedding that is used twice in it."""
    config, data, seen = EVEN.replace(tie_word_embeddings=True), batch(EVEN), set()
    one, many = load(config, "float32"), shard(load(config, "float32"), mesh, compute_dtype="bfloat16")
    inside = many.layers[0].mlp.children()
    handles = [module.register_forward_hook(lambda *call: seen.add(call[2].dtype)) for module in inside]
    left = trained(one, data, compute_dtype="bfloat16", chunk=5)
    right = trained(many, shard_batch(data, mesh), chunk=5)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        mine = shard_batch(inputs(config), mesh)
        cached = many(*mine, many.empty_cache(mine[0].shape[0], 16))[0]
    assert seen == {torch.bfloat16} == {cached.dtype}, seen
    assert {p.dtype for p in many.parameters()} == {torch.float32}
    return {"mixed": max(far(left[i : i + 1], right[i : i + 1]) for i in (0, 2))}


class Dropping(Llama):
    def hidden(self, tokens, positions, cache=None, *, key=None):
        x, cache = super().hidden(tokens, positions, cache)
        return dropout(x, 0.3, key), cache


def dropped(mesh):
    """The first loss with dropout against blocks of rows with the keys that are promised, one by one."""
    one, many = load(EVEN), load(EVEN)
    one.__class__ = many.__class__ = Dropping
    data, parts = batch(EVEN), mesh[DATA].size() * mesh[FSDP].size()
    cost = count = 0
    for block in range(parts):
        size = ROWS // parts
        tokens, positions, targets = (torch.from_numpy(x)[block * size : (block + 1) * size] for x in data)
        wanted = torch.where(positions >= 0, targets, -1).long()
        seed = fold_in(fold_in(fold_in(key(3), 1), block), 0)
        logits = one(tokens, positions, key=seed)[0]
        cost += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), ignore_index=-1, reduction="sum"
        ).detach()
        count += (wanted >= 0).sum()
    found = trained(shard(many, mesh), shard_batch(data, mesh), seed=3)
    return {"dropout": far([cost / count], found[:1])}


def gathered(mesh):
    """How many blocks are whole while the second one computes: a norm's scale is no DTensor then."""
    many, counts = shard(load(EVEN), mesh), []

    def count(*_):
        counts.append(sum(not isinstance(b.attn_norm.weight, DTensor) for b in many.layers))

    many.layers[1].attn.register_forward_hook(count)
    with torch.no_grad():
        many(*shard_batch(inputs(EVEN), mesh))
    return {"whole blocks": max(counts)}


def reductions(mesh):
    """How many sums between the processes of "tensor" a pass takes, there and back."""
    many, counts = shard(load(EVEN), mesh), []
    with CommDebugMode() as there:
        logits = many(*shard_batch(inputs(EVEN), mesh))[0]
    with CommDebugMode() as back:
        logits.sum().backward()
    for mode in (there, back):
        counts.append(mode.get_comm_counts().get(torch.ops.c10d_functional.all_reduce, 0))
    return {"sums forward": counts[0], "sums backward": counts[1]}


def mistakes(mesh):
    """How far an update is off with each mistake planted."""
    found = {}
    for name, edit in MISTAKES.items():
        with planted([edit]):
            found[f"mistake: {name}"] = -updates(EVEN, mesh)["update"]
    return found


def refused(mesh, folder):
    """What errors say, by what was asked for."""
    quantized = twinformers.load(PresetCheckpoint("test", EVEN), "torch", "float32", quantize="int8")
    sharded = shard(load(EVEN, "float32"), mesh)
    asked = {
        "mesh": lambda: make_mesh(data=3),
        "negative": lambda: make_mesh(data=-1, fsdp=-mesh.size()),
        "batch": lambda: shard_batch(torch.zeros(3, 2), make_mesh(fsdp=dist.get_world_size())),
        "again": lambda: shard(sharded, mesh),
        "quantized": lambda: shard(quantized, mesh),
        "compiled": lambda: make_step(sharded, AdamW(), compiled=True),
        "dtype": lambda: make_step(sharded, AdamW(), compute_dtype="bfloat16"),
        "compute_dtype": lambda: shard(load(EVEN, "float32"), mesh, compute_dtype="float8"),
    }
    said = {}
    for name, ask in asked.items():
        try:
            ask()
            said[name] = "nothing"
        except UsageError as error:
            said[name] = str(error)
    last = dist.get_rank() == dist.get_world_size() - 1
    said["alone"] = refused_saving(save_sharded, load(EVEN), folder / "alone")
    said["exists"] = refused_saving(save_sharded, sharded, folder / "even")
    said["full"] = refused_saving(save_sharded, sharded, folder / "full", full=last)
    answers = [None] * dist.get_world_size()
    dist.all_gather_object(answers, said)
    assert answers == [said] * len(answers), answers
    return said


def measured(mesh, more, folder):
    """Every figure of one mesh, as the worst of its processes has it."""
    results = compared(EVEN, mesh)
    results["share"] = share(shard(load(EVEN), mesh))
    results["planted"] = -min(compared(EVEN, mesh, plant=True).values())
    results |= updates(EVEN, mesh)
    results["pieces"] = max(
        updates(EVEN, mesh, accumulate=2, chunk=5, remat=remat)["update"] for remat in ("full", "dots")
    )
    results |= {f"odd {k}": v for k, v in compared(ODD, mesh).items()}
    results["odd update"] = updates(ODD, mesh, chunk=5)["update"]
    results |= {f"gpt2 {k}": v for k, v in compared(GPT2, mesh).items()}
    results["gpt2 update"] = updates(GPT2, mesh)["update"]
    results |= encoded(mesh) | translated(mesh) | reductions(mesh) | gathered(mesh) | stored(mesh, folder)
    rows = shard_batch(torch.arange(ROWS), mesh)
    block = dist.get_rank() // mesh[TENSOR].size()  # the last axis runs fastest
    results["order"] = float(rows.tolist() != list(range(ROWS))[block * len(rows) :][: len(rows)])
    if more:
        results |= {f"float32 {k}": v for k, v in compared(EVEN, mesh, "float32").items()}
        results["float32 update"] = updates(EVEN, mesh, "float32")["update"]
        results |= generated(mesh) | mixed(mesh) | dropped(mesh) | mistakes(mesh)
    worst = torch.tensor(list(results.values()), dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    said = refused(mesh, folder) if more else {}
    return dict(zip(results, worst.tolist(), strict=True)) | {"refused": said}


def main(meshes, folder):
    spent = memory(folder) if (folder / "big").exists() else {}  # first: memory at the most only grows
    told = []
    for sizes, more in meshes:
        mesh = make_mesh(**dict(zip(AXES, sizes, strict=True)), device="cpu")
        told.append(measured(mesh, more, folder / "x".join(map(str, sizes))) | spent)
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(told))
    dist.barrier()  # nobody leaves while another still needs it
    dist.destroy_process_group()
    # Threads of torch's own that outlive the group abort an interpreter that ends, now and then.
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
