# %% [markdown]
# # Attention mechanisms, twice
#
# A sentence is a row of tokens. To understand one of them, a model has to look at the others. *Attention* is
# how it looks: every token asks a question, every token offers a label and some content, and the better a
# label fits the question, the more of its content is taken.
#
# This notebook builds that idea up, one piece at a time, and writes each piece **twice**: in JAX with Flax
# NNX, and in PyTorch. After each pair of cells the two are given the same weights and their outputs are
# compared in double precision. They agree to about fifteen digits, so what remains different between the
# cells is the framework and nothing else. That is the part worth reading closely.
#
# | section | what it adds | paper |
# |---|---|---|
# | 1 | scaled dot-product attention | Vaswani et al. 2017 |
# | 2 | self-attention, one head | Vaswani et al. 2017 |
# | 3 | causality and padding | Vaswani et al. 2017 |
# | 4 | many heads | Vaswani et al. 2017 |
# | 5 | the key-value cache | Shazeer 2019, Pope et al. 2022 |
# | 6 | multi-query attention | Shazeer 2019 |
# | 7 | grouped-query attention | Ainslie et al. 2023 |
# | 8 | sliding windows | Beltagy et al. 2020, Jiang et al. 2023 |
#
# Each section has the idea, the formula, the two cells, the measured difference, a picture, a cell that
# **breaks it** on purpose, and exercises. You need Python, some linear algebra, and `jax`, `flax`, `torch`,
# `numpy`, `matplotlib`. Everything here runs on a laptop in about a minute.
#
# **Letters used throughout.** B batch, T query length, S key length, D hidden size, N query heads, K
# key-value heads, H head dimension. A comment such as `# [B, T, N, H]` gives the shape at the end of its
# line.

# %% [markdown]
# ## Two modules in one notebook
#
# A Flax class and a PyTorch class of the same name cannot live in one namespace. So the next cell defines a
# cell magic. `%%twin jax` runs a cell inside a module called `jx`, `%%twin torch` inside a module called
# `pt`. Later we write `jx.attend` and `pt.attend` and always know which one we mean. `%%twin both` is for
# the little that needs no framework.

# %% magic

# %%
import time

import jax
import jax.numpy as jnp
import jx
import matplotlib.pyplot as plt
import numpy as np
import pt
import torch
from flax import nnx

jax.config.update("jax_platforms", "cpu")  # double precision is not at home on a TPU
jax.config.update("jax_enable_x64", True)  # without it, JAX turns every float64 into float32
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
print(f"jax {jax.__version__}, torch {torch.__version__.partition('+')[0]}")

# %% [markdown]
# Four small helpers. `share` is the whole conversion between the frameworks: the names are the same on both
# sides, and a PyTorch matrix is stored as [out, in] where Flax stores [in, out].


# %%
def share(theirs, ours):
    """Give a Flax module the weights of its PyTorch twin. Every weight must find its place."""
    weights = {name: tensor.detach().numpy() for name, tensor in theirs.named_parameters()}
    state = nnx.state(ours, nnx.Param)
    for path, leaf in nnx.to_flat_state(state):
        *owner, name = path
        array = weights.pop(".".join([*owner, "weight" if name == "kernel" else name]))
        leaf[...] = jnp.asarray(array.T if name == "kernel" else array)
    assert not weights, f"left over: {sorted(weights)}"
    nnx.update(ours, state)


def twins(name, *sizes, **options):
    """A module in both frameworks, in float64, with the same random weights: (Flax, PyTorch)."""
    torch.manual_seed(0)
    theirs = getattr(pt, name)(*sizes, **options, dtype=torch.float64)
    ours = getattr(jx, name)(*sizes, **options, dtype=jnp.float64, rngs=nnx.Rngs(0))
    share(theirs, ours)
    return ours, theirs


def difference(a, b):
    """The largest difference between two arrays, relative to the largest value."""
    a, b = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x) for x in (a, b))
    return np.abs(a - b).max() / np.abs(b).max()


def check(answer, is_right):
    """For the exercises."""
    print("not answered yet" if answer is None else "right!" if is_right(answer) else "not yet, try again")


# %% [markdown]
# Three pieces are needed by what follows without being its subject: an error that says what to do, a rule
# for precision, and dropout, which stays switched off here (it has its own section in notebook 02). Skim
# them.

# %% both: errors.UsageError

# %% twin: random.bits

# %% twin: layers.at_least_float32, layers.dropout

# %% [markdown]
# ## 1. Scaled dot-product attention
#
# **Idea.** A query $q$ is a question, a key $k$ is a label, and their dot product says how well they fit. A
# softmax turns the fits into shares that add up to one. The answer is the mean of the values $v$, weighted
# by these shares. It is a dictionary lookup that returns a blend instead of one entry, and so can be
# differentiated.
#
# $$\operatorname{Attention}(Q, K, V) = \operatorname{softmax}\!\left(\frac{QK^\top}{\sqrt{H}}\right) V$$
#
# Why the root? A dot product of $H$ independent terms of variance one has variance $H$. Without the
# division, wide heads give large scores, the softmax picks one winner, and its gradient vanishes.
#
# *Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, equation 1.*
#
# The code below is already general: `q` has N heads, `k` and `v` may have fewer (section 7), and `mask` says
# what may be seen (section 3). The first read can ignore both.

# %% twin: layers.attention_weights, layers.attend

