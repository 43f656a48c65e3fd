# %% [markdown]
# # LLaMA 2, twice, and without fairscale
#
# LLaMA 2 is the decoder of the original Transformer with four parts exchanged. Each exchange is small, and
# each has a reason that can be measured. This notebook takes them one by one, writes each in Flax NNX and in
# PyTorch, gives both the same weights and compares them in double precision. At the end stands the whole
# model, in both frameworks, reading Meta's own checkpoint files without Meta's own launcher.
#
# | section | the original Transformer has | LLaMA 2 has | paper |
# |---|---|---|---|
# | 2 | LayerNorm, after each part | RMSNorm, before each part | Zhang & Sennrich 2019 |
# | 3 | sinusoids added once | rotations in each layer | Su et al. 2021 |
# | 4 | ReLU between two matrices | SwiGLU, three matrices | Shazeer 2020 |
# | 5 | as many keys as queries | grouped queries in the largest model | Ainslie et al. 2023 |
#
# It assumes notebook 01 (attention, masks, the cache) and 02 (the original Transformer). You need `jax`,
# `flax`, `torch`, `numpy` and `matplotlib`, and about a minute.
#
# *Touvron et al. 2023, "LLaMA", arXiv:2302.13971, and "Llama 2", arXiv:2307.09288.*
#
# **Letters.** B batch, T query length, S key length, D hidden, N query heads, K key-value heads, H head
# dimension, F feed-forward, V vocabulary, L layers.

# %% [markdown]
# ## Setting up
#
# As in the notebooks before: `%%twin jax` runs a cell in the module `jx`, `%%twin torch` in the module `pt`,
# and `%%twin both` defines for both what needs no framework.

# %% magic

# %%
import json
import os
import re
import tempfile
from pathlib import Path

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

# %% [markdown]
# The helpers. `share` converts the weights: names agree but for the last part, and matrices are transposed.
# Here it starts from a dictionary of arrays under PyTorch's names, because that is what a checkpoint is.

# %%
LAST = {"kernel": "weight", "embedding": "weight", "scale": "weight"}  # Flax's names of leaves: PyTorch's


def numbers(x):
    """A tensor or an array, for numpy. It has no bfloat16; float32 holds each of those exactly."""
    if isinstance(x, torch.Tensor):
        x = x.detach().float() if x.dtype == torch.bfloat16 else x.detach()
    return np.asarray(x)


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
        for parameter in theirs.parameters():
            if parameter.ndim == 1:  # a norm: away from 1, so that forgetting it would show
                parameter.uniform_(0.5, 1.5)
    needs_key = {} if name == "RMSNorm" else {"rngs": nnx.Rngs(0)}
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
# And the pieces that notebook 01 explained. They are the same text.

# %% both: errors.UsageError, errors.ConfigError

# %% twin: random.bits, layers.at_least_float32, layers.dropout
# layers.visible, layers.attention_weights, layers.attend
# layers.KVCache, layers.empty_cache, layers.place, layers.store

# %% [markdown]
# ## 1. One configuration for both
#
# **Idea.** An architecture is code and a few numbers. The numbers live in one frozen object that both
# frameworks read. Nothing has a default where it is used: the next sections show how much a wrong default
# costs. (The second half of `rotary_frequencies` is for the long contexts of Llama 3.1. LLaMA 2 leaves by
# the first `return`.)

# %% both: configs._rope.rotary_frequencies, configs.llama.LlamaConfig[validate, rotary_frequencies]

# %% both: configs.llama.PRESETS[llama2-7b, llama2-13b, llama2-70b]

# %% [markdown]
# **How many parameters is that?** The configuration knows.


# %%
def count(c):
    """Parameters of a LLaMA by where they sit."""
    D, F, N, K, H = (
        c.hidden_size,
        c.intermediate_size,
        c.num_attention_heads,
        c.num_key_value_heads,
        c.head_dim,
    )
    L = c.num_hidden_layers
    return {
        "embedding and head": (1 if c.tie_word_embeddings else 2) * c.vocab_size * D,
        "attention": L * (D * N * H + 2 * D * K * H + N * H * D),
        "MLP": L * 3 * D * F,
        "norms": (2 * L + 1) * D,
    }


