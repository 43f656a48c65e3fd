# %% [markdown]
# # GPT-2, twice
#
# GPT-2 is the decoder half of the original Transformer, alone, larger, and with a few parts moved. Its paper
# is about what such a model can do without being taught; this notebook is about how it is built. Each part
# is written in Flax NNX and in PyTorch, both get the same weights, and their difference is measured in
# double precision. At the end, both learn from the same text, and read a file in OpenAI's own layout.
#
# | section | the original Transformer has | GPT-2 has |
# |---|---|---|
# | 2 | words or pieces of words | bytes, and what merges of them are frequent |
# | 3 | sinusoids | a learned vector for each position |
# | 4 | ReLU | GELU, by way of a hyperbolic tangent |
# | 5 | the norm after each part | the norm before each part, and one at the end |
# | 7 | separate matrices | one matrix for queries, keys and values, stored untransposed |
#
# It assumes notebook 01 (attention, masks, the cache) and 02 (the original Transformer). You need `jax`,
# `flax`, `torch`, `numpy` and `matplotlib`, and about a minute.
#
# *Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".*
#
# **Letters.** B batch, T query length, S key length, D hidden, N heads, H head dimension, F feed-forward,
# V vocabulary, P positions, L layers.

# %% [markdown]
# ## Setting up
#
# As in the notebooks before: `%%twin jax` runs a cell in the module `jx`, `%%twin torch` in the module `pt`,
# and `%%twin both` defines for both what needs no framework.

# %% magic

# %%
from collections import Counter
from itertools import pairwise

import jax
import jax.numpy as jnp
import jx
import matplotlib.pyplot as plt
import numpy as np
import pt
import shared
import torch
from flax import nnx

jax.config.update("jax_platforms", "cpu")  # double precision is not at home on a TPU
jax.config.update("jax_enable_x64", True)  # without it, JAX turns every float64 into float32
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
rng = np.random.default_rng(0)

# %%
LAST = {"kernel": "weight", "embedding": "weight", "scale": "weight"}  # Flax's names of leaves: PyTorch's


def numbers(x):
    """A tensor or an array, for numpy."""
    return x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def share(weights, ours):
    """Fill a Flax module with tensors under the names of its PyTorch twin. Each must find its place."""
    weights, state = dict(weights), nnx.state(ours, nnx.Param)
    for path, leaf in nnx.to_flat_state(state):
        *owner, name = map(str, path)
        array = numbers(weights.pop(".".join([*owner, LAST.get(name, name)])))
        leaf[...] = jnp.asarray(array.T if name == "kernel" else array, leaf.dtype)
    assert not weights, f"left over: {sorted(weights)}"
    nnx.update(ours, state)


def twins(name, *sizes):
    """A module in both frameworks, in float64, with the same random weights: (Flax, PyTorch)."""
    torch.manual_seed(0)
    theirs = getattr(pt, name)(*sizes, dtype=torch.float64)
    with torch.no_grad():
        for path, parameter in theirs.named_parameters():
            if parameter.ndim == 1:  # norms away from 1, biases away from 0: forgetting one would show
                parameter.uniform_(0.5, 1.5)
            elif "embed" in path:
                parameter.normal_()
    needs_key = {} if name == "LayerNorm" else {"rngs": nnx.Rngs(0)}
    ours = getattr(jx, name)(*sizes, dtype=jnp.float64, **needs_key)
    share(dict(theirs.named_parameters()), ours)
    return ours, theirs


def difference(a, b):
    """The largest difference between two arrays, relative to the largest value."""
    a, b = numbers(a), numbers(b)
    return np.abs(a - b).max() / np.abs(b).max()


def report(what, a, b, limit=1e-12):
    found = difference(a, b)
    print(f"{what:52} {found:.1e}")
    assert found < limit, f"more than {limit}"


def check(answer, is_right):
    """For the exercises."""
    print("not answered yet" if answer is None else "right!" if is_right(answer) else "not yet, try again")


# %% [markdown]
# And the pieces that notebooks 01 and 02 explained. They are the same text.

