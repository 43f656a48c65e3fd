# %% [markdown]
# # The original Transformer, twice
#
# In 2017 eight people at Google wanted to translate faster. They threw out recurrence, kept attention, and
# called the paper *Attention Is All You Need*. Almost everything since is a variation on it.
#
# This notebook builds that model as published, in Flax NNX and in PyTorch, from the configuration to beam
# search. Both versions get the same weights and are compared in double precision after each step. At the end
# both are trained on the same task, with dropout, and their loss curves lie on top of each other.
#
# | section | idea | of the paper |
# |---|---|---|
# | 1 | one configuration | table 3 |
# | 2 | positions from sines and cosines | 3.5 |
# | 3 | dropout that two frameworks can share | 5.4 |
# | 4 | layer normalisation | 3.1 |
# | 5 | the encoder | 3.1 to 3.3 |
# | 6 | the decoder | 3.1, 3.2.3 |
# | 7 | the model, embeddings shared three ways | 3.4 |
# | 8 | label smoothing | 5.4 |
# | 9 | the learning rate warms up | 5.3 |
# | 10 | training | 5 |
# | 11 | greedy decoding and beam search | 6.1 |
# | 12 | looking inside | appendix |
#
# It assumes notebook 01 (attention, masks, the cache). You need `jax`, `flax` (which brings `optax`),
# `torch`, `numpy` and `matplotlib`, and about two minutes.
#
# *Vaswani et al. 2017, arXiv:1706.03762.*
#
# **Letters.** B batch, T target length, S source length, D model size, N heads, H head dimension, F
# feed-forward, V vocabulary, L layers.

# %% [markdown]
# ## Setting up
#
# As in notebook 01: `%%twin jax` runs a cell in the module `jx`, `%%twin torch` in the module `pt`, and
# `%%twin both` defines for both what needs no framework.

# %% magic

# %%
import time

import jax
import jax.numpy as jnp
import jx
import matplotlib.pyplot as plt
import numpy as np
import optax
import pt
import shared
import torch
from flax import nnx

jax.config.update("jax_platforms", "cpu")  # double precision is not at home on a TPU
jax.config.update("jax_enable_x64", True)  # without it, JAX turns every float64 into float32
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
rng = np.random.default_rng(0)

# %% [markdown]
# The helpers. Compared with notebook 01, `share` knows two more names: an embedding's table and a norm's
# scale, which PyTorch both calls `weight`. Random weights are Glorot's (as in the paper's code), biases and
# norms are moved off their starting values, so that forgetting one would show.

# %%
LAST = {"kernel": "weight", "embedding": "weight", "scale": "weight"}  # Flax's names of leaves: PyTorch's


def share(theirs, ours):
    """Give a Flax module the weights of its PyTorch twin. Every weight must find its place."""
    weights = {name: tensor.detach().numpy() for name, tensor in theirs.named_parameters()}
    state = nnx.state(ours, nnx.Param)
    for path, leaf in nnx.to_flat_state(state):
        *owner, name = map(str, path)
        array = weights.pop(".".join([*owner, LAST.get(name, name)]))
        leaf[...] = jnp.asarray(array.T if name == "kernel" else array)
    assert not weights, f"left over: {sorted(weights)}"
    nnx.update(ours, state)


def twins(name, *sizes, spread=0.3):
    """A module in both frameworks, in float64, with the same random weights: (Flax, PyTorch)."""
    torch.manual_seed(0)
    theirs = getattr(pt, name)(*sizes, dtype=torch.float64)
    for path, parameter in theirs.named_parameters():
        if "embed" in path:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif parameter.ndim == 2:
            torch.nn.init.xavier_uniform_(parameter)
        else:
            torch.nn.init.normal_(
                parameter, mean=float("norm.weight" in path or name == "LayerNorm"), std=spread
            )
    needs_key = {} if name == "LayerNorm" else {"rngs": nnx.Rngs(0)}
    ours = getattr(jx, name)(*sizes, dtype=jnp.float64, **needs_key)
    share(theirs, ours)
    return ours, theirs


def numbers(x):
    return np.asarray(x.detach() if isinstance(x, torch.Tensor) else x)


def difference(a, b):
    """The largest difference between two arrays, relative to the largest value."""
    a, b = numbers(a), numbers(b)
    return np.abs(a - b).max() / np.abs(b).max()


def report(what, a, b, limit=1e-12):
    found = difference(a, b)
    print(f"{what:58} {found:.1e}")
    assert found < limit, f"more than {limit}"


def check(answer, is_right):
    """For the exercises."""
    print("not answered yet" if answer is None else "right!" if is_right(answer) else "not yet, try again")


# %% [markdown]
# And what notebook 01 explained: the same text, but for `attend`, which follows in section 5.

# %% both: errors.UsageError

# %% twin: layers.at_least_float32, layers.visible, layers.attention_weights
# layers.KVCache, layers.empty_cache, layers.place, layers.store

# %% [markdown]
# ## 1. One configuration for both
#
# **Idea.** An architecture is code and a few numbers. The numbers live in one frozen object that both
# frameworks read, and nothing has a default where it is used. Released checkpoints of this architecture
# spell some details differently (all sines first, a bias on the logits). The table `SPELLINGS` holds that;
# here it has one entry, the paper's.