figure, axis = plt.subplots(figsize=(7, 1.9))
for row, (name, config) in enumerate(shared.PRESETS.items()):
    parts, left = count(config), 0
    print(f"{name:12} {sum(parts.values()):>14,} parameters; norms {parts['norms']:>9,}")
    for color, (part, size) in enumerate(parts.items()):
        share_of_all = size / sum(parts.values())
        axis.barh(row, share_of_all, left=left, color=f"C{color}", label=part if row == 0 else None)
        left += share_of_all
axis.set_yticks(range(3), list(shared.PRESETS))
axis.set(xlabel="share of all parameters", xlim=(0, 1))
axis.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
plt.show()

# %% [markdown]
# **Exercise 1.** The 70B model has grouped queries: 8 key-value heads instead of 64. How many parameters
# does that save, over all layers?

# %%
answer = None


def saved(c=shared.PRESETS["llama2-70b"]):
    return sum(count(c.__class__(**{**vars(c), "num_key_value_heads": 64})).values()) - sum(count(c).values())


check(answer, lambda a: a == saved())

# %% [markdown]
# ## 2. RMSNorm
#
# **Idea.** LayerNorm does two things: it centres a vector and scales it to length $\sqrt{D}$. RMSNorm keeps
# the scaling and drops the centring. One statistic less, no bias, and training is as stable as before.
#
# $$y = \frac{x}{\sqrt{\frac{1}{D}\sum_i x_i^2 + \varepsilon}} \odot g$$
#
# *Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467.*
#
# LLaMA applies it *before* each part and leaves the residual stream itself untouched, so that gradients have
# a straight way down ("pre-norm").

# %% twin: layers.RMSNorm

# %%
ours, theirs = twins("RMSNorm", 24, 1e-5)
x = rng.normal(size=(2, 5, 24)) + 3.0
library = torch.nn.RMSNorm(24, eps=1e-5, dtype=torch.float64)
library.load_state_dict(theirs.state_dict())
report("RMSNorm, Flax against PyTorch", ours(jnp.asarray(x)), theirs(torch.tensor(x)))
report("RMSNorm against torch.nn.RMSNorm", ours(jnp.asarray(x)), library(torch.tensor(x)))

# %% [markdown]
# **Picture.** Three hundred points in three dimensions, seen along the first two. RMSNorm puts them on a
# sphere. LayerNorm first flattens them onto the plane where coordinates add up to zero, which leaves a
# circle.

# %%
cloud = rng.normal(size=(300, 3)) + np.array([1.5, 0.5, 0.0])
centred = cloud - cloud.mean(-1, keepdims=True)
shapes = {
    "as they are": cloud,
    "LayerNorm": centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5),
    "RMSNorm": numbers(jx.RMSNorm(3, 1e-5, dtype=jnp.float64)(jnp.asarray(cloud))),
}
figure, axes = plt.subplots(1, 3, figsize=(8, 2.7))
for axis, (name, points) in zip(axes, shapes.items(), strict=True):
    axis.scatter(points[:, 0], points[:, 1], c=cloud[:, 0], s=7, cmap="viridis")
    axis.set(title=name, xlim=(-3, 4), ylim=(-3, 3.5), xticks=[], yticks=[], aspect="equal")
plt.show()

# %% [markdown]
# **Break it: statistics in half precision.** Both cells raise the numbers to at least float32 before they
# square them. Leave that out, and a float16 vector with entries of 300 has squares of 90,000. The largest
# float16 is 65,504.

# %%
loud = jnp.full((1, 4), 300.0, jnp.float16)
norm = jx.RMSNorm(4, 1e-5, dtype=jnp.float16)
naive = loud * jax.lax.rsqrt(jnp.mean(loud * loud, axis=-1, keepdims=True) + 1e-5)
print("statistics in float32:", norm(loud)[0], "  in float16:", naive[0])

# %% [markdown]
# A layer of zeros, and no error message. Large activations like these do occur in trained models.
#
# **Exercise 2.** Let $\varepsilon \to 0$ and $g = 1$. What is RMSNorm(10·x) compared with RMSNorm(x)? Give
# the factor.

# %%
answer = None
check(answer, lambda a: a == 1)