# %% [markdown]
# **Measured.** The same random numbers go into both, and into the function that each framework ships. Three
# agree to the last digit. The fourth is honest about something its documentation is not loud about:
# `jax.nn.dot_product_attention` runs its softmax in float32 whatever it is given, so it knows seven digits.

# %%
rng = np.random.default_rng(0)
B, T, N, H = 2, 7, 3, 8
q, k, v = (rng.normal(size=(B, T, N, H)) for _ in range(3))
all_seen = np.ones((B, T, T), bool)

ours = jx.attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(all_seen))
theirs = pt.attend(*map(torch.tensor, (q, k, v, all_seen)))
library_jax = jax.nn.dot_product_attention(*map(jnp.asarray, (q, k, v)))
heads_first = (torch.tensor(x).transpose(1, 2) for x in (q, k, v))  # torch wants [B, N, T, H]
library_torch = torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)

for name, result, limit in (
    ("PyTorch", theirs, 1e-12),
    ("torch.nn.functional", library_torch, 1e-12),
    ("jax.nn", library_jax, 1e-6),
):
    print(f"Flax against {name:20} {difference(ours, result):.1e}")
    assert difference(ours, result) < limit

# %% [markdown]
# **Picture.** The keys are points on a circle, and the query turns. The weights follow it: a soft pointer.

# %%
angles = 2 * np.pi * np.arange(12) / 12
around = np.stack([np.cos(angles), np.sin(angles)], -1)[None, :, None] * 3  # [1, 12, 1, 2]
weights = jx.attention_weights(jnp.asarray(around), jnp.asarray(around), jnp.ones((1, 12, 12), bool))[0, 0]

figure, axes = plt.subplots(1, 3, figsize=(8, 2.4), subplot_kw={"projection": "polar"})
for axis, i in zip(axes, (0, 2, 7), strict=True):
    axis.bar(angles, weights[i], width=0.4, color="C0")
    axis.annotate("", (angles[i], 0.38), (0, 0), arrowprops={"arrowstyle": "->", "color": "C3", "lw": 2})
    axis.set(xticks=[], yticks=[], ylim=(0, 0.4), title=f"query at {np.degrees(angles[i]):.0f}°")
plt.show()

# %% [markdown]
# **Break it: forget the scale.** For random queries and keys, how large is the largest weight, and how much
# gradient reaches the scores? A softmax passes back at most $w(1-w)$ through a weight $w$.

# %%
sizes = [4, 16, 64, 256, 1024]
largest, gradient = {}, {}
for name, scale in {"divided by √H": None, "not divided": 1.0}.items():
    largest[name], gradient[name] = [], []
    for size in sizes:
        q, k = (jnp.asarray(rng.normal(size=(1, 64, 1, size))) for _ in range(2))
        q = q if scale is None else q * size**0.5  # undoes the division inside
        weights = jx.attention_weights(q, k, jnp.ones((1, 64, 64), bool))
        largest[name].append(float(weights.max(-1).mean()))
        gradient[name].append(float((weights * (1 - weights)).sum(-1).mean()))

figure, axes = plt.subplots(1, 2, figsize=(8, 2.4))
for axis, data, title in zip(
    axes, (largest, gradient), ("largest weight", "gradient let through"), strict=True
):
    for name, values in data.items():
        axis.semilogx(sizes, values, "o-", label=name)
    axis.set(title=title, xlabel="head dimension H", ylim=(0, 1.05), xticks=sizes, xticklabels=sizes)
    axis.minorticks_off()
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# Unscaled, the largest weight climbs towards one: attention has become a hard choice, and learning stops
# where the right-hand curve ends. Scaled, nothing depends on H.
#
# **Exercise 1.** Shuffle the keys and the values, both by the same permutation. What happens to the output?
# Set `answer` to `"the same"`, `"shuffled"` or `"something else"`.

# %%
answer = None


def shuffled_output():
    q, k, v = (jnp.asarray(rng.normal(size=(1, 6, 1, 4))) for _ in range(3))
    order, seen = rng.permutation(6), jnp.ones((1, 6, 6), bool)
    return jx.attend(q, k, v, seen), jx.attend(q, k[:, order], v[:, order], seen)


check(answer, lambda a: (a == "the same") == (difference(*shuffled_output()) < 1e-12))

# %% [markdown]
# This is why transformers need positions: attention alone sees a bag of tokens. Notebook 02 adds them.
#
# ## 2. Self-attention, one head
#
# **Idea.** Where do queries, keys and values come from? In *self*-attention all three come from the same
# tokens, by three learned matrices. A fourth one mixes the result back.
#
# $$Q = xW_Q \qquad K = xW_K \qquad V = xW_V \qquad y = \operatorname{Attention}(Q, K, V)\, W_O$$
#
# *Vaswani et al. 2017, section 3.2.*
#
# Before the module comes `visible`, the rule for who may see whom; section 3 is about it.

# %% twin: layers.visible

# %% [markdown]
# **What differs below.** In Flax a layer takes an explicit source of randomness, `rngs`; PyTorch draws from
# a global generator. PyTorch's `super().__init__()` prepares the registry into which submodules go.
# `nnx.Linear` calls its matrix `kernel` and stores [in, out]; `nn.Linear` calls it `weight` and stores [out,
# in]. And a Flax module is called through `__call__`, a PyTorch module through `forward`. The mathematics is
# the same, line for line.