# %% both: configs.transformer.Spelling, configs.transformer.ALL_SHARED
# configs.transformer.SPELLINGS[transformer]
# configs.transformer.TransformerConfig[layer_norm_eps, final_logits_bias, positions_interleaved,
# position_offset, position_frequencies]

# %% both: configs.transformer.PRESETS[transformer-base, transformer-big]

# %% [markdown]
# **How many parameters is that?** The paper says 65 million and 213 million. It rounds, and its vocabulary
# is "about 37,000 tokens". From the configuration:


# %%
def count(c):
    """Parameters of a Transformer by where they sit; the three embeddings are one table."""
    D = c.d_model
    attention, norm = 4 * (D * D + D), 2 * D
    mlp = {
        side: 2 * D * F + F + D
        for side, F in (("encoder", c.encoder_ffn_dim), ("decoder", c.decoder_ffn_dim))
    }
    return {
        "embeddings": c.target_vocab_size * D,
        "encoder": c.encoder_layers * (attention + mlp["encoder"] + 2 * norm),
        "decoder": c.decoder_layers * (2 * attention + mlp["decoder"] + 3 * norm),
    }


for name, config in shared.PRESETS.items():
    parts = count(config)
    print(f"{name:17} {sum(parts.values()):>11,} =", " + ".join(f"{n:,} {part}" for part, n in parts.items()))

# %% [markdown]
# From here on a small one, whose numbers are all different, so that no axis can be mistaken for another.

# %%
base = shared.PRESETS["transformer-base"]
small = base.__class__(
    **{
        **vars(base),
        "source_vocab_size": 29,
        "target_vocab_size": 29,
        "d_model": 24,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 6,
        "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 56,
    }
)

# %% [markdown]
# ## 2. Positions
#
# **Idea.** Attention sees a bag of tokens (exercise 1 of notebook 01). The paper *adds* the position to each
# token: a vector of sines and cosines, from fast to slow, like the digits of a clock. Nearby positions get
# similar vectors, and moving by a fixed distance is the same rotation everywhere, so a layer can learn
# "three to the left".
#
# $$P_{p,\,2j} = \sin(p\,\omega_j) \qquad P_{p,\,2j+1} = \cos(p\,\omega_j) \qquad \omega_j = 10000^{-2j/D}$$
#
# Embeddings are multiplied by $\sqrt{D}$ before the sum, for a reason that we measure below.
#
# *Section 3.5.*

# %% twin: transformer.sinusoids

# %%
positions = np.stack([np.arange(300), np.arange(300) - 20]).clip(-1).astype(np.int32)
ours = jx.sinusoids(jnp.asarray(positions), small, jnp.float64)
report("sinusoids, Flax against PyTorch", ours, pt.sinusoids(torch.tensor(positions), small, torch.float64))
p, w = np.arange(300)[:, None], 10000.0 ** (-np.arange(0, 24, 2) / 24)
formula = np.empty((300, 24))
formula[:, ::2], formula[:, 1::2] = np.sin(p * w), np.cos(p * w)
report("sinusoids against the formula", ours[0], formula)

# %% [markdown]
# **Picture.** Left, the table: columns on the left tick fast, those on the right hardly move. Right, how
# much a position resembles the others.

# %%
table = numbers(jx.sinusoids(jnp.arange(100)[None], base, jnp.float64))[0]
figure, axes = plt.subplots(1, 2, figsize=(8, 2.7), width_ratios=(1.5, 1))
axes[0].imshow(table[:48, :96], aspect="auto", cmap="RdBu", interpolation="nearest")
axes[0].set(xlabel="dimension (first 96 of 512)", ylabel="position")
for p in (10, 50, 80):
    axes[1].plot(table @ table[p] / 256, label=f"position {p}")
axes[1].set(xlabel="position", ylabel="similarity")
axes[1].legend(frameon=False, fontsize=8)
plt.tight_layout()
plt.show()

# %% [markdown]
# **Break it: forget the square root.** The output matrix is the embedding table, so its entries have to be
# small, around $1/\sqrt{D}$. An embedding then has length one. A position vector has length $\sqrt{D/2}$, 16
# for D = 512. Without the factor, the word is a whisper beside its position:

# %%
for name, factor in (("scaled by √D", 512**0.5), ("not scaled", 1.0)):
    word, place = rng.normal(size=512) * 512**-0.5 * factor, table[7]
    print(f"{name:14} word has {word @ word / (word @ word + place @ place):6.1%} of the energy of the sum")

# %% [markdown]
# **Exercise 1.** What is the dot product of a position vector with itself, for D = 512? It is the same for
# every position.

# %%
answer = None
check(answer, lambda a: np.isclose(a, table[3] @ table[3]))

# %% [markdown]
# ## 3. Dropout that two frameworks can share
#
# **Idea.** During training, switch off a random tenth of the numbers, and scale the others up so that the
# mean stays. No unit can rely on a particular other one. The paper does it to the output of each sub-layer
# and to the sum of embedding and position.
#
# $$y_i = \frac{m_i}{1-r}\, x_i, \qquad m_i \sim \text{Bernoulli}(1-r)$$
#
# Two frameworks draw different random numbers, and so nobody compares them *with* dropout. Here we can.
# JAX's generator, threefry, is a short recipe of additions, rotations and exclusive-ors (Salmon et al.
# 2011). Written in PyTorch's integers, it gives the same bits. And since a key says exactly which numbers
# come out, there is no hidden state: no key, no dropout.
#
# *Srivastava et al. 2014, "Dropout"; section 5.4 of the paper.*