# %% both: errors.UsageError, errors.ConfigError

# %% twin: random.bits, random.fold_in, layers.at_least_float32, layers.dropout, layers.subkey
# layers.visible, layers.attention_weights, layers.attend
# layers.KVCache, layers.empty_cache, layers.place, layers.store
# layers.Linear, layers.LayerNorm, layers.constrain

# %% [markdown]
# ## 1. One configuration for both
#
# **Idea.** Four sizes of one architecture. The numbers live in one frozen object that both frameworks read.

# %% both: configs.gpt2.GPT2Config[validate, num_key_value_heads, head_dim]

# %% both: configs.gpt2.PRESETS[gpt2, gpt2-medium, gpt2-large, gpt2-xl]


# %%
def count(c):
    """Parameters of a GPT-2 by where they sit."""
    D, F, L = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    return {
        "tokens": c.vocab_size * D,
        "positions": c.max_position_embeddings * D,
        "attention": L * (4 * D * D + 4 * D),
        "MLP": L * (2 * D * F + F + D),
        "norms": (2 * L + 1) * 2 * D,
    }


figure, axis = plt.subplots(figsize=(7, 2.2))
for row, (name, config) in enumerate(shared.PRESETS.items()):
    parts, left = count(config), 0
    print(f"{name:12} {sum(parts.values()):>14,} parameters")
    for color, (part, size) in enumerate(parts.items()):
        axis.barh(row, size / 1e6, left=left, color=f"C{color}", label=part if row == 0 else None)
        left += size / 1e6
axis.set_yticks(range(4), list(shared.PRESETS))
axis.set(xlabel="million parameters")
axis.legend(frameon=False, fontsize=8)
plt.show()
assert sum(count(shared.PRESETS["gpt2"]).values()) == 124_439_808  # what OpenAI's file holds

# %% [markdown]
# A third of the smallest model is its table of tokens. It is used twice: to look tokens up, and, transposed,
# as the head that scores the next one. Storing it once is called tying (Press & Wolf 2017, arXiv:1608.05859).
#
# **Exercise 1.** How many parameters would `gpt2-xl` have if its head were a matrix of its own?

# %%
answer = None
check(answer, lambda a: a == sum(count(shared.PRESETS["gpt2-xl"]).values()) + 50257 * 1600)

# %% [markdown]
# ## 2. Bytes
#
# **Idea.** Any text is a sequence of bytes, and there are 256 of them. A vocabulary that contains all 256
# can spell everything: no unknown words, in no language. It would be slow, so the most frequent pair of
# neighbours becomes a token of its own, then the most frequent pair after that, and so on. GPT-2 does this
# 50,000 times.
#
# *Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", arXiv:1508.07909.*