# %% [markdown]
# ## 3. Rotary positions
#
# **Idea.** Attention compares a query with a key by a dot product, and a dot product knows lengths and
# *angles*. So write the position into the angle. Take the H numbers of a head as H/2 points in a plane, and
# turn each by an amount proportional to the token's position: quickly for the first pair, slowly for the
# last. When both the query and the key are turned, only the *difference* of their positions is left in the
# product.
#
# $$\langle R_m q,\; R_n k\rangle = \langle R_{m-n}\, q,\; k \rangle \qquad
# \theta_j = \text{base}^{-2j/H}, \quad j = 0 \dots \tfrac H2 - 1$$
#
# Nothing is added to the embeddings, nothing is learned, and values are not turned at all.
#
# *Su et al. 2021, "RoFormer", arXiv:2104.09864.*

# %% twin: layers.rotary_angles, layers.rotate

# %%
H = 10
frequencies = shared.rotary_frequencies(H, 10000.0, None)
q, k = rng.normal(size=(2, 1, 1, 2, H))  # [B, T, heads, H]


def turned(package, array, dtype, x, position):
    cos, sin = package.rotary_angles(array([[position]]), frequencies, dtype)
    return package.rotate(array(x), cos, sin)


for m in (1, 300, 4095):
    mine = turned(jx, jnp.asarray, jnp.float64, q, m)
    report(
        f"rotation to position {m}, Flax against PyTorch", mine, turned(pt, torch.tensor, torch.float64, q, m)
    )


def score(m, n):
    """The dot product of a query at position m with a key at position n, per head."""
    a, b = (turned(jx, jnp.asarray, jnp.float64, v, p) for v, p in ((q, m), (k, n)))
    return (a * b).sum(-1)


report("positions (7, 3) and (1007, 1003) give the same score", score(7, 3), score(1007, 1003))

# %% [markdown]
# **Picture.** Left: how the pairs of a LLaMA 2 head turn along a text; the first makes a full circle every
# six tokens, the last in 54,000. Right: the score of a vector with itself, as a function of distance. Near
# tokens stand out, without any token knowing its absolute place.

# %%
frequencies = shared.PRESETS["llama2-7b"].rotary_frequencies
cos, sin = jx.rotary_angles(jnp.arange(512)[None], frequencies, jnp.float64)
figure, axes = plt.subplots(1, 2, figsize=(8, 2.6))
axes[0].imshow(cos[0, :96].T, aspect="auto", cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
axes[0].set(title="cosine of the angle", xlabel="position", ylabel="pair j of 64")
axes[1].plot(np.asarray(cos[0]).sum(-1) / 64)
axes[1].set(title="score of a vector with itself", xlabel="distance", ylim=(-0.2, 1.05))
axes[1].axhline(0, color="0.8", zorder=0)
plt.tight_layout()
plt.show()

# %% [markdown]
# **Two ways to pair.** Which two numbers form a point? Meta's files pair neighbours: (0, 1), (2, 3), ...
# Most libraries, and the cells above, pair halves: (0, H/2), (1, H/2+1), ... Both are the same mathematics
# with the dimensions in another order. Since queries and keys are reordered alike, scores do not change,
# *if* the rows of the weights are reordered too:

# %%
D, N, H = 12, 2, 8
frequencies = shared.rotary_frequencies(H, 10000.0, None)
wq, wk = rng.normal(size=(2, N * H, D))  # as PyTorch stores them, [out, in], in Meta's order
x, positions = rng.normal(size=(1, 6, D)), jnp.arange(6)[None]


def neighbours(x, cos, sin):
    """Meta's form: turn dimension 2j together with 2j + 1."""
    even, odd, cos, sin = x[..., ::2], x[..., 1::2], cos[:, :, None], sin[:, :, None]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)


def halves_from_neighbours(w, heads):
    """Reorder the rows of a query or key matrix: in each head all first partners, then all second ones."""
    return w.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def scores(rotate, wq, wk):
    cos, sin = jx.rotary_angles(positions, frequencies, jnp.float64)
    q, k = (rotate((x @ w.T).reshape(1, 6, N, H), cos, sin) for w in (wq, wk))
    return jnp.einsum("btnh,bsnh->bnts", q, k)


meta = scores(neighbours, wq, wk)
report(
    "Meta's form against halves, rows reordered",
    scores(jx.rotate, *(halves_from_neighbours(w, N) for w in (wq, wk))),
    meta,
)

# %% [markdown]
# **Break it: load the rows as they are.** The shapes fit, and where query and key stand at the same place
# the score is even right, since both are turned alike. Everywhere else it is noise.