# %% twin: random.key, random.fold_in, random.bits

# %% twin: layers.subkey, layers.dropout

# %%
shape = (3, 40, 24)
mine, other = jx.bits(jx.key(7), shape), pt.bits(pt.key(7), shape)
print("the same 2880 random integers:", np.array_equal(mine, other), " first:", mine[0, 0, :3])
assert np.array_equal(mine, other)
x = rng.normal(size=shape)
dropped = jx.dropout(jnp.asarray(x), 0.3, jx.key(7))
report("dropout, Flax against PyTorch", dropped, pt.dropout(torch.tensor(x), 0.3, pt.key(7)))
print(f"dropped: {np.mean(dropped == 0):.1%}")

# %% [markdown]
# **Picture, and break it: one key for all.** `fold_in` makes a new key from a key and a number; every layer
# and every site in it gets its own. Reuse one key, and all layers drop *the same* units: some paths never
# learn, others are never challenged.


# %%
def masks(keys):
    return [numbers(jx.dropout(jnp.ones((12, 24)), 0.3, key) != 0) for key in keys]


own, same = masks([jx.fold_in(jx.key(1), layer) for layer in range(3)]), masks([jx.key(1)] * 3)
figure, axes = plt.subplots(2, 4, figsize=(8, 2.6))
titles = ["layer 0", "layer 1", "layer 2", "how many keep it"]
for row, (name, drawn) in enumerate((("own keys", own), ("one key", same))):
    for column, mask in enumerate([*drawn, sum(drawn)]):
        axes[row, column].imshow(mask, cmap="Blues", vmin=0, vmax=3 if column == 3 else 1, aspect="auto")
        axes[row, column].set(xticks=[], yticks=[], title="" if row else titles[column])
    axes[row, 0].set_ylabel(name)
plt.tight_layout()
plt.show()
for name, drawn in (("own keys", own), ("one key", same)):
    print(f"{name}: {np.mean(sum(drawn) == 3):.0%} of the units are kept in all three layers")

# %% [markdown]
# **Exercise 2.** At rate 0.3, how large is the share of units that three *independent* masks all keep? Give
# the exact number.

# %%
answer = None
check(answer, lambda a: np.isclose(a, 0.7**3))

# %% [markdown]
# ## 4. Layer normalisation
#
# **Idea.** Shift and scale each token's vector to mean zero and variance one, then let the layer choose
# scale and bias itself. It depends on this token alone, not on the batch, so training and use are the same
# computation.
#
# $$y = \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}} \odot g + b$$
#
# *Ba et al. 2016, "Layer Normalization", arXiv:1607.06450.*

# %% twin: layers.LayerNorm

# %%
ours, theirs = twins("LayerNorm", 24, 1e-5)
x = rng.normal(size=(2, 5, 24))
library = torch.nn.LayerNorm(24, eps=1e-5, dtype=torch.float64)
library.load_state_dict(theirs.state_dict())
report("LayerNorm, Flax against PyTorch", ours(jnp.asarray(x)), theirs(torch.tensor(x)))
report("LayerNorm against torch.nn.LayerNorm", ours(jnp.asarray(x)), library(torch.tensor(x)))

# %% [markdown]
# **Break it: trust the defaults.** `torch.nn.LayerNorm` has $\varepsilon = 10^{-5}$, `nnx.LayerNorm`
# $10^{-6}$. And the latter computes the variance as $E[x^2] - E[x]^2$, which is fast, and cancels when the
# mean is large. In float32:

# %%
figure, axis = plt.subplots(figsize=(6, 2.4))
means = 10.0 ** np.arange(-1, 5)
inputs = rng.normal(size=(64, 24))
plain = torch.nn.LayerNorm(24, eps=1e-5, dtype=torch.float64)
for name, options in {
    "nnx.LayerNorm, defaults": {},
    "nnx.LayerNorm(epsilon=1e-5, use_fast_variance=False)": {"epsilon": 1e-5, "use_fast_variance": False},
}.items():
    norm = nnx.LayerNorm(24, rngs=nnx.Rngs(0), **options)
    errors = []
    for mean in means:
        # float32 holds these numbers only roughly: the truth is computed from what it holds
        held = (inputs + mean).astype(np.float32)
        errors.append(difference(norm(jnp.asarray(held)), plain(torch.tensor(held.astype(np.float64)))))
    axis.loglog(means, errors, "o-", label=name)
axis.set(xlabel="mean of the input", ylabel="relative error")
axis.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# This is why both cells subtract the mean first, and why $\varepsilon$ is an argument without a default.
#
# **Exercise 3.** A vector of 24 equal numbers goes in. What comes out, for $g = 1$ and $b = 0$? Give the
# number.

# %%
answer = None
check(answer, lambda a: a == 0)