# %%
def merge(tokens, pair, new):
    """Every place where the pair stands, as the new token."""
    out, i = [], 0
    while i < len(tokens):
        if i + 1 < len(tokens) and (tokens[i], tokens[i + 1]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(tokens[i])
            i += 1
    return out


def learn(text, merges):
    """The merges, most frequent pair first, and the text after them."""
    tokens, found = list(text.encode()), {}
    for new in range(256, 256 + merges):
        pair, times = Counter(pairwise(tokens)).most_common(1)[0]
        if times == 1:
            break
        found[pair] = new
        tokens = merge(tokens, pair, new)
    return found, tokens


def spell(merges):
    """The bytes of each token."""
    spelled = {n: bytes([n]) for n in range(256)}
    for (a, b), new in merges.items():
        spelled[new] = spelled[a] + spelled[b]
    return spelled


rhyme = """\
The wheels on the bus go round and round, round and round, round and round.
The wheels on the bus go round and round, all through the town.
The wipers on the bus go swish, swish, swish, swish, swish, swish, swish, swish, swish.
The wipers on the bus go swish, swish, swish, all through the town.
The people on the bus go up and down, up and down, up and down.
The people on the bus go up and down, all through the town.
"""
merges, tokens = learn(rhyme, 60)
spelled = spell(merges)
print(f"{len(rhyme)} bytes, {len(tokens)} tokens")
print("the last merges:", [spelled[n].decode() for n in list(merges.values())[-6:]])
assert b"".join(spelled[t] for t in tokens).decode() == rhyme

# %% [markdown]
# **Picture.** The text gets shorter with every merge, the first ones most of all.

# %%
counts = [len(learn(rhyme, n)[1]) for n in range(0, 61, 5)]
figure, axis = plt.subplots(figsize=(6, 2))
axis.plot(range(0, 61, 5), counts, "o-", markersize=4)
axis.set(xlabel="merges", ylabel="tokens", ylim=(0, None))
plt.show()

# %% [markdown]
# A new text is encoded by the same merges in the same order. Nothing is unknown: what never merged stays
# bytes.


# %%
def encode(text):
    tokens = list(text.encode())
    for pair, new in merges.items():
        tokens = merge(tokens, pair, new)
    return tokens


for text in ("The wheels on the bus", "Die Räder am Bus", "🚌"):
    found = encode(text)
    print(f"{len(found):2} tokens", [spelled[t] for t in found])
    assert b"".join(spelled[t] for t in found).decode() == text

# %% [markdown]
# **Break it: merge across words.** GPT-2 cuts the text at spaces and punctuation first and merges only
# inside the pieces. Without that, as here, tokens grow over word borders: "go " and " and" become one with
# their neighbours, and the same word gets other tokens in other company.

# %%
print([spelled[t].decode() for t in encode("round and round")])
print([spelled[t].decode() for t in encode("a round town")])

# %% [markdown]
# **Exercise 2.** GPT-2 has 256 bytes, 50,000 merges, and one token for the end of a document. How many rows
# has its table?

# %%
answer = None
check(answer, lambda a: a == shared.PRESETS["gpt2"].vocab_size)

# %% [markdown]
# ## 3. Learned positions
#
# **Idea.** Instead of sinusoids, a second table: one learned vector for each position, added to the token's.
#
# $$x_t = E[\text{token}_t] + P[t]$$
#
# What it costs: there is no position 1024. A sinusoid can be computed for any place; a table ends.
#
# And a text that is padded on the left begins at position 0 all the same. Who counts from the left edge of
# the array takes the wrong row of the table for every token; section 6 makes that mistake.
#
# The model of this notebook, in which no two sizes agree:

# %%
tiny = shared.GPT2Config(
    vocab_size=97,
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=5,
    max_position_embeddings=160,
    layer_norm_epsilon=1e-5,
    activation_function="gelu_new",
    embd_pdrop=0.1,
    attn_pdrop=0.1,
    resid_pdrop=0.1,
    tie_word_embeddings=True,
)

# %% [markdown]
# ## 4. GELU
#
# **Idea.** ReLU passes a number or blocks it. GELU multiplies it by the probability that a standard normal
# number is smaller: it blocks softly, and its slope is never quite zero.
#
# $$\text{GELU}(x) = x\,\Phi(x)
# \approx \frac{x}{2}\left(1 + \tanh\left(\sqrt{2/\pi}\,(x + 0.044715\,x^3)\right)\right)$$
#
# OpenAI computed the approximation on the right, BERT the exact function. Checkpoints remember which:
# `gelu_new` and `gelu` in their configuration.
#
# *Hendrycks & Gimpel 2016, "Gaussian Error Linear Units", arXiv:1606.08415.*

# %% twin: layers.ACTIVATIONS[relu, gelu, gelu_new]

# %%
x = np.linspace(-5, 5, 1001)
exact, tanh = (jx.ACTIVATIONS[name](jnp.asarray(x)) for name in ("gelu", "gelu_new"))
for name in ("gelu", "gelu_new"):
    report(
        f"{name}, Flax against PyTorch",
        jx.ACTIVATIONS[name](jnp.asarray(x)),
        pt.ACTIVATIONS[name](torch.tensor(x)),
    )
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.4))
left.plot(x, np.maximum(x, 0), color="0.7", label="ReLU")
left.plot(x, exact, label="GELU")
left.legend(frameon=False)
right.plot(x, np.asarray(tanh - exact) * 1e4, color="C3")
right.set(title="tanh form minus exact", ylabel="$10^{-4}$")
plt.show()
print(f"they differ by up to {np.abs(tanh - exact).max():.1e}")