# %%
wrong = scores(jx.rotate, wq, wk)
print(f"rows not reordered: off by {difference(wrong, meta):.0%} of the largest score")
by_distance = [float(np.abs(np.diagonal(wrong - meta, -d, 2, 3)).max()) for d in range(6)]
print("largest error by distance of query and key:", np.round(by_distance, 2))

# %% [markdown]
# **Break it once more: positions in bfloat16.** A model that runs in bfloat16 is tempted to compute its
# angles there. bfloat16 has eight significant bits: it knows 256 and 258, and no 257.

# %%
positions = jnp.arange(1024)
exact = jnp.cos(positions.astype(jnp.float64))  # the first pair turns by one radian per position
rounded = jnp.cos(positions.astype(jnp.bfloat16).astype(jnp.float64))
figure, axis = plt.subplots(figsize=(8, 1.9))
axis.plot(np.abs(exact - rounded), ".", markersize=2, color="C3")
axis.set(xlabel="position", ylabel="error of the cosine", xticks=range(0, 1025, 256))
plt.show()

# %% [markdown]
# **Exercise 3.** The base of LLaMA 2 is 10,000 and H is 128. After how many positions has the *slowest* pair
# made one full turn? (Its frequency is base to the power $-126/128$. Whole numbers will do.)

# %%
answer = None
check(answer, lambda a: abs(a - 2 * np.pi / shared.PRESETS["llama2-7b"].rotary_frequencies[-1]) < 1)

# %% [markdown]
# ## 4. SwiGLU
#
# **Idea.** The old MLP lifts a vector into F dimensions, cuts off the negative part and comes back. SwiGLU
# lifts it *twice*. One copy goes through a smooth gate and decides how much of the other passes. Multiplying
# two views of the same vector lets the layer express "this, if that".
#
# $$y = W_{\text{down}}\big(\operatorname{silu}(W_{\text{gate}}\,x) \odot W_{\text{up}}\,x\big), \qquad
# \operatorname{silu}(z) = z\,\sigma(z)$$
#
# Three matrices instead of two: to keep the count of parameters, F shrinks from 4D to about 8/3 D.
#
# *Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202. Its conclusion credits divine
# benevolence.*

# %% [markdown]
# A product makes one axis of all but the last, so that its gradient sums over one axis: over two, XLA would
# copy both operands on a CPU. PyTorch takes them together itself, but is told in which order to multiply: for
# few rows a CPU reads the weight three times as fast when it stands on the left.

# %% twin: layers.Linear

# %% twin: llama.MLP

# %%
tiny = shared.LlamaConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=88,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
)
ours, theirs = twins("MLP", tiny)
x = rng.normal(size=(2, 5, 48))
report("MLP, Flax against PyTorch", ours(jnp.asarray(x)), theirs(torch.tensor(x)))

# %% [markdown]
# **Picture.** Left, the gates: ReLU is a switch, silu a soft one that dips below zero before it closes.
# Right, what one unit of SwiGLU computes when gate and lift are two directions in a plane: it answers where
# *both* agree.

# %%
z = np.linspace(-5, 5, 200)
figure, axes = plt.subplots(1, 2, figsize=(8, 2.6), width_ratios=(1.3, 1))
axes[0].plot(z, np.maximum(z, 0), label="ReLU", color="0.6")
axes[0].plot(z, jax.nn.silu(z), label="silu", color="C0")
axes[0].legend(frameon=False)
gate, up = np.meshgrid(z, z)
picture = axes[1].contourf(gate, up, jax.nn.silu(gate) * up, levels=np.linspace(-25, 25, 21), cmap="RdBu")
axes[1].set(xlabel="gate", ylabel="up", title="silu(gate) · up", aspect="equal")
plt.tight_layout()
plt.show()

# %% [markdown]
# **Break it: exchange gate and up.** Both matrices have the same shape, and in Meta's files they are called
# `w1` and `w3`. Nothing but the numbers can tell that they were swapped.

# %%
swapped = dict(theirs.named_parameters())
swapped["gate_proj.weight"], swapped["up_proj.weight"] = (
    swapped["up_proj.weight"],
    swapped["gate_proj.weight"],
)
right = ours(jnp.asarray(x))
share(swapped, ours)
print(f"gate and up exchanged: off by {difference(ours(jnp.asarray(x)), right):.0%}")