# %% [markdown]
# ## 5. The encoder
#
# **Idea.** A layer has two parts: attention mixes *between* tokens, a small network thinks about each token
# *by itself*. Around each part runs a bypass, and the sum is normalised. In this order it is called
# **post-norm**:
#
# $$x \leftarrow \operatorname{LayerNorm}(x + \operatorname{Dropout}(\operatorname{Attention}(x)))$$
#
# $$x \leftarrow \operatorname{LayerNorm}(x + \operatorname{Dropout}(\max(0, xW_1 + b_1)W_2 + b_2))$$
#
# *Sections 3.1 to 3.3.*
#
# First attention itself, now with a place for dropout on the weights, then the module: its queries come from
# one sequence, keys and values from any. `constrain` marks the residual stream for those who spread a model
# over many devices; here it does nothing.

# %% twin: layers.attend, layers.constrain

# %% [markdown]
# A product makes one axis of all but the last, so that its gradient sums over one axis: over two, XLA would
# copy both operands on a CPU. PyTorch takes them together itself, but is told in which order to multiply: for
# few rows a CPU reads the weight three times as fast when it stands on the left.

# %% twin: layers.Linear

# %% twin: transformer.Attention

# %% twin: layers.ACTIVATIONS, transformer.MLP

# %% twin: transformer.EncoderLayer

# %% [markdown]
# **Measured.** With dropout, without, and against PyTorch's own `TransformerEncoderLayer`.

# %%
ours, theirs = twins("EncoderLayer", small)
x = rng.normal(size=(2, 9, 24))
positions = np.stack([np.arange(9), np.arange(9) - 3]).clip(-1).astype(np.int32)  # row 1: three of padding
real = positions >= 0
mine = jx.visible(jnp.asarray(positions), jnp.asarray(positions), causal=False)
other = pt.visible(torch.tensor(positions), torch.tensor(positions), causal=False)
result = ours(jnp.asarray(x), mine, None)
report(
    "EncoderLayer, Flax against PyTorch",
    numbers(result)[real],
    numbers(theirs(torch.tensor(x), other, None))[real],
)
report(
    "EncoderLayer with dropout, Flax against PyTorch",
    numbers(ours(jnp.asarray(x), mine, jx.key(3)))[real],
    numbers(theirs(torch.tensor(x), other, pt.key(3)))[real],
)

library = torch.nn.TransformerEncoderLayer(24, 4, 40, dropout=0.0, batch_first=True, dtype=torch.float64)
mapped = {
    "linear1": theirs.mlp.fc1,
    "linear2": theirs.mlp.fc2,
    "norm1": theirs.self_attn_norm,
    "norm2": theirs.mlp_norm,
}
weights = {f"{name}.{k}": v for name, module in mapped.items() for k, v in module.state_dict().items()}
attn = theirs.self_attn
for k in ("weight", "bias"):
    weights[f"self_attn.in_proj_{k}"] = torch.cat(
        [getattr(m, k) for m in (attn.q_proj, attn.k_proj, attn.v_proj)]
    )
    weights[f"self_attn.out_proj.{k}"] = getattr(attn.o_proj, k)
library.load_state_dict(weights)
expected = library(torch.tensor(x), src_key_padding_mask=torch.tensor(~real))
report("EncoderLayer against torch.nn", numbers(result)[real], numbers(expected)[real])

# %% [markdown]
# **Break it: remove the bypass.** The `x +` looks like a detail. Stack twelve fresh layers with and without
# it and ask how alike the tokens have become. Attention averages, and averages of averages are all the same
# (Dong et al. 2021, arXiv:2103.03404).

# %%
stack = [jx.EncoderLayer(small, dtype=jnp.float64, rngs=nnx.Rngs(seed)) for seed in range(12)]


def likeness(bypass):
    """The mean cosine between different tokens of one text, layer by layer."""
    h, seen, found = jnp.asarray(rng.normal(size=(1, 16, 24))), jnp.ones((1, 16, 16), bool), []
    for layer in stack:
        h = layer.self_attn_norm(bypass * h + layer.self_attn(h, *layer.self_attn.keys_values(h), seen, None))
        h = layer.mlp_norm(bypass * h + layer.mlp(h, None))
        unit = h[0] / jnp.linalg.norm(h[0], axis=-1, keepdims=True)
        found.append(float((unit @ unit.T).sum() - 16) / (16 * 15))
    return found


figure, axis = plt.subplots(figsize=(6, 2.2))
axis.plot(range(1, 13), likeness(1.0), "o-", label="with bypass")
axis.plot(range(1, 13), likeness(0.0), "o-", color="C3", label="without")
axis.set(xlabel="layer", ylabel="cosine between tokens", ylim=(0, 1.05))
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# The bypass does not prevent it. It slows it down, and training does the rest.
#
# **Exercise 4.** How many weights and biases has one encoder layer of `transformer-base`? (D = 512, F =
# 2048.)