# %% [markdown]
# A product makes one axis of all but the last, so that its gradient sums over one axis: over two, XLA would
# copy both operands on a CPU. PyTorch takes them together itself, but is told in which order to multiply: for
# few rows a CPU reads the weight three times as fast when it stands on the left.

# %% twin: layers.Linear

# %% twin: attention.SelfAttention

# %%
ours, theirs = twins("SelfAttention", 24, 8, causal=False, use_bias=True)
x, positions = rng.normal(size=(2, 9, 24)), np.tile(np.arange(9, dtype=np.int32), (2, 1))


def measure(ours, theirs, x, positions):
    """The outputs of both twins for one input, after comparing outputs and weights."""
    for method in ("__call__", "weights"):
        mine = getattr(ours, method)(jnp.asarray(x), jnp.asarray(positions))
        other = getattr(theirs, method)(torch.tensor(x), torch.tensor(positions))
        print(f"{type(ours).__name__} {method:8}  Flax against PyTorch {difference(mine, other):.1e}")
        assert difference(mine, other) < 1e-12
    return ours(jnp.asarray(x), jnp.asarray(positions)), theirs(torch.tensor(x), torch.tensor(positions))


_ = measure(ours, theirs, x, positions)

# %% [markdown]
# **Picture.** With chosen weights instead of learned ones, a head becomes a tool. Let every letter be a
# random vector and let $W_Q$ and $W_K$ both be the identity. A token then asks for itself, and the head
# finds equal letters.

# %%
word = "abracadabra"
letters = {letter: rng.normal(size=24) for letter in sorted(set(word))}
x = jnp.asarray(np.stack([letters[c] for c in word])[None])  # [1, T, D]
positions = jnp.arange(len(word))[None]
finder = jx.SelfAttention(24, 24, causal=False, dtype=jnp.float64, rngs=nnx.Rngs(0))
finder.q_proj.kernel[...] = finder.k_proj.kernel[...] = jnp.eye(24)


def maps(panels, rows="", columns="", size=2.6, vmax=1.0):
    """Attention maps side by side: a row is a query, a column a key, dark is much."""
    figure, axes = plt.subplots(1, len(panels), figsize=(size * len(panels), size), squeeze=False)
    for axis, (title, weights) in zip(axes[0], panels.items(), strict=True):
        axis.imshow(np.asarray(weights, float), cmap="Blues", vmin=0, vmax=vmax)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows)
        axis.tick_params(length=0, labelsize=8)
        height, width = weights.shape
        axis.hlines(np.arange(height - 1) + 0.5, -0.5, width - 0.5, "white", lw=0.5)
        axis.vlines(np.arange(width - 1) + 0.5, -0.5, height - 0.5, "white", lw=0.5)
        if not columns:
            axis.set(xticks=[], yticks=[], xlabel="key", ylabel="query")
    plt.tight_layout()
    plt.show()


maps({"who finds whom": finder.weights(x, positions)[0]}, word, word, size=3.2, vmax=0.5)

# %% [markdown]
# **Break it: softmax along the wrong axis.** Shares must add up to one over the *keys*. Normalise over the
# queries instead and nothing crashes: shapes fit, numbers look sane, a network may even train on it, badly.

# %%
scores = finder.q_proj(x) @ finder.k_proj(x).swapaxes(1, 2) / 24**0.5
right, wrong = jax.nn.softmax(scores, axis=-1)[0], jax.nn.softmax(scores, axis=-2)[0]
print("what one query takes in all, right:", np.round(right.sum(-1), 2))
print("what one query takes in all, wrong:", np.round(wrong.sum(-1), 2))
maps({"over keys": right, "over queries (wrong)": wrong}, word, word, vmax=0.5)

# %% [markdown]
# **Exercise 2.** `finder` looks for equal letters. Change `W_K` so that it looks *away* from equal letters:
# a token should give its own letter the smallest weight. Write the 24 × 24 matrix.

# %%
answer = None  # for instance: some multiple of jnp.eye(24)


def looks_away(kernel):
    finder.k_proj.kernel[...] = kernel
    weights = np.asarray(finder.weights(x, positions)[0])
    same = np.array([[a == b for b in word] for a in word])
    finder.k_proj.kernel[...] = jnp.eye(24)
    return all(weights[i][same[i]].max() < weights[i][~same[i]].min() for i in range(len(word)))


check(answer, looks_away)

# %% [markdown]
# ## 3. Causality and padding
#
# **Idea.** A model that writes text must not read ahead: token $t$ may use tokens up to $t$. And where
# sentences of different length share a batch, the filling must not be read at all. Both are one rule about
# **positions**. Each token carries its position in its own sentence, and filling carries -1:
#
# $$\text{key } s \text{ is visible to query } t \iff p_s \ge 0 \;\text{ and }\; p_s \le p_t$$
#
# What is not visible gets the lowest score there is, and the softmax gives it exactly zero. Filling may
# stand on the left, on the right or in between; there is no second code path. That is `visible`, above.
# Without `causal` the second condition falls away.
#
# *Vaswani et al. 2017, section 3.2.3.*
#
# **Picture.** Four masks. Dark may be seen.

# %%
plain, right_padded, left_padded = range(6), [0, 1, 2, 3, -1, -1], [-1, -1, 0, 1, 2, 3]
panels = {
    "both directions": (plain, False),
    "causal": (plain, True),
    "causal, padded right": (right_padded, True),
    "causal, padded left": (left_padded, True),
}