# %% [markdown]
# **Exercise 4.** Meta's rule: take 8/3 D, round down to a whole number, then up to a multiple of 256. What
# is F for D = 4096? Compare with `shared.PRESETS["llama2-7b"]`.

# %%
answer = None
check(answer, lambda a: a == shared.PRESETS["llama2-7b"].intermediate_size)

# %% [markdown]
# ## 5. The model
#
# **Idea.** Attention is the grouped-query attention of notebook 01 plus two lines that turn queries and
# keys. A block is *normalise, mix, add*, twice: first over the sequence, then over the features. The model
# is an embedding, L blocks, a last norm, and a matrix that turns features into scores for each word.
#
# $$x \leftarrow x + \operatorname{Attention}(\operatorname{RMSNorm}(x)) \qquad
# x \leftarrow x + \operatorname{MLP}(\operatorname{RMSNorm}(x))$$
#
# The angles and the mask follow from the positions alone, so they are computed once per call and handed to
# every layer: that is `Context`. `constrain` marks the residual stream for those who spread a model over
# many devices. Here it does nothing.

# %% twin: layers.Context, layers.constrain

# %% twin: llama.Attention

# %% twin: llama.Block

# %% twin: llama.Llama

# %% [markdown]
# **Measured.** The whole model on two texts of 300 tokens, the second padded on the left; then its
# parameters against the formula of section 1.

# %%
ours, theirs = twins("Llama", tiny)
tokens = rng.integers(0, 97, (2, 300)).astype(np.int32)
positions = np.stack([np.arange(300), np.arange(300) - 40]).clip(-1).astype(np.int32)
real = positions >= 0
logits, _ = ours(jnp.asarray(tokens), jnp.asarray(positions))
with torch.no_grad():
    other, _ = theirs(torch.tensor(tokens), torch.tensor(positions))
report("logits, Flax against PyTorch", numbers(logits)[real], numbers(other)[real])
size = sum(p.numel() for p in theirs.parameters())
print(f"{size:,} parameters; the formula says {sum(count(tiny).values()):,}")
assert size == sum(count(tiny).values())

# %% [markdown]
# **Break it: a default argument.** Somewhere deep in a port stands `def rotary(..., theta=10000.0)`, and the
# configuration's value never arrives. Code Llama has 1,000,000. How wrong is the model, and would your test
# have seen it?

# %%
longer = shared.LlamaConfig(**{**vars(tiny), "rope_theta": 1e6})
forgot = jx.Llama(longer, dtype=jnp.float64, rngs=nnx.Rngs(0))
share(dict(theirs.named_parameters()), forgot)
wrong, _ = forgot(jnp.asarray(tokens), jnp.asarray(positions))
error = np.abs(wrong - logits)[0].max(-1) / np.abs(logits[0]).max()
figure, axis = plt.subplots(figsize=(8, 2.2))
axis.loglog(np.arange(1, 301), np.maximum(error, 1e-5), ".", markersize=3, color="C3")
axis.axhline(1e-2, color="0.6", linestyle=":")
axis.set(xlabel="tokens", ylabel="relative error", ylim=(5e-6, 0.3), xticks=[1, 3, 10, 30, 100, 300])
axis.set_xticklabels(["1", "3", "10", "30", "100", "300"])
axis.minorticks_off()
axis.text(1, 1.2e-2, "a tolerance of one percent", color="0.4", fontsize=8)
plt.show()
print(f"the error first exceeds one percent at token {np.argmax(error > 1e-2) + 1}")

# %% [markdown]
# The first token is exact, and the next few are nearly right. A test with a handful of tokens and a
# tolerance of a percent passes. This very mistake has been found in published ports, which is why this
# course compares in float64, at hundreds of positions.
#
# **Exercise 5.** Does LLaMA have a learned position table? Look into the names of the weights and give
# `True` or `False`.

# %%
answer = None
check(answer, lambda a: a == any("position" in path for path, _ in theirs.named_parameters()))

# %% [markdown]
# ## 6. Writing with a cache
#
# **Idea.** A model predicts one token, which is appended, and so on. The cache of notebook 01, now with one
# slab for each layer, keeps the turned keys and the values. A key is stored *after* its rotation: its
# position never changes.
#
# Greedy decoding takes the most likely token each time. If the twins are equal, they write the same text.