# %%
answer = None
check(answer, lambda a: a == count(base)["encoder"] // 6)

# %% [markdown]
# ## 6. The decoder
#
# **Idea.** The decoder writes. Its layers have three parts: causal attention to what has been written so
# far; attention *to the source*, where queries come from the target and keys and values from the encoder's
# output; and the small network. The source does not change while the target grows, so its keys and values
# are computed once, for all layers: that is `CrossCache`. The target's own past goes into the cache of
# notebook 01.
#
# *Sections 3.1 and 3.2.3.*

# %% twin: layers.CrossCache

# %% twin: transformer.DecoderLayer

# %% [markdown]
# It is measured with the model, next.
#
# ## 7. The model
#
# **Idea.** Encoder, decoder, and one table used three times: to read source tokens, to read target tokens,
# and, transposed, to score the next token. A word's vector is then shaped by everything that happens to the
# word. The paper has one vocabulary for both languages, so this works.
#
# $$\text{logits} = h\, E^\top \qquad x_0 = \sqrt{D}\, E[\text{token}] + P[\text{position}]$$
#
# *Section 3.4; Press & Wolf 2017, arXiv:1608.05859.*

# %% twin: transformer.Transformer

# %% [markdown]
# **Measured.** The logits, with sources of different length; with dropout; and the decoder in steps from its
# cache against one pass.

# %%
ours, theirs = twins("Transformer", small)
source, target = (rng.integers(2, 29, (2, length)).astype(np.int32) for length in (11, 8))
source_positions = np.stack([np.arange(11), np.arange(11) - 4]).clip(-1).astype(np.int32)
target_positions = np.tile(np.arange(8, dtype=np.int32), (2, 1))
inputs = (source, source_positions, target, target_positions)

logits, _ = ours(*map(jnp.asarray, inputs))
other, _ = theirs(*map(torch.tensor, inputs))
report("logits, Flax against PyTorch", logits, other)
dropped, _ = ours(*map(jnp.asarray, inputs), key=jx.key(5))
other, _ = theirs(*map(torch.tensor, inputs), key=pt.key(5))
report("logits with dropout, Flax against PyTorch", dropped, other)

for name, model, array in (("Flax", ours, jnp.asarray), ("PyTorch", theirs, torch.tensor)):
    memory = model.encode(array(source), array(source_positions))
    cross, cache, steps = model.cross_cache(memory, array(source_positions)), model.empty_cache(2, 8), []
    for t in range(8):
        step, cache = model.decode(
            array(target[:, t : t + 1]), array(target_positions[:, t : t + 1]), cross, cache
        )
        steps.append(numbers(step))
    report(f"{name}, token by token against one pass", np.concatenate(steps, axis=1), logits)
size = sum(p.numel() for p in theirs.parameters())
print(f"{size:,} parameters; the formula says {sum(count(small).values()):,}")
assert size == sum(count(small).values())

# %% [markdown]
# **Break it: read the answer.** In training the decoder gets the right target, shifted by one place, as its
# input. Forget the causal mask, and each place can look one step ahead at the very token it has to predict.
# The loss falls beautifully, and the model is useless. A test is easy: change the last target token and see
# what moves.

# %%
changed = target.copy()
changed[:, -1] = (changed[:, -1] + 1) % 29
moved, _ = ours(*map(jnp.asarray, (source, source_positions, changed, target_positions)))
print("causal:     earlier logits move by", np.abs(moved - logits)[:, :-1].max())
honest = jx.visible
jx.visible = lambda positions, keys, window=None, *, causal=True: honest(
    positions, keys, window, causal=False
)
leaky = [
    ours(*map(jnp.asarray, (source, source_positions, t, target_positions)))[0] for t in (target, changed)
]
jx.visible = honest
print(f"not causal: earlier logits move by {np.abs(leaky[1] - leaky[0])[:, :-1].max():.2f}")

# %% [markdown]
# **Exercise 5.** Change source token 0 of row 1. In how many rows of the batch do the logits move? (Look at
# `source_positions`.)

# %%
answer = None


def rows_that_move():
    other_source = source.copy()
    other_source[1, 0] = (other_source[1, 0] + 1) % 29
    again, _ = ours(*map(jnp.asarray, (other_source, source_positions, target, target_positions)))
    return int((np.abs(again - logits).max(axis=(1, 2)) > 0).sum())


check(answer, lambda a: a == rows_that_move())

# %% [markdown]
# ## 8. Label smoothing
#
# **Idea.** Cross-entropy asks for certainty: the loss falls as long as the right logit grows, without end.
# Label smoothing asks for a little doubt. The target distribution gives the right token $1 - \varepsilon$
# and spreads $\varepsilon$ over the whole vocabulary. The paper found that perplexity suffers, since the
# model is less sure, and that its translations get better.
#
# $$\ell = -(1-\varepsilon)\log p_{\text{right}} - \frac{\varepsilon}{V}\sum_{v} \log p_v$$
#
# *Szegedy et al. 2016, arXiv:1512.00567; section 5.4.*

# %% twin: training.SIDE_trainer.smoothed_loss

# %%
labels = rng.integers(0, 29, (2, 8)).astype(np.int32)
kept = np.arange(8) < np.array([[8], [5]])  # row 1 has three tokens of padding on the right
mine = jx.smoothed_loss(logits, jnp.asarray(labels), jnp.asarray(kept), 0.1)
other = pt.smoothed_loss(torch.tensor(numbers(logits)), torch.tensor(labels), torch.tensor(kept), 0.1)
library = torch.nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=-100)
expected = library(
    torch.tensor(numbers(logits)).flatten(0, 1), torch.tensor(np.where(kept, labels, -100)).flatten().long()
)
report("loss, Flax against PyTorch", mine, other)
report("loss against torch.nn.CrossEntropyLoss", mine, expected)