def mask(positions, causal):
    positions = jnp.asarray([list(positions)])
    return jx.visible(positions, positions, causal=causal)[0]


maps({title: mask(*arguments) for title, arguments in panels.items()}, size=2.2)

# %% [markdown]
# **Measured.** First both twins, causal and padded. Then the two promises: the future does not leak, and
# padding does not matter. The answers are exact zeros or rounding, nothing between.

# %%
ours, theirs = twins("SelfAttention", 24, 8, causal=True)
x = rng.normal(size=(1, 6, 24))
positions = np.arange(6, dtype=np.int32)[None]
base, _ = measure(ours, theirs, x, positions)

changed = x.copy()
changed[:, -1] += 10.0  # another last token
moved = ours(jnp.asarray(changed), jnp.asarray(positions))
print(f"the last token changed; earlier outputs move by {np.abs(moved - base)[:, :-1].max()}")

filled = np.concatenate([rng.normal(size=(1, 3, 24)), x], axis=1)  # three tokens of rubbish on the left
shifted = np.concatenate([np.full((1, 3), -1, np.int32), positions], axis=1)
padded, _ = measure(ours, theirs, filled, shifted)
print(f"padding on the left; outputs of real tokens move by {difference(padded[:, 3:], base):.1e}")
assert np.abs(moved - base)[:, :-1].max() == 0 and difference(padded[:, 3:], base) < 1e-12

# %% [markdown]
# **Break it: count the padding.** The classic mistake is to number the columns of the batch, 0, 1, 2, ...,
# as if the filling were text. Nothing fails. Every real token now also listens to rubbish.

# %%
columns = np.arange(9, dtype=np.int32)[None]
leaky = ours(jnp.asarray(filled), jnp.asarray(columns))
print(f"outputs of real tokens are off by {difference(leaky[:, 3:], base):.0%} of their size")
maps(
    {
        "positions from -1": ours.weights(jnp.asarray(filled), jnp.asarray(shifted))[0],
        "columns counted (wrong)": ours.weights(jnp.asarray(filled), jnp.asarray(columns))[0],
    },
    size=2.8,
)

# %% [markdown]
# The first three rows on the left are the filling's own: they see nothing, get equal weights everywhere, and
# nobody reads them. (The two frameworks' own fused functions disagree about such rows: one returns zeros,
# the other a mean. Never compare what means nothing.)
#
# **Exercise 3.** With six tokens and no padding, how many pairs (query, key) may be seen causally?

# %%
answer = None
check(answer, lambda a: a == int(mask(range(6), True).sum()))

# %% [markdown]
# ## 4. Many heads
#
# **Idea.** One softmax makes one blend. A token may want two things at once, say its verb *and* the word
# before it. So attention runs N times in parallel on slices of H dimensions, and the results are laid side
# by side.
#
# $$\text{head}_n = \operatorname{Attention}(xW_Q^{(n)}, xW_K^{(n)}, xW_V^{(n)}) \qquad
# y = [\text{head}_1; \dots; \text{head}_N]\, W_O$$
#
# The N small matrices are stored as one: a single product, then a reshape. With $N \cdot H = D$ the cost is
# that of one wide head.
#
# *Vaswani et al. 2017, section 3.2.2.*

# %% twin: attention.MultiHeadAttention

# %%
D, N, H, T = 24, 4, 5, 9  # N times H need not be D
ours, theirs = twins("MultiHeadAttention", D, N, H, causal=True, use_bias=True)
x, positions = rng.normal(size=(2, T, D)), np.tile(np.arange(T, dtype=np.int32), (2, 1))
_ = measure(ours, theirs, x, positions)

# %% [markdown]
# **A second witness.** PyTorch ships `nn.MultiheadAttention`. It wants $N \cdot H = D$ and stores the three
# matrices as one. With the weights put there, it must say what ours says.

# %%
ours, theirs = twins("MultiHeadAttention", D, 4, 6, causal=True, use_bias=True)
library = torch.nn.MultiheadAttention(D, 4, batch_first=True, dtype=torch.float64)
with torch.no_grad():
    rows = [theirs.q_proj, theirs.k_proj, theirs.v_proj]
    library.in_proj_weight.copy_(torch.cat([r.weight for r in rows]))
    library.in_proj_bias.copy_(torch.cat([r.bias for r in rows]))
    library.out_proj.load_state_dict(theirs.o_proj.state_dict())
t = torch.tensor(x)
result, library_weights = library(
    t, t, t, attn_mask=torch.ones(T, T, dtype=torch.bool).triu(1), average_attn_weights=False
)
print(f"outputs: {difference(ours(jnp.asarray(x), jnp.asarray(positions)), result):.1e}")
print(f"weights: {difference(ours.weights(jnp.asarray(x), jnp.asarray(positions)), library_weights):.1e}")
assert difference(ours(jnp.asarray(x), jnp.asarray(positions)), result) < 1e-12

# %% [markdown]
# **Picture.** The four heads of our random layer look at the same tokens differently before any training:
# more heads, more points of view.

# %%
weights = ours.weights(jnp.asarray(3 * x), jnp.asarray(positions))[0]  # 3: louder input, sharper maps
maps({f"head {n}": weights[n] for n in range(4)}, size=2.2)