# %%
def write(model, prompt, count, array):
    """The prompt in one call, then token after token from the cache. Returns the tokens and all logits."""
    cache, seen, tokens = model.empty_cache(1, len(prompt) + count), [], list(prompt)
    new = tokens
    for _ in range(count):
        start = len(tokens) - len(new)
        positions = np.arange(start, len(tokens), dtype=np.int32)[None]
        logits, cache = model(array(np.array([new], np.int32)), array(positions), cache)
        seen.append(numbers(logits)[0])
        new = [int(seen[-1][-1].argmax())]
        tokens = tokens + new
    return tokens, np.concatenate(seen)


prompt = [3, 14, 15, 92, 65, 35]
text, stepwise = write(ours, prompt, 20, jnp.asarray)
with torch.no_grad():
    other_text, other_stepwise = write(theirs, prompt, 20, torch.tensor)
print("Flax   ", text[len(prompt) :])
print("PyTorch", other_text[len(prompt) :])
assert text == other_text
everything, _ = ours(jnp.asarray([text[:-1]]), jnp.arange(len(text) - 1)[None])
report("logits on the way, Flax against PyTorch", stepwise, other_stepwise)
report("logits on the way, against one full pass", stepwise, everything[0])

# %% [markdown]
# (The weights are random, so the text means nothing. It is the *same* nothing.)
#
# **Picture.** What the cache of each LLaMA 2 costs, in 2-byte numbers, per text. The largest model has the
# smallest cache: that is grouped-query attention at work.

# %%
figure, axis = plt.subplots(figsize=(7, 2.4))
lengths = np.array([512, 1024, 2048, 4096])
for name, c in shared.PRESETS.items():
    per_token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 2
    axis.plot(lengths, lengths * per_token / 2**30, "o-", label=f"{name}: {per_token // 1024} KiB per token")
axis.set(xlabel="tokens", ylabel="GiB", xticks=lengths)
axis.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# **Break it: lose count.** While decoding, every call brings one token, and it is tempting to give it
# position 0, its place in the call. Then each token overwrites slot 0, and every key claims to be the first.


# %%
def lost_count(prompt, count):
    cache, tokens = ours.empty_cache(1, 64), list(prompt)
    logits, cache = ours(jnp.asarray([tokens]), jnp.arange(len(tokens), dtype=jnp.int32)[None], cache)
    for _ in range(count):
        tokens.append(int(logits[0, -1].argmax()))
        logits, cache = ours(jnp.asarray([tokens[-1:]]), jnp.zeros((1, 1), jnp.int32), cache)
    return tokens, int((cache.positions >= 0).sum())


wrong_text, filled = lost_count(prompt, 20)
print("right", text[len(prompt) :])
print("wrong", wrong_text[len(prompt) :])
print(f"slots in use after {len(wrong_text)} tokens: {filled}")

# %% [markdown]
# ## 7. Meta's files, without fairscale
#
# **Idea.** Meta publishes LLaMA 2 cut into pieces, one file for each GPU of its own cluster:
# `consolidated.00.pth`, `consolidated.01.pth`, ... Its code starts as many processes as there are files, and
# the fairscale library makes them one model. But the cut is simple. A matrix is sliced along one axis;
# joining the slices along the same axis undoes it. One process can do that on any machine.
#
# Which axis? *Column-parallel* matrices share out their outputs, *row-parallel* ones their inputs. Norms are
# not cut: every file has a copy. The embedding is cut along its features.
#
# *Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053, section 3.*

# %% both: checkpoints.meta.AXES

# %% [markdown]
# **Picture.** One block, cut for four ranks. The two cuts of the MLP fit each other: what rank 2 computes
# with its slice of `w1` and `w3` is just what its slice of `w2` needs. The ranks have to talk only after
# `wo` and `w2`.

# %%
figure, axes = plt.subplots(1, 7, figsize=(8.5, 1.9))
for axis, name in zip(axes, ("wq", "wk", "wv", "wo", "w1", "w3", "w2"), strict=True):
    tall = name in ("w1", "w3")
    picture = np.zeros((44, 24) if tall else (24, 44) if name == "w2" else (24, 24))
    ranks = np.arange(picture.shape[shared.AXES[name]]) * 4 // picture.shape[shared.AXES[name]]
    picture[:] = ranks[:, None] if shared.AXES[name] == 0 else ranks[None, :]
    axis.imshow(picture, cmap="viridis", vmin=-0.5, vmax=3.5)
    axis.set(xticks=[], yticks=[], title=name)