# %% [markdown]
# Five parts in ten thousand: far too little to see in a text, far too much for a port. A test that compares
# two models at 1e-3 calls them the same; at 1e-12 it says which one you have.
#
# ## 5. The norm goes first
#
# **Idea.** The original Transformer normalises *after* adding: `norm(x + part(x))`. GPT-2 normalises what
# goes *into* a part: `x + part(norm(x))`, and once more before the head. The sum itself, the residual
# stream, is never touched: gradients reach the first layer without passing through any norm.
#
# *Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture", arXiv:2002.04745.*

# %% twin: gpt2.Attention

# %% twin: gpt2.MLP

# %% twin: gpt2.Block

# %% [markdown]
# **Measured.** The twins against each other, and against a judge that neither of them was written from:
# `torch.nn.TransformerEncoderLayer` with `norm_first`, which is this block if it gets a causal mask. It
# knows the exact GELU only, so for it the block gets that too.

# %%
exact_gelu = shared.GPT2Config(**{**vars(tiny), "activation_function": "gelu"})
ours, theirs = twins("Block", exact_gelu)
x = rng.normal(size=(2, 12, 40))
positions = np.tile(np.arange(12, dtype=np.int32), (2, 1))
mask = pt.visible(torch.tensor(positions), torch.tensor(positions))
a, _ = ours(jnp.asarray(x), jnp.asarray(mask.numpy()), None, None, 0, None)
with torch.no_grad():
    b, _ = theirs(torch.tensor(x), mask, None, None, 0, None)
    judge = torch.nn.TransformerEncoderLayer(
        40, 5, 56, dropout=0.0, activation="gelu", norm_first=True, batch_first=True, dtype=torch.float64
    ).eval()
    named = dict(theirs.named_parameters())
    for kind in ("weight", "bias"):
        joined = torch.cat([named[f"attn.{n}_proj.{kind}"] for n in "qkv"])
        getattr(judge.self_attn, f"in_proj_{kind}").copy_(joined)
        getattr(judge.self_attn.out_proj, kind).copy_(named[f"attn.o_proj.{kind}"])
        for to, name in (
            ("norm1", "attn_norm"),
            ("norm2", "mlp_norm"),
            ("linear1", "mlp.fc1"),
            ("linear2", "mlp.fc2"),
        ):
            getattr(getattr(judge, to), kind).copy_(named[f"{name}.{kind}"])
    c = judge(torch.tensor(x), src_mask=~mask[0])
report("block, Flax against PyTorch", a, b)
report("block, against torch.nn", b, c)

# %% [markdown]
# **Picture.** How long the residual stream is after each block, with the norm first and with the norm last.
# With the norm first it grows, since each part adds and nothing takes away. That is why one norm stands
# before the head.

# %%
deep = [pt.Block(tiny, dtype=torch.float64) for _ in range(12)]
first, last = [torch.tensor(x)], [torch.tensor(x)]
with torch.no_grad():
    for block in deep:
        for parameter in (block.attn_norm, block.mlp_norm):
            parameter.weight.fill_(1.0)
            parameter.bias.zero_()
        first.append(block(first[-1], mask, None, None, 0, None)[0])
        mixed = block.attn(last[-1], mask, None, None, 0, None)[0]
        once = block.attn_norm(last[-1] + mixed)
        last.append(block.mlp_norm(once + block.mlp(once)))
figure, axis = plt.subplots(figsize=(6, 2.2))
for name, stream in (("norm first", first), ("norm last", last)):
    axis.plot([float(s.norm(dim=-1).mean()) for s in stream], "o-", markersize=4, label=name)