# %% [markdown]
# **Break it: cut the heads the wrong way.** The product has shape [B, T, N·H]. The right cut is `reshape(B,
# T, N, H)`. Going to `(B, N, T, H)` in one reshape has the same number of elements, so nothing complains.
# But memory is read in order, and a "head" then holds other tokens. Here each row is a place in a head, and
# its shade says which token really stands there.

# %%
q = ours.q_proj(jnp.asarray(x))  # [B, T, N*H]
right, wrong = q.reshape(2, T, 4, 6).swapaxes(1, 2), q.reshape(2, 4, T, 6)  # [B, N, T, H], both of them
owner = jnp.broadcast_to(jnp.arange(1, T + 1)[:, None] / T, (T, 24))  # which token an element belongs to
maps(
    {
        "right: every head": owner.reshape(T, 4, 6)[:, 0],
        "wrong: 'head' 0": owner.reshape(4, T, 6)[0],
        "wrong: 'head' 3": owner.reshape(4, T, 6)[3],
    },
    size=2.4,
)
print(f"elements that end up in the wrong place: {np.mean(np.asarray(right != wrong)):.0%}")

# %% [markdown]
# Cut rightly, a head has one row for each of the nine tokens. Cut wrongly, "head 0" holds the first three
# tokens and "head 3" the last three. Row $t$ is no longer token $t$, so the causal mask hides the wrong
# things, and no two tokens far apart ever meet.
#
# **Exercise 4.** Switch head 2 off without touching the other heads' work. `o_proj.kernel` has shape [N·H,
# D]. Which of its rows must be zero? Give a `slice`.

# %%
answer = None  # slice(first, last + 1)


def head_is_off(rows):
    changed, _ = twins("MultiHeadAttention", D, 4, 6, causal=True, use_bias=True)
    changed.o_proj.kernel[...] = changed.o_proj.kernel[...].at[rows].set(0.0)
    inputs = jnp.asarray(x), jnp.asarray(positions)
    before = changed(*inputs)
    changed.v_proj.kernel[...] = (
        changed.v_proj.kernel[...].at[:, 12:18].add(1.0)
    )  # head 2 says something else
    off = difference(changed(*inputs), before) == 0
    changed.v_proj.kernel[...] = changed.v_proj.kernel[...].at[:, :12].add(1.0)  # so do heads 0 and 1
    return off and difference(changed(*inputs), before) > 0


check(answer, head_is_off)

# %% [markdown]
# ## 5. The key-value cache
#
# **Idea.** To write a text, a model adds one token at a time. Run naively, step $t$ computes keys and values
# for all $t$ tokens again. But a causal token never looks ahead, so its key and value are final once
# computed. Keep them. Then a step brings one new token, computes one query, key and value, and reads the
# rest.
#
# $$\text{without: } \sum_{t=1}^{T} O(t)\ \text{projections} \qquad \text{with: } T\ \text{projections}$$
#
# *Used since the first transformers; its cost is analysed in Shazeer 2019 (arXiv:1911.02150) and Pope et al.
# 2022 (arXiv:2211.05102).*
#
# Our cache is two arrays and a memory of positions. A token at position $p$ lies in slot $p \bmod S$. The
# cache remembers the position in each slot, -1 where nothing is, so `visible` does all the masking as
# before. One more slot, the last, takes what must not be kept, such as padding.

# %% twin: layers.KVCache, layers.empty_cache, layers.place, layers.store

# %% [markdown]
# **What differs.** JAX arrays cannot be changed: `.at[...].set(...)` returns a new one (the compiler writes
# in place where it can). PyTorch writes into the tensor. So that both read the same, every call *returns*
# the cache, and the caller rebinds it: `y, cache = module(x, positions, cache)`.

# %% twin: attention.CachedMultiHeadAttention

# %% [markdown]
# **Measured: cached equals full.** One pass over twelve tokens, against the same tokens in chunks of 1, 5
# and 7. One of the two rows is padded on the left.

# %%
ours, theirs = twins("CachedMultiHeadAttention", D, N, H)
T = 12
x = rng.normal(size=(2, T, D))
positions = np.stack([np.arange(T), np.arange(T) - 4]).clip(-1).astype(np.int32)  # row 1: four of padding
real = positions >= 0


def in_chunks(module, x, positions, size, length=T):
    """The outputs of a cached module that is given `size` tokens at a time."""
    cache, outputs = module.empty_cache(2, length), []
    for start in range(0, x.shape[1], size):
        y, cache = module(x[:, start : start + size], positions[:, start : start + size], cache)
        outputs.append(np.asarray(y.detach() if isinstance(y, torch.Tensor) else y))
    return np.concatenate(outputs, axis=1)


for name, module, array in (("Flax", ours, jnp.asarray), ("PyTorch", theirs, torch.tensor)):
    full, _ = module(array(x), array(positions))
    full = np.asarray(full.detach() if name == "PyTorch" else full)
    for size in (1, 5, 7):
        found = difference(in_chunks(module, array(x), array(positions), size)[real], full[real])
        print(f"{name:8} chunks of {size}: {found:.1e}")
        assert found < 1e-12

# %% [markdown]
# **Picture: time per token.** One layer writes on. Without a cache it computes everything again for each
# token. (The times are this machine's, and a busy machine's at that. Look at the shapes of the curves.)