# %% [markdown]
# **Picture.** The loss of one token, as the right logit rises above the others. Without smoothing there is
# always a little to gain. With it there is a best place to stop.

# %%
lead = np.linspace(0, 16, 200)
raised = jnp.zeros((200, 1, 29)).at[:, 0, 0].set(lead)
figure, axis = plt.subplots(figsize=(6, 2.2))
for smoothing in (0.0, 0.1, 0.2):
    one = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    axis.plot(
        lead, [jx.smoothed_loss(row[None], *one, smoothing) for row in raised], label=f"ε = {smoothing}"
    )
axis.set(xlabel="right logit minus the others", ylabel="loss", ylim=(0, 4))
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# **Break it: count the padding.** If padded places stay in the mean, the loss depends on how a batch happens
# to be filled, and the model spends effort on predicting filling.

# %%
everything = jx.smoothed_loss(logits, jnp.asarray(np.where(kept, labels, 0)), jnp.ones((2, 8), bool), 0.1)
print(f"padding dropped: {mine:.4f}, padding counted: {everything:.4f}")

# %% [markdown]
# **Exercise 6.** With smoothing, the loss has a floor above zero: the entropy of the target distribution.
# Compute it for V = 29 and ε = 0.1. (The right token has $1 - \varepsilon + \varepsilon/V$.)

# %%
answer = None


def floor(V=29, smoothing=0.1):
    right, wrong = 1 - smoothing + smoothing / V, smoothing / V
    return -right * np.log(right) - (V - 1) * wrong * np.log(wrong)


check(answer, lambda a: np.isclose(a, floor()))

# %% [markdown]
# ## 9. The learning rate warms up
#
# **Idea.** At the start, Adam knows little about the gradients' size, and post-norm makes the gradients of
# the upper layers large. So the paper begins with tiny steps, raises the rate in a straight line, and lowers
# it with the inverse square root of the step.
#
# $$\text{rate}(n) = D^{-1/2} \min\big(n^{-1/2},\; n \cdot \text{warmup}^{-3/2}\big)$$
#
# One function in plain Python serves both frameworks, so they cannot disagree about it.
#
# *Section 5.3; for why post-norm needs it, Xiong et al. 2020, arXiv:2002.04745.*

# %% both: training.schedule.learning_rate

# %%
figure, axis = plt.subplots(figsize=(6, 2.2))
updates = range(1, 20001, 50)
for D, warmup in ((512, 4000), (512, 8000), (256, 4000)):
    axis.plot(
        updates, [shared.learning_rate(n, D, warmup) for n in updates], label=f"D = {D}, warm-up {warmup}"
    )
axis.set(xlabel="update", ylabel="learning rate")
axis.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# **Exercise 7.** The highest rate of transformer-base, with D = 512 and 4000 updates of warm-up? Four digits
# will do.

# %%
answer = None
check(answer, lambda a: np.isclose(a, shared.learning_rate(4000, 512, 4000), rtol=1e-3))

# %% [markdown]
# ## 10. Training
#
# **Task.** Small enough for a minute, hard enough to need all parts: read a word and write it backwards.
# Twelve letters, words of three to six, padded. The model has to find the end of the source, walk back
# through it, and stop in time.
#
# Both frameworks start from the same weights, see the same batches, and drop the same units.

# %%
LETTERS, PAD, END, START = "abcdefghijkl", 0, 1, 0
tiny = base.__class__(
    **{
        **vars(base),
        "source_vocab_size": 14,
        "target_vocab_size": 14,
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "dropout": 0.02,
    }
)


def batch(seed, size=48, longest=6):
    """Source, its positions, decoder input, its positions, labels: each [B, 7]. The same for each seed."""
    draw = np.random.default_rng(seed)
    source, positions = (
        np.full((size, longest + 1), PAD, np.int32),
        np.full((size, longest + 1), -1, np.int32),
    )
    labels = source.copy()
    for row, length in enumerate(draw.integers(3, longest + 1, size)):
        word = draw.integers(2, 14, length)
        source[row, : length + 1] = [*word, END]
        labels[row, : length + 1] = [*word[::-1], END]
        positions[row, : length + 1] = np.arange(length + 1)
    tokens = np.concatenate([np.full((size, 1), START, np.int32), labels[:, :-1]], axis=1)
    return source, positions, tokens, positions, labels


def spell(tokens):
    return "".join(LETTERS[t - 2] for t in tokens if t > 1)


for row in range(3):
    source, _, _, _, labels = batch(0)
    print(f"{spell(source[row]):9} -> {spell(labels[row])}")

# %% [markdown]
# **The two loops.** In JAX a step is a pure function: weights and Adam's moments go in, new ones come out,
# and `jit` compiles all of it. In PyTorch the model holds its weights, `backward` fills in gradients, and
# the optimizer changes them in place. `optax.scale_by_adam` and `torch.optim.Adam` are the same formula.

# %%
flax_model, torch_model = twins("Transformer", tiny, spread=0.0)
start = nnx.to_pure_dict(nnx.state(flax_model))
graph = nnx.graphdef(flax_model)
adam = optax.scale_by_adam(b1=0.9, b2=0.98, eps=1e-9)