axis.set(xlabel="blocks", ylabel="length of a vector")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 6. The model
#
# Two tables, the blocks, a norm, and the first table once more as the head.

# %% twin: gpt2.GPT2

# %%
ours, theirs = twins("GPT2", tiny)
tokens = rng.integers(0, 97, (2, 150)).astype(np.int32)
positions = np.stack([np.arange(150), np.arange(150) - 40]).clip(-1).astype(np.int32)
real = positions >= 0
logits, _ = ours(jnp.asarray(tokens), jnp.asarray(positions))
with torch.no_grad():
    other, _ = theirs(torch.tensor(tokens), torch.tensor(positions))
report("logits, Flax against PyTorch", numbers(logits)[real], numbers(other)[real])
size = sum(p.numel() for p in theirs.parameters())
print(f"{size:,} parameters; the formula says {sum(count(tiny).values()):,}")
assert size == sum(count(tiny).values())

# %% [markdown]
# **Break it: count from the left edge.** The mistake of section 3, made: the second text is padded by 40
# places, and its positions are counted from the edge of the array.

# %%
edge = np.where(real, np.arange(150), -1).astype(np.int32)
wrong, _ = ours(jnp.asarray(tokens), jnp.asarray(edge))
print(f"first text, not padded:  {difference(wrong[0], logits[0]):.1e}")
print(f"second text, padded:     {difference(wrong[1][real[1]], logits[1][real[1]]):.1e}")
assert difference(wrong[1][real[1]], logits[1][real[1]]) > 0.1
figure, axis = plt.subplots(figsize=(6, 2))
for row, name in enumerate(("not padded", "padded")):
    axis.plot(np.abs(numbers(wrong - logits)[row]).max(-1)[real[row]], label=name)
axis.set(xlabel="token of the text", ylabel="error of its logits")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# With sinusoids or rotations a shifted text is at least treated alike throughout. A learned table has never
# promised that position 41 is to 40 what 1 is to 0.
#
# **Writing.** As in notebook 01: the prompt once, then token after token from the cache.


# %%
def write(model, prompt, count, array):
    """The prompt in one call, then one token at a time. Returns the tokens and all logits."""
    cache, seen, tokens = model.empty_cache(1, len(prompt) + count), [], list(prompt)
    new = tokens
    for _ in range(count):
        places = np.arange(len(tokens) - len(new), len(tokens), dtype=np.int32)[None]
        logits, cache = model(array(np.array([new], np.int32)), array(places), cache)
        seen.append(numbers(logits)[0])
        new = [int(seen[-1][-1].argmax())]
        tokens = tokens + new
    return tokens, np.concatenate(seen)


prompt = [3, 14, 15, 92, 65, 35]
text, stepwise = write(ours, prompt, 20, jnp.asarray)
with torch.no_grad():
    other_text, other_stepwise = write(theirs, prompt, 20, torch.tensor)
assert text == other_text
everything, _ = ours(jnp.asarray([text[:-1]]), jnp.arange(len(text) - 1)[None])
report("logits on the way, Flax against PyTorch", stepwise, other_stepwise)
report("logits on the way, against one full pass", stepwise, everything[0])

# %% [markdown]
# **Picture.** What the cache of each size takes in 2-byte numbers, per text: every head keeps its own keys.

# %%
figure, axis = plt.subplots(figsize=(6, 2))
lengths = np.array([128, 256, 512, 1024])
for name, c in shared.PRESETS.items():
    axis.plot(lengths, lengths * 2 * c.num_hidden_layers * c.hidden_size * 2 / 2**20, "o-", label=name)
axis.set(xlabel="tokens", ylabel="MiB", xticks=lengths)
axis.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# **Exercise 3.** The cache of `gpt2-xl` for one text of 1024 tokens, in 2-byte numbers: how many MiB?

# %%
answer = None
check(answer, lambda a: abs(a - 2 * 48 * 1024 * 1600 * 2 / 2**20) < 0.5)