# %%
slow = pt.CachedMultiHeadAttention(256, num_heads=8, head_dim=32)
fast = jx.CachedMultiHeadAttention(256, num_heads=8, head_dim=32, rngs=nnx.Rngs(0))
share(slow, fast)
graph, state = nnx.split(fast)  # a pure function of its weights is what jit likes best
step = jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs))


def milliseconds(run):
    """The best of several runs, after one that compiles and warms up."""
    run()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds)


@torch.no_grad()
def time_per_token(length):
    """Milliseconds for token number `length`, in four ways."""
    x, positions = np.ones((1, length, 256), np.float32), np.arange(length, dtype=np.int32)[None]
    last, torch_last = (
        (x[:, -1:], positions[:, -1:]),
        (torch.ones(1, 1, 256), torch.tensor(positions[:, -1:])),
    )
    everything, torch_cache = (torch.tensor(x), torch.tensor(positions)), slow.empty_cache(1, 1024)
    cache = fast.empty_cache(1, 1024)
    return {
        "Flax, everything again": milliseconds(lambda: step(state, x, positions)[0].block_until_ready()),
        "Flax, cached": milliseconds(lambda: step(state, *last, cache)[0].block_until_ready()),
        "PyTorch, everything again": milliseconds(lambda: slow(*everything)),
        "PyTorch, cached": milliseconds(lambda: slow(*torch_last, torch_cache)),
    }


lengths = [64, 256, 512, 1024]
times = [time_per_token(length) for length in lengths]
figure, axis = plt.subplots(figsize=(6, 2.8))
for name in times[0]:
    style = {"color": "C0" if "Flax" in name else "C1", "linestyle": "-" if "cached" in name else "--"}
    axis.loglog(lengths, [t[name] for t in times], marker="o", label=name, **style)
axis.set(xlabel="tokens so far", ylabel="ms for the next token", xticks=lengths, xticklabels=lengths)
axis.minorticks_off()
axis.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# **Break it: forget to rebind.** In JAX a call cannot change the cache you hold. Ignore what it returns, and
# every step sees an empty past. In PyTorch the same mistake goes unnoticed, since the tensors were written
# in place. Code that is ported from one to the other meets this on its first day.


# %%
def forgetful(module, x, positions, array):
    cache, outputs = module.empty_cache(2, T), []
    for t in range(T):
        y, _ = module(
            array(x[:, t : t + 1]), array(positions[:, t : t + 1]), cache
        )  # the new cache is dropped
        outputs.append(np.asarray(y.detach() if isinstance(y, torch.Tensor) else y))
    return np.concatenate(outputs, axis=1)


full, _ = ours(jnp.asarray(x), jnp.asarray(positions))
for name, module, array in (("Flax", ours, jnp.asarray), ("PyTorch", theirs, torch.tensor)):
    wrong = forgetful(module, x, positions, array)
    print(f"{name:8} off by {difference(wrong[real], np.asarray(full)[real]):.1e}")

# %% [markdown]
# **Exercise 5.** A model has 32 layers, 32 heads of dimension 128, and keeps its cache in 2-byte numbers.
# How many bytes does it keep *per token*? Keys and values both count.

# %%
answer = None
check(answer, lambda a: a == 2 * 32 * 32 * 128 * 2)

# %% [markdown]
# ## 6. Multi-query attention
#
# **Idea.** That cache is large, and each step must read all of it. Reading memory, not computing, is what
# makes writing slow. Shazeer's remedy is blunt: keep N queries, but only **one** key and **one** value for
# all heads. The cache becomes N times smaller. Heads still ask different questions; they ask them of the
# same labels.
#
# $$\text{head}_n = \operatorname{Attention}(xW_Q^{(n)}, xW_K, xW_V)$$
#
# *Shazeer 2019, "Fast Transformer Decoding: One Write-Head is All You Need", arXiv:1911.02150.*

# %% twin: attention.MultiQueryAttention

# %%
T = 9
x, positions = rng.normal(size=(2, T, D)), np.tile(np.arange(T, dtype=np.int32), (2, 1))
ours, theirs = twins("MultiQueryAttention", D, N, H, causal=True)
_ = measure(ours, theirs, x, positions)
full_size = sum(p.numel() for p in twins("MultiHeadAttention", D, N, H, causal=True)[1].parameters())
print(f"parameters: {full_size} with N keys, {sum(p.numel() for p in theirs.parameters())} with one")

# %% [markdown]
# **Break it: share the queries as well.** If one key saves memory, why not one query too? Then all heads ask
# the same question and get the same answer. N heads have become one.

# %%
collapsed, _ = twins("MultiQueryAttention", D, N, H, causal=True)
collapsed.q_proj.kernel[...] = jnp.tile(collapsed.q_proj.kernel[...][:, :H], N)  # the first head's, N times
for name, module in (("queries of their own", ours), ("shared queries", collapsed)):
    weights = module.weights(jnp.asarray(3 * x), jnp.asarray(positions))[0]  # [N, T, S]
    print(f"{name:22} heads differ by up to {np.abs(weights - weights[:1]).max():.2f}")
    maps({f"head {n}": weights[n] for n in range(N)}, size=1.9)