axes[0].set(xlabel="inputs", ylabel="outputs")
plt.show()

# %% [markdown]
# **A checkpoint to practise on.** The next cell cuts our tiny model into two files in exactly Meta's layout:
# its names, its rotary pairs (neighbours), its `params.json`.

# %%
NAMES = {  # ours: Meta's
    "embed": "tok_embeddings",
    "norm": "norm",
    "lm_head": "output",
    "attn.q_proj": "attention.wq",
    "attn.k_proj": "attention.wk",
    "attn.v_proj": "attention.wv",
    "attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "attn_norm": "attention_norm",
    "mlp_norm": "ffn_norm",
}


def meta_name(path):
    """`layers.0.attn.q_proj.weight` is called `layers.0.attention.wq.weight`."""
    layer, module = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", path).groups(default="")
    return f"{layer}{NAMES[module]}.weight"


def axis_of(name):
    """Along which axis the ranks share out a tensor; None for a norm, which each has whole."""
    module = name.removesuffix(".weight").split(".")[-1]
    return 1 if module == "tok_embeddings" else shared.AXES.get(module)


def neighbours_from_halves(w, heads):
    return w.reshape(heads, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape)


scratch = tempfile.TemporaryDirectory()  # goes away with the kernel
folder = Path(scratch.name)
ranks = [{}, {}]
for path, parameter in theirs.named_parameters():
    name, tensor = meta_name(path), parameter.detach()
    if name.endswith(("wq.weight", "wk.weight")):
        tensor = neighbours_from_halves(tensor, 6 if "wq" in name else 2)
    axis = axis_of(name)
    for rank, piece in zip(ranks, [tensor] * 2 if axis is None else tensor.chunk(2, axis), strict=True):
        rank[name] = piece.clone()
for number, rank in enumerate(ranks):
    torch.save(rank, folder / f"consolidated.{number:02}.pth")
params = {
    "dim": 48,
    "n_layers": 3,
    "n_heads": 6,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": -1,
    "multiple_of": 8,
}
(folder / "params.json").write_text(json.dumps(params))
for name in (
    "layers.0.attention.wq.weight",
    "layers.0.attention.wo.weight",
    "layers.0.attention_norm.weight",
):
    print(f"{name:32} {[tuple(rank[name].shape) for rank in ranks]}")

# %% [markdown]
# **Reading it.** Some thirty lines, for any number of ranks. `weights_only=True` matters: a `.pth` file is a
# pickle, and a pickle may run code when it is opened. `mmap=True` leaves the numbers on the disk until they
# are wanted. The sizes of vocabulary and MLP, which `params.json` leaves open, are taken from the tensors.