# %% [markdown]
# ## 7. OpenAI's files
#
# **Idea.** OpenAI wrote GPT-2 in TensorFlow, with a layer called `conv1d` that multiplies by a matrix
# [in, out]. Everybody's files still have that orientation: PyTorch's own layers are [out, in], so here, for
# once, it is Flax that can take a matrix as it lies. And queries, keys and values are one matrix,
# `c_attn` [D, 3D], side by side.
#
# | file | shape | ours | Flax | PyTorch |
# |---|---|---|---|---|
# | `h.0.attn.c_attn.weight` | [D, 3D] | `q_proj`, `k_proj`, `v_proj` | its thirds | transposed |
# | `h.0.attn.c_proj.weight` | [D, D] | `o_proj` | as it is | transposed |
# | `h.0.mlp.c_fc.weight` | [D, F] | `fc1` | as it is | transposed |
# | `wpe.weight` | [P, D] | `position_embed` | as it is | as it is |
#
# The next cell writes a file of that kind from our model, forgets the model, and reads the file into Flax.

# %%
named = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
NAMES = {
    "attn_norm": "ln_1",
    "mlp_norm": "ln_2",
    "attn.o_proj": "attn.c_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
file = {"wte.weight": named["embed.weight"], "wpe.weight": named["position_embed.weight"]}
for kind in ("weight", "bias"):
    file[f"ln_f.{kind}"] = named[f"norm.{kind}"]
    for i in range(3):
        for ours_name, name in NAMES.items():
            x = named[f"layers.{i}.{ours_name}.{kind}"]
            file[f"h.{i}.{name}.{kind}"] = x.T.copy() if x.ndim == 2 else x
        thirds = [named[f"layers.{i}.attn.{n}_proj.{kind}"].T for n in "qkv"]
        file[f"h.{i}.attn.c_attn.{kind}"] = np.concatenate(thirds, axis=-1)
print(file["h.0.attn.c_attn.weight"].shape, file["h.0.attn.c_attn.bias"].shape)
figure, axis = plt.subplots(figsize=(7, 1.8))
axis.bar(
    range(120),
    np.linalg.norm(file["h.0.attn.c_attn.weight"], axis=0),
    color=np.repeat(["C0", "C1", "C2"], 40),
)
axis.set(title="the columns of c_attn: queries, keys, values", xlabel="output", ylabel="length")
plt.show()


def read(file, order="qkv"):
    """A Flax GPT-2 with the numbers of OpenAI's layout: nothing is transposed."""
    model = jx.GPT2(tiny, dtype=jnp.float64, rngs=nnx.Rngs(1))
    model.embed.embedding[...] = jnp.asarray(file["wte.weight"])
    model.position_embed.embedding[...] = jnp.asarray(file["wpe.weight"])

    def norm(module, name):
        module.scale[...], module.bias[...] = (jnp.asarray(file[f"{name}.{k}"]) for k in ("weight", "bias"))

    norm(model.norm, "ln_f")
    for i, layer in enumerate(model.layers):
        norm(layer.attn_norm, f"h.{i}.ln_1")
        norm(layer.mlp_norm, f"h.{i}.ln_2")
        thirds = {}
        for kind in ("weight", "bias"):
            thirds[kind] = np.split(file[f"h.{i}.attn.c_attn.{kind}"], 3, axis=-1)
        matrices = {
            **{
                f"{n}_proj": (layer.attn, thirds["weight"][j], thirds["bias"][j]) for j, n in enumerate(order)
            },
            "o_proj": (layer.attn, *(file[f"h.{i}.attn.c_proj.{k}"] for k in ("weight", "bias"))),
            "fc1": (layer.mlp, *(file[f"h.{i}.mlp.c_fc.{k}"] for k in ("weight", "bias"))),
            "fc2": (layer.mlp, *(file[f"h.{i}.mlp.c_proj.{k}"] for k in ("weight", "bias"))),
        }
        for name, (owner, kernel, bias) in matrices.items():
            getattr(owner, name).kernel[...] = jnp.asarray(kernel)
            getattr(owner, name).bias[...] = jnp.asarray(bias)
    return model


again, _ = read(file)(jnp.asarray(tokens), jnp.asarray(positions))
report("logits from the file", numbers(again)[real], numbers(other)[real])

# %% [markdown]
# **Break it: the wrong third.** All three thirds have one shape, so exchanging them is no error that a
# computer notices. Neither is transposing `c_proj`, which is square.

# %%
wrong, _ = read(file, order="kqv")(jnp.asarray(tokens), jnp.asarray(positions))
print(f"queries and keys exchanged: {difference(numbers(wrong)[real], numbers(other)[real]):.1e}")
turned = {name: x.T if name.endswith("attn.c_proj.weight") else x for name, x in file.items()}
wrong, _ = read(turned)(jnp.asarray(tokens), jnp.asarray(positions))
print(f"a square matrix transposed: {difference(numbers(wrong)[real], numbers(other)[real]):.1e}")

# %% [markdown]
# Shapes match, names match, the model runs, and the text it writes is nonsense. Only a comparison with the
# original shows it.
#
# ## 8. Learning in both
#
# **Idea.** Predict the next token of the rhyme. The loss, its gradient and the update are the same formula
# in both frameworks; if the twins are one model, so are the curves. Dropout is switched off by giving no
# key. Plain gradient descent keeps the cell short.

# %%
small = shared.GPT2Config(**{**vars(tiny), "vocab_size": 256 + len(merges)})
ours, theirs = twins("GPT2", small)
with torch.no_grad():  # begin as GPT-2 did: small numbers
    for path, parameter in theirs.named_parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=0.1)
        else:
            parameter.fill_(1.0 if "norm.weight" in path else 0.0)