# %% [markdown]
# ## 7. Grouped-query attention
#
# **Idea.** One key for all heads saves the most and costs some quality. N keys do the opposite. Between them
# lies a dial: K keys and values, each shared by a *group* of N/K query heads. LLaMA 2 70B has 64 query heads
# and turns the dial to 8.
#
# $$\text{head}_n = \operatorname{Attention}(xW_Q^{(n)}, xW_K^{(g)}, xW_V^{(g)})
# \qquad g = \lfloor n K / N \rfloor$$
#
# *Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
# Checkpoints", arXiv:2305.13245.*

# %% twin: attention.GroupedQueryAttention

# %% [markdown]
# **Measured, three times.** The twins agree. With K = N this *is* multi-head attention, and with K = 1 it
# *is* multi-query attention: the same weights give the same numbers.

# %%
N = 6
ours, theirs = twins("GroupedQueryAttention", D, N, 2, H, causal=True)
_ = measure(ours, theirs, x, positions)
for name, kv_heads in (("MultiHeadAttention", N), ("MultiQueryAttention", 1)):
    special, _ = twins(name, D, N, H, causal=True)
    general, _ = twins("GroupedQueryAttention", D, N, kv_heads, H, causal=True)
    nnx.update(general, nnx.state(special))  # the shapes fit: nothing is converted
    inputs = jnp.asarray(x), jnp.asarray(positions)
    print(f"K = {kv_heads} against {name}: {difference(general(*inputs), special(*inputs)):.1e}")
    assert difference(general(*inputs), special(*inputs)) < 1e-12

# %% [markdown]
# **Picture: what the dial buys.** The cache of a model as large as LLaMA 2 70B (80 layers, heads of 128) for
# one text of 4096 tokens, in 2-byte numbers.

# %%
kv_heads = [1, 2, 4, 8, 16, 32, 64]
gibibytes = [2 * 80 * 4096 * K * 128 * 2 / 2**30 for K in kv_heads]
figure, axis = plt.subplots(figsize=(6, 2.6))
bars = axis.bar(range(7), gibibytes, color=["C2", *["C0"] * 5, "C3"])
axis.bar_label(bars, [f"{g:.2g}" for g in gibibytes], fontsize=8)
axis.set_xticks(range(7), [f"{K}" for K in kv_heads])
axis.set(xlabel="key-value heads K (1: multi-query, 64: multi-head, 8: LLaMA 2 70B)", ylabel="cache, GiB")
plt.show()

# %% [markdown]
# **Break it: repeat or tile?** Groups are neighbours: heads 0, 1 and 2 read the first key, heads 3, 4 and 5
# the second. To write that with equal head counts one must *repeat* each key, as in 0 0 0 1 1 1. *Tiling*
# gives 0 1 0 1 0 1. Both have the right shape, and only one loads a checkpoint correctly. `jnp.repeat`
# repeats, but `torch.Tensor.repeat` **tiles**; what repeats is `torch.repeat_interleave`. The names have
# tricked many ports.

# %%
q = torch.tensor(x) @ theirs.q_proj.weight.T
k, v = (torch.tensor(x) @ p.weight.T for p in (theirs.k_proj, theirs.v_proj))
q, k, v = q.reshape(2, T, N, H), k.reshape(2, T, 2, H), v.reshape(2, T, 2, H)
seen = pt.visible(torch.tensor(positions), torch.tensor(positions))
grouped = pt.attend(q, k, v, seen)
for name, spread in {
    "repeat_interleave(3, dim=2)": lambda t: t.repeat_interleave(3, dim=2),
    "repeat(1, 1, 3, 1)": lambda t: t.repeat(1, 1, 3, 1),
}.items():
    print(f"{name:28} off by {difference(pt.attend(q, spread(k), spread(v), seen), grouped):.1e}")

# %% [markdown]
# **From many heads to few.** Ainslie et al. do not train grouped models from nothing. They take a multi-head
# checkpoint and put the *mean* of each group's key and value heads in their place, then train a little more.
# The mean is the best single stand-in, but it is no free lunch. Here is what it costs our untrained layer,
# whose heads have nothing in common:

# %%
many, _ = twins("MultiHeadAttention", D, 12, H, causal=True)
inputs = jnp.asarray(x), jnp.asarray(positions)