# %%
def read_meta(folder):
    """A folder of Meta's: the configuration, and all tensors joined, under our names and in our order."""
    params = json.loads((folder / "params.json").read_text())
    files = sorted(folder.glob("consolidated.*.pth"))
    ranks = [torch.load(f, map_location="cpu", weights_only=True, mmap=True) for f in files]

    def joined(name):
        axis = axis_of(name)
        return ranks[0][name] if axis is None else torch.cat([rank[name] for rank in ranks], axis)

    heads = params["n_heads"]
    kv_heads = params.get("n_kv_heads") or heads
    config = shared.LlamaConfig(
        vocab_size=joined("tok_embeddings.weight").shape[0],
        hidden_size=params["dim"],
        intermediate_size=joined("layers.0.feed_forward.w1.weight").shape[0],
        num_hidden_layers=params["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=params["dim"] // heads,
        rms_norm_eps=params["norm_eps"],
        rope_theta=params.get("rope_theta", 10000.0),
        rope_scaling=None,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):  # shapes without memory: only the names are needed
        paths = [path for path, _ in pt.Llama(config).named_parameters()]
    weights = {path: joined(meta_name(path)) for path in paths}
    for path in paths:
        if path.endswith(("q_proj.weight", "k_proj.weight")):
            weights[path] = halves_from_neighbours(weights[path], heads if "q_proj" in path else kv_heads)
    return config, weights


def both_frameworks(config, weights, dtype):
    """The model in Flax and in PyTorch, from one dictionary of tensors."""
    theirs = pt.Llama(config, dtype=getattr(torch, dtype))
    theirs.load_state_dict(weights)
    ours = jx.Llama(config, dtype=getattr(jnp, dtype), rngs=nnx.Rngs(0))
    share(weights, ours)
    return ours, theirs


config, weights = read_meta(folder)
ours_again, theirs_again = both_frameworks(config, weights, "float64")
back, _ = ours_again(jnp.asarray(tokens), jnp.asarray(positions))
with torch.no_grad():
    other_back, _ = theirs_again(torch.tensor(tokens), torch.tensor(positions))
print(
    "the tensors are bit for bit those that were cut:",
    all(torch.equal(weights[p], w) for p, w in theirs.state_dict().items()),
)
report("logits from Meta's files, Flax", numbers(back)[real], numbers(logits)[real])
report("logits from Meta's files, PyTorch", numbers(other_back)[real], numbers(logits)[real])

# %% [markdown]
# **Break it: join along the wrong axis.** For most matrices the shapes would object. But `wo` is *square* in
# every LLaMA 2, and joining two halves of a square the wrong way gives a matrix of another shape only if one
# forgets to look. With the axis of `wq` used for `wo`, the result has the right *number* of elements, and
# one careless `reshape` later it loads:

# %%
pieces = [rank["layers.0.attention.wo.weight"] for rank in ranks]
wrong = dict(weights)
wrong["layers.0.attn.o_proj.weight"] = torch.cat(pieces, 0).reshape(48, 48)
broken, _ = both_frameworks(config, wrong, "float64")
bad, _ = broken(jnp.asarray(tokens), jnp.asarray(positions))
off = difference(numbers(bad)[real], numbers(logits)[real])
print(f"one of {len(weights)} tensors joined wrongly: logits off by {off:.0%}")

# %% [markdown]
# **Exercise 6.** The 70B model comes in eight files. What shape does `w2` have in each? Give a tuple
# (outputs, inputs).

# %%
answer = None
check(answer, lambda a: tuple(a) == (8192, 28672 // 8))

# %% [markdown]
# ## 8. A real checkpoint, if you have one
#
# Meta gives LLaMA 2 to those who ask for it. If you have such a folder (with `params.json` and
# `consolidated.*.pth`), set `LLAMA_CHECKPOINT` to its path before you start Jupyter. Both frameworks then
# hold the model at once, in bfloat16, so 7B needs about 30 GB of memory. The prompt is "The capital of
# France is" in LLaMA's tokens, spelled out as numbers to stay independent of a tokenizer. Token 3681 is
# "Paris".

# %%
if checkpoint := os.environ.get("LLAMA_CHECKPOINT"):
    config, weights = read_meta(Path(checkpoint))
    ours, theirs = both_frameworks(config, weights, "bfloat16")
    prompt = np.array([[1, 450, 7483, 310, 3444, 338]], np.int32)
    order = np.arange(prompt.shape[1], dtype=np.int32)[None]
    mine, _ = ours(jnp.asarray(prompt), jnp.asarray(order))
    with torch.no_grad():
        other, _ = theirs(torch.tensor(prompt), torch.tensor(order))
    print("Flax   ", numbers(mine.astype(jnp.float32))[0, -1].argsort()[-5:][::-1])
    print("PyTorch", other.float().numpy()[0, -1].argsort()[-5:][::-1])
else:
    print("LLAMA_CHECKPOINT is not set: nothing to load, and nothing missed.")

# %% [markdown]
# ## What you have now
#
# | part | what it is | the mistake to look for |
# |---|---|---|
# | RMSNorm | scale to length √D, no centring | statistics in half precision |
# | rotary positions | angles instead of sums | neighbours against halves; a default base; bfloat16 |
# | SwiGLU | one view gates another | gate and up exchanged |
# | grouped queries | K keys for N queries | `repeat` for `repeat_interleave` |
# | cache | turned keys, kept | positions that restart |
# | Meta's files | slices along one axis | the wrong axis, unordered rows |
#
# None of these mistakes raises an error. Each gives a model that runs, and is wrong. Comparing with an
# independent twin, in float64, over hundreds of positions, finds all of them.