share(dict(theirs.named_parameters()), ours)
data = np.array(encode(rhyme), np.int32)[None, :160]
places = np.arange(data.shape[1] - 1, dtype=np.int32)[None]
graph, params = nnx.split(ours, nnx.Param)


@jax.jit
def update(params):
    def loss(params):
        logits, _ = nnx.merge(graph, params)(data[:, :-1], places)
        wide = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(wide, data[:, 1:, None], axis=-1).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    return value, jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)


curves = {"Flax": [], "PyTorch": []}
for _ in range(60):
    value, params = update(params)
    curves["Flax"].append(float(value))
    logits, _ = theirs(torch.tensor(data[:, :-1]), torch.tensor(places))
    loss = torch.nn.functional.cross_entropy(logits[0], torch.tensor(data[0, 1:]).long())
    curves["PyTorch"].append(loss.item())
    theirs.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter -= 0.3 * parameter.grad
figure, axis = plt.subplots(figsize=(6, 2.2))
axis.plot(curves["Flax"], linewidth=5, alpha=0.4, label="Flax")
axis.plot(curves["PyTorch"], "--", label="PyTorch")
axis.set(xlabel="updates", ylabel="loss")
axis.legend(frameon=False)
plt.show()
report("losses of 60 updates", curves["Flax"], curves["PyTorch"], limit=1e-10)
assert curves["Flax"][-1] < 0.7 * curves["Flax"][0]

# %% [markdown]
# One thin dashed line on one broad one. (Over many more updates, rounding grows as it does in any chaotic
# system; that is a property of training, not of the twins.)
#
# **Exercise 4.** Which of these did GPT-2 *not* change from the original decoder: the mask ("mask"), the
# activation ("activation"), the place of the norms ("norms")?

# %%
answer = None
check(answer, lambda a: a == "mask")

# %% [markdown]
# ## What to take along
#
# - Bytes and merges: nothing is unknown, and words should not merge with their neighbours.
# - A learned position is a row of a table: count from the text's beginning, and know where the table ends.
# - Two GELUs differ by 5e-4. Two orientations of a square matrix differ by everything.
# - With the norm first, the residual stream is left alone, grows, and is normalised once at the end.
#
# Next in the course: **04, LLaMA 2**, which exchanges the positions, the norm and the MLP.