def pooled(kv_heads):
    """The same layer with its key and value heads averaged in groups."""
    few = jx.GroupedQueryAttention(D, 12, kv_heads, H, causal=True, dtype=jnp.float64, rngs=nnx.Rngs(0))
    few.q_proj.kernel[...], few.o_proj.kernel[...] = many.q_proj.kernel[...], many.o_proj.kernel[...]
    for name in ("k_proj", "v_proj"):
        heads = getattr(many, name).kernel[...].reshape(D, kv_heads, 12 // kv_heads, H)
        getattr(few, name).kernel[...] = heads.mean(axis=2).reshape(D, kv_heads * H)
    return few(*inputs)


choices = [1, 2, 3, 4, 6, 12]
errors = [np.linalg.norm(pooled(K) - many(*inputs)) / np.linalg.norm(many(*inputs)) for K in choices]
figure, axis = plt.subplots(figsize=(6, 2.2))
axis.plot(choices, errors, "o-")
axis.set(
    xlabel="key-value heads kept, of 12",
    ylabel="relative change of the output",
    xticks=choices,
    ylim=(0, None),
)
plt.show()

# %% [markdown]
# **Exercise 6.** If the heads of each group were equal to begin with, what would pooling change? Give the
# number.

# %%
answer = None
check(answer, lambda a: a == 0)

# %% [markdown]
# ## 8. Sliding windows
#
# **Idea.** In a long text most of what matters is near. So let each token see only the last W positions.
# Work and memory per token then stop growing: W, however long the text. Nothing is out of reach, since
# layers add up: what one layer brings W − 1 tokens closer, the next brings W − 1 closer still.
#
# $$\text{key } s \text{ is visible} \iff 0 \le p_s \;\text{ and }\; p_t - W < p_s \le p_t$$
#
# *Beltagy et al. 2020 (Longformer), arXiv:2004.05150; Jiang et al. 2023 (Mistral), arXiv:2310.06825.*
#
# The code is the line in `visible` that compares the distance with `window`. Every class above takes it.
#
# **Picture.** Who sees whom with W = 3; and whose words can have reached whom after two and four layers.

# %%
near = np.asarray(jx.visible(jnp.arange(16)[None], jnp.arange(16)[None], 3)[0], int)
reach = {f"{n} layer{'s' * (n > 1)}": np.linalg.matrix_power(near, n) > 0 for n in (1, 2, 4)}
maps(reach, size=2.4)

# %% [markdown]
# **Measured.** The twins, and the function that each framework ships. JAX's states a window by what lies
# left and right of a token (and knows seven digits, as in section 1); PyTorch's takes any mask.

# %%
T, W = 20, 4
x, positions = rng.normal(size=(2, T, D)), np.tile(np.arange(T, dtype=np.int32), (2, 1))
ours, theirs = twins("MultiHeadAttention", D, 4, 6, causal=True, window=W)
windowed, _ = measure(ours, theirs, x, positions)
q, k, v = (p(jnp.asarray(x)).reshape(2, T, 4, 6) for p in (ours.q_proj, ours.k_proj, ours.v_proj))
library_jax = jax.nn.dot_product_attention(q, k, v, local_window_size=(W - 1, 0))
t, s = np.arange(T)[:, None], np.arange(T)
heads_first = (torch.tensor(np.asarray(a)).transpose(1, 2) for a in (q, k, v))
library_torch = torch.nn.functional.scaled_dot_product_attention(
    *heads_first, attn_mask=torch.tensor((s <= t) & (t - W < s))
).transpose(1, 2)
for name, result, limit in (("torch.nn.functional", library_torch, 1e-12), ("jax.nn", library_jax, 1e-6)):
    found = difference(windowed, ours.o_proj(jnp.asarray(np.asarray(result)).reshape(2, T, -1)))
    print(f"against {name:20} {found:.1e}")
    assert found < limit

# %% [markdown]
# **A cache that forgets.** With a window, slot $p \bmod S$ pays off: with S = W slots, a new token lands on
# the one that nobody can see any more. Twenty tokens through a cache of four slots, one at a time, equal the
# full pass. Bring several tokens at once and the cache needs room for them, W + T − 1 slots. If it has too
# few, the call says so.

# %%
ours, theirs = twins("CachedMultiHeadAttention", D, N, H, window=W)
for name, module, array in (("Flax", ours, jnp.asarray), ("PyTorch", theirs, torch.tensor)):
    full, _ = module(array(x), array(positions))
    for size, length in ((1, W), (5, W + 4)):
        found = difference(in_chunks(module, array(x), array(positions), size, length), full)
        print(f"{name:8} {size} at a time, {length} slots: {found:.1e}")
        assert found < 1e-12
try:
    in_chunks(ours, jnp.asarray(x), jnp.asarray(positions), 5, W)
except jx.UsageError as error:
    print(f"\n5 at a time, {W} slots:\n{error}")

# %% [markdown]
# **Break it: off by one.** Does "a window of 4" include the token itself? Here it does: W positions in all.
# A port that means "4 before it" sees one key more. Short tests never notice: up to W tokens, both are the
# same.

# %%
wrong, _ = twins("MultiHeadAttention", D, 4, 6, causal=True, window=W + 1)
error = np.abs(wrong(jnp.asarray(x), jnp.asarray(positions)) - windowed).max(axis=(0, 2))
figure, axis = plt.subplots(figsize=(6, 2.0))
axis.bar(range(T), error, color="C3")
axis.axvline(W - 0.5, color="0.6", linestyle=":")
axis.set(xlabel="position", ylabel="error", title="one key too many", xticks=range(0, T, 4))
plt.show()
print(f"first {W} positions: {error[:W].max()}; the rest: {error[W:].max():.2f}")

# %% [markdown]
# **Exercise 7.** With a window of W = 4096 and 32 layers (Mistral 7B), how far back can a word reach at
# most? Count the distance in positions.

# %%
answer = None
check(answer, lambda a: a == 32 * (4096 - 1))

# %% [markdown]
# ## What you have now
#
# | mechanism | keys and values per token | sees | found in |
# |---|---|---|---|
# | multi-head | N of each | all before | the original Transformer, GPT-2, LLaMA 2 7B and 13B |
# | multi-query | 1 of each | all before | PaLM, Falcon 7B |
# | grouped-query | K of each | all before | LLaMA 2 70B, Llama 3, Mistral |
# | sliding window | the same, for W tokens | the last W | Mistral 7B, Gemma 2 |
#
# Every pair of cells computed the same numbers, to the last digits that float64 has. What differed was never
# the mathematics: explicit randomness against global, [in, out] against [out, in], new arrays against
# writing in place.
#
# Next: **02, the original Transformer**, where these layers become a model that translates.