@jax.jit
def flax_update(weights, moments, batch, rate, key):
    *inputs, labels = batch

    def loss(weights):
        logits, _ = nnx.merge(graph, weights)(*inputs, key=key)
        return jx.smoothed_loss(logits, labels, inputs[-1] >= 0, 0.1)

    value, gradients = jax.value_and_grad(loss)(weights)
    steps, moments = adam.update(gradients, moments)
    return jax.tree.map(lambda w, step: w - rate * step, weights, steps), moments, value


optimizer = torch.optim.Adam(torch_model.parameters(), betas=(0.9, 0.98), eps=1e-9)


def torch_update(batch, rate, key):
    *inputs, labels = map(torch.tensor, batch)
    logits, _ = torch_model(*inputs, key=key)
    loss = pt.smoothed_loss(logits, labels, inputs[-1] >= 0, 0.1)
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return loss.item()


UPDATES, WARMUP = 450, 800


def train_flax(rate_of, updates=UPDATES):
    weights, moments, losses = start, adam.init(start), []
    for n in range(1, updates + 1):
        weights, moments, loss = flax_update(weights, moments, batch(n), rate_of(n), jx.fold_in(jx.key(0), n))
        losses.append(float(loss))
    return weights, losses


def scheduled(n):
    return shared.learning_rate(n, 64, WARMUP)


began = time.perf_counter()
trained, flax_losses = train_flax(scheduled)
print(f"Flax    {time.perf_counter() - began:5.1f} s, last loss {flax_losses[-1]:.4f}")
began = time.perf_counter()
torch_losses = [torch_update(batch(n), scheduled(n), pt.fold_in(pt.key(0), n)) for n in range(1, UPDATES + 1)]
print(f"PyTorch {time.perf_counter() - began:5.1f} s, last loss {torch_losses[-1]:.4f}")
nnx.update(flax_model, trained)

# %% [markdown]
# **Picture.** Two curves, drawn thick and thin, since one would hide the other. Below, their difference. It
# begins with the last digit of float64 and grows, since each update builds on the one before and Adam
# divides by the size of the gradient, where that is tiny too. At the end the losses still agree to ten
# digits and more, *with dropout*: that is what shared keys are for.

# %%
apart = np.abs(np.array(flax_losses) - np.array(torch_losses))
figure, axes = plt.subplots(2, 1, figsize=(7, 3.8), sharex=True, height_ratios=(2, 1))
axes[0].plot(flax_losses, color="C0", lw=4, alpha=0.4, label="Flax")
axes[0].plot(torch_losses, color="C1", lw=1, label="PyTorch")
axes[0].axhline(floor(14), color="0.6", linestyle=":")
axes[0].set(ylabel="loss")
axes[0].legend(frameon=False)
axes[1].semilogy(np.maximum(apart, 1e-17), color="C3", lw=1)
axes[1].set(xlabel="update", ylabel="difference")
plt.show()
print(f"largest difference in the first 20 updates {apart[:20].max():.1e}, in all {apart.max():.1e}")
assert apart[:20].max() < 1e-8

# %% [markdown]
# (The dotted line is the floor of exercise 6, for 14 tokens.)
#
# **Break it: no warm-up.** A model of two layers forgives a lot, so this takes a high rate. With a warm-up
# of 156 updates, the schedule rises to 0.01, and the model learns. With 0.01 from the first update on, it
# falls into a place that it does not leave again: it predicts letters by how often they occur, and ignores
# the source.


# %%
def short(n):
    return shared.learning_rate(n, 64, 156)


figure, axis = plt.subplots(figsize=(7, 2.2))
axis.plot(train_flax(short, 150)[1], label="warm-up to 0.01")
axis.plot(train_flax(lambda n: short(156), 150)[1], color="C3", label="0.01 from the start")
axis.set(xlabel="update", ylabel="loss", ylim=(0.4, 4))
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 11. Greedy decoding and beam search
#
# **Idea.** The model gives a distribution over the next token; a translation is a whole sentence. *Greedy*
# decoding takes the best token each time and may regret it later. *Beam search* carries on the n best
# beginnings. A finished sentence is ranked by its log-probability divided by a power of its length, since a
# sum of logarithms only ever falls, and short answers would always win.
#
# $$\text{score}(y) = \frac{\log p(y \mid x)}{\text{penalty}(|y|)} \qquad
# \text{penalty}(n) = n^\alpha \;\text{ or }\; \Big(\tfrac{5+n}{6}\Big)^{\alpha}$$
#
# *Section 6.1 of the paper; Wu et al. 2016, arXiv:1609.08144, equation 14.*

# %% both: configs._beams.Beams[__post_init__, divisors]
# configs._sampling.check_prompts, configs._sampling.bucket, configs._beams.check_sources

# %% [markdown]
# **What differs.** The JAX search is one compiled program, loop included, over arrays of fixed shape. The
# PyTorch search is a Python loop that may stop as soon as all sentences are done. Both reorder the cache by
# *gathering rows*: a beam goes on from where another one stood.

# %% twin: beam.reorder, beam.log_probabilities, beam.advance, beam.search, beam.Translator

# %% [markdown]
# **Measured.** 200 words that training has not seen (there are more than three million possible words). Both
# frameworks, one beam and four.

# %%
source, positions, _, _, labels = batch(1_000_000, size=200)
sources = [row[place >= 0].tolist() for row, place in zip(source, positions, strict=True)]
expected = [row[place >= 0].tolist() for row, place in zip(labels, positions, strict=True)]
translators = {"Flax": jx.Translator(flax_model), "PyTorch": pt.Translator(torch_model)}
found = {}
for beams in (1, 4):
    for name, translator in translators.items():
        options = {"jx": jx, "pt": pt}["jx" if name == "Flax" else "pt"].Beams(
            num_beams=beams, max_new_tokens=12
        )
        found[name, beams] = translator.translate(sources, options)
        exact = np.mean([h.tokens == e for h, e in zip(found[name, beams], expected, strict=True)])
        print(f"{name:8} {beams} beam{'s' * (beams > 1)}: {exact:.1%} written backwards without a mistake")
    pairs = list(zip(found["Flax", beams], found["PyTorch", beams], strict=True))
    print(f"         the same text in both: {np.mean([a.tokens == b.tokens for a, b in pairs]):.1%}")
for words, hypothesis in list(zip(sources, found["Flax", 4], strict=True))[:4]:
    print(f"{spell(words):9} -> {spell(hypothesis.tokens):9} (score {hypothesis.score:.3f})")

# %% [markdown]
# **Break it: the wrong power.** A negative exponent rewards *short* sentences, a large one long ones. What
# the search returns changes, though the model does not:

# %%
lengths = {}
for power in (-6.0, 0.0, 1.0, 6.0):
    options = jx.Beams(num_beams=4, max_new_tokens=12, length_penalty=power)
    lengths[power] = np.mean([len(h.tokens) for h in translators["Flax"].translate(sources[:50], options)])
    print(f"length penalty {power:4}: {lengths[power]:.2f} tokens on average")
print(f"right would be       {np.mean([len(e) for e in expected[:50]]):.2f}")

# %% [markdown]
# **Exercise 8.** Two finished sentences: log-probability −2 with 4 tokens, and −3 with 8. Which one wins for
# the penalty $n^\alpha$ with α = 1: `"short"` or `"long"`?

# %%
answer = None
check(answer, lambda a: a == ("short" if -2 / 4 > -3 / 8 else "long"))

# %% [markdown]
# ## 12. Looking inside
#
# What has the model learned? To write the word backwards, target position $t$ must look at source position
# (length − 1 − t). The next cell listens to `attend` while the model runs and keeps the weights.


# %%
def listen(model, *inputs):
    """The attention weights of one pass: per encoder layer one, per decoder layer two (own past, source)."""
    heard = []

    def spy(q, k, v, mask, **options):
        heard.append(numbers(jx.attention_weights(q, k, mask)))
        return jx.attend(q, k, v, mask, **options)

    layers = [module for _, module in nnx.iter_modules(model) if isinstance(module, jx.Attention)]
    for layer in layers:
        layer.attend = spy
    try:
        model(*map(jnp.asarray, inputs))
    finally:
        for layer in layers:
            layer.attend = jx.attend
    return heard


word = "gdbeac"
source = np.array([[*(LETTERS.index(c) + 2 for c in word), END]], np.int32)
target = np.array([[START, *source[0, -2::-1]]], np.int32)
order = np.arange(7, dtype=np.int32)[None]
heard = listen(flax_model, source, order, target, order)
rows, columns = ["start", *word[::-1]], [*word, "end"]
figure, axes = plt.subplots(2, 4, figsize=(8.5, 5))
for layer in range(2):
    for head in range(4):
        axis = axes[layer, head]
        axis.imshow(heard[2 + 2 * layer + 1][0, head], cmap="Blues", vmin=0, vmax=1)
        axis.set_xticks(range(7), columns if layer else [], fontsize=7)
        axis.set_yticks(range(7), rows if head == 0 else [], fontsize=7)
        axis.tick_params(length=0)
        axis.set_title(f"layer {layer}, head {head}", fontsize=9)
figure.supxlabel("source", fontsize=9)
figure.supylabel("target so far", fontsize=9)
plt.tight_layout()
plt.show()

# %% [markdown]
# The dark diagonals from lower left to upper right are the answer: having written up to here, look one
# letter further to the left. Nobody told it to.
#
# **Exercise 9.** Which of the eight maps follows the reversal most closely? Give (layer, head), counted from
# 0.

# %%
answer = None


def best_head():
    cross = np.stack([heard[3][0], heard[5][0]])  # [layer, head, T, S]
    follows = cross[:, :, np.arange(6), 5 - np.arange(6)].mean(-1)
    return np.unravel_index(follows.argmax(), follows.shape)


check(answer, lambda a: tuple(a) == tuple(best_head()))

# %% [markdown]
# ## What you have now
#
# | part | the mistake to look for |
# |---|---|
# | sinusoids | no √D on the embeddings; another order of sines and cosines |
# | dropout | one key for everything |
# | LayerNorm | defaults that differ; a variance that cancels |
# | encoder | no bypass |
# | decoder | no causal mask: a beautiful loss and no model |
# | label smoothing | padding in the mean |
# | schedule | no warm-up |
# | beam search | the wrong length penalty |
#
# Both versions of this model started from the same weights and went through the same training, dropout
# included, with the same losses. The same code, at full size, translates English into German.
#
# Next in the course: **03, GPT-2**, this decoder alone, and **04, LLaMA 2**, which changes four of its parts.
