# %% [markdown]
# # BERT, twice
#
# BERT is the encoder half of the original Transformer, alone. It does not write: it reads a whole text at
# once, in both directions, and gives each token a vector that knows what stands around it. This notebook
# builds it as published, in Flax NNX and in PyTorch, gives both the same weights and compares them in double
# precision after each step. At the end both learn the two tasks of the paper from a small text, make vectors
# of sentences, and read a file in Hugging Face's layout.
#
# | section | GPT-2 (notebook 03) has | BERT has |
# |---|---|---|
# | 2 | a causal mask: each token sees those before it | no such mask: each token sees all |
# | 3 | bytes, and merges in the order learned | WordPiece: the longest piece that fits |
# | 4 | tokens and positions, added | tokens, positions and segments, added and normalised |
# | 5 | the norm first, GELU by tanh | the norm last, the exact GELU |
# | 6 | the table of tokens as its head | one more layer, then the table and a bias |
# | 7 | the task: the next token | the task: the tokens that were masked |
# | 8 | | a second task: does this sentence follow that one? |
#
# It assumes notebook 01 (attention, masks) and 02 (the original Transformer). You need `jax`, `flax` (which
# brings `optax`), `torch`, `numpy` and `matplotlib`, and about a minute.
#
# *Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
# arXiv:1810.04805.*
#
# **Letters.** B batch, T length, D hidden, N heads, H head dimension, F feed-forward, V vocabulary,
# P positions, U segments, L layers.

# %% [markdown]
# ## Setting up
#
# As in the notebooks before: `%%twin jax` runs a cell in the module `jx`, `%%twin torch` in the module `pt`,
# and `%%twin both` defines for both what needs no framework.

# %% magic

# %%
import json
import re
import string
import struct
import tempfile
import unicodedata
from dataclasses import replace
from pathlib import Path

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
torch.set_num_threads(1)  # these models are too small to share out
rng = np.random.default_rng(0)

# %% [markdown]
# The helpers. `share` and `twins` are those of notebook 03; `ask` puts one question to both twins.

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


def twins(name, *sizes, seed=0):
    """A module in both frameworks, in float64, with the same random weights: (Flax, PyTorch)."""
    torch.manual_seed(seed)
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


def ask(pair, *inputs, method="__call__"):
    """What the Flax module answers, and what its PyTorch twin does."""
    ours, theirs = pair
    given = [None if x is None else jnp.asarray(x) for x in inputs]
    with torch.no_grad():
        other = getattr(theirs, method)(*(None if x is None else torch.tensor(x) for x in inputs))
    return getattr(ours, method)(*given), other


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
# layers.Linear, layers.LayerNorm, layers.constrain

# %% [markdown]
# ## 1. One configuration for both
#
# **Idea.** The numbers that define a model live in one frozen object that both frameworks read. The last two
# fields say which heads there are: files come with and without them. Two of the models below are BERT's own;
# the two MiniLM are the same architecture, smaller, as they are used for sentence vectors (section 11).

# %% both: configs.bert.BertConfig[HF_DEFAULTS, validate, head_dim, next_sentence_head]

# %% both: configs.bert.PRESETS[bert-base-uncased, bert-large-uncased, minilm-l6, minilm-l12, bert-tiny]


# %%
def count(c):
    """Parameters of a BERT by where they sit."""
    D, F, L = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    parts = {
        "tokens": c.vocab_size * D,
        "positions, segments": (c.max_position_embeddings + c.type_vocab_size) * D,
        "attention": L * (4 * D * D + 4 * D),
        "MLP": L * (2 * D * F + F + D),
        "norms": (2 * L + 1) * 2 * D,
    }
    heads = c.pooler * (D * D + D) + c.next_sentence_head * (2 * D + 2)
    heads += c.masked_lm_head * (D * D + D + 2 * D + c.vocab_size)
    return {**parts, "heads": heads}


released = {name: c for name, c in shared.PRESETS.items() if name != "bert-tiny"}
figure, axis = plt.subplots(figsize=(8.5, 2.2))
for row, (name, config) in enumerate(released.items()):
    parts, left = count(config), 0
    print(f"{name:20} {sum(parts.values()):>12,} parameters")
    for color, (part, size) in enumerate(parts.items()):
        axis.barh(row, size / 1e6, left=left, color=f"C{color}", label=part if row == 0 else None)
        left += size / 1e6
axis.set_yticks(range(4), list(released))
axis.set(xlabel="million parameters")
axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
plt.tight_layout()
plt.show()
assert sum(count(released["bert-base-uncased"]).values()) == 110_106_428  # what the released file holds

# %% [markdown]
# The paper rounds to 110 and 340 million. From here on a small one, in which no two sizes agree, so that no
# axis can be mistaken for another.

# %%
tiny = shared.PRESETS["bert-tiny"]
print(tiny)

# %% [markdown]
# ## 2. Both directions
#
# **Idea.** A word's meaning depends on what stands before it *and* after it. So every token may look at every
# other. What remains of the mask is padding: a key is visible if its position is 0 or more.
#
# $$\text{visible}(t, s) = [\,p_s \ge 0\,] \qquad\text{instead of}\qquad [\,0 \le p_s \le p_t\,]$$
#
# **Picture.** Rows are queries, columns keys, dark is visible. Left as GPT-2 sees, in the middle as BERT
# does, right with two places of padding.

# %%
order = np.arange(8, dtype=np.int32)[None]
padded = np.array([[-1, -1, 0, 1, 2, 3, 4, 5]], np.int32)
kinds = {
    "causal": (order, True),
    "both directions": (order, False),
    "both directions, padded": (padded, False),
}
figure, axes = plt.subplots(1, 3, figsize=(7.5, 2.6))
for axis, (name, (positions, causal)) in zip(axes, kinds.items(), strict=True):
    mine = jx.visible(jnp.asarray(positions), jnp.asarray(positions), causal=causal)
    other = pt.visible(torch.tensor(positions), torch.tensor(positions), causal=causal)
    assert np.array_equal(mine, other)
    axis.imshow(mine[0], cmap="Blues", vmin=0, vmax=1.3)
    axis.set(title=name, xticks=range(8), yticks=range(8), xlabel="key")
axes[0].set_ylabel("query")
plt.tight_layout()
plt.show()

# %% [markdown]
# The price: a model that sees everything cannot be taught to predict the next token, since the next token is
# among what it sees. Section 6 tries it and measures the cheating; section 7 has BERT's way out. And there is
# no key-value cache: a new token changes the vectors of all tokens before it.
#
# **Exercise 1.** A text of 512 tokens, without padding. How many pairs (query, key) are visible in both
# directions that the causal mask hides?

# %%
answer = None
check(answer, lambda a: a == 512 * 512 - np.tril(np.ones((512, 512))).sum())

# %% [markdown]
# ## 3. WordPiece
#
# **Idea.** A fixed list of pieces: frequent words, and parts of words, which begin with `##` where they
# continue a word. A word is cut from the left: take the *longest* piece that the list has, then the longest
# that continues, until the word is used up. If nothing fits, the whole word is `[UNK]`. Nothing here is a
# matter of frameworks, so it is written once.
#
# Before that the text is put into lower case, loses its accents, and is cut at spaces and punctuation; hence
# the "uncased" in a model's name.
#
# *Wu et al. 2016, arXiv:1609.08144, section 4.1.*


# %%
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def words(text):
    """Words and punctuation in lower case, without accents; special tokens as they are."""
    found = []
    for word in re.findall(r"\[[A-Z]+\]|\w+|[^\w\s]", text):
        plain = "".join(c for c in unicodedata.normalize("NFD", word) if unicodedata.category(c) != "Mn")
        found.append(word if word in SPECIAL else plain.lower())
    return found


def pieces(word, vocabulary):
    """The longest piece that fits, again and again."""
    if word in SPECIAL:
        return [word]
    found, begin = [], 0
    while begin < len(word):
        for end in range(len(word), begin, -1):
            piece = ("##" if begin else "") + word[begin:end]
            if piece in vocabulary:
                break
        else:
            return ["[UNK]"]
        found.append(piece)
        begin = end
    return found


# %% [markdown]
# The text of this notebook is a small farm. Each animal has its verb and its wish; the places are anybody's.
# The list of pieces has the stems, a few endings, and every letter, so that nothing in lower case is unknown.

# %%
FARM = {  # what it does, what it wishes for
    "dog": ("bark", "bones"),
    "cat": ("purr", "cream"),
    "cow": ("moo", "grass"),
    "horse": ("gallop", "apples"),
}
FOODS = ["bone", "cream", "grass", "apple"]
PLACES = ("garden", "barn", "field", "yard")
VOCABULARY = [
    *SPECIAL,
    *(mark + letter for mark in ("", "##") for letter in string.ascii_lowercase),
    *("##ing", "##er", ".", ",", "the", "in", "it", "is", "of", "for", "dream", "would", "like"),
    *FARM,
    *(verb for verb, _ in FARM.values()),
    *FOODS,
    *PLACES,
]
NUMBER = {piece: n for n, piece in enumerate(VOCABULARY)}
assert len(NUMBER) == len(VOCABULARY) <= tiny.vocab_size


def cut(text):
    return [piece for word in words(text) for piece in pieces(word, NUMBER)]


def boxes(axis, row, tokens, colors):
    """A line of tokens, each in a box."""
    left = 0
    for token, color in zip(tokens, colors, strict=True):
        axis.barh(row, len(token) + 0.6, left=left, color=color, height=0.75)
        axis.text(
            left + len(token) / 2 + 0.3, row, token, ha="center", va="center", fontsize=8, family="monospace"
        )
        left += len(token) + 1


# %% [markdown]
# **Picture.** Blue: a word begins. Orange: it goes on. Red: unknown.

# %%
texts = [
    "The dog barks in the garden.",
    "The dreamer is barking for cream, in a cowshed.",
    "A café in the yard.",
    "Is 叫 a bark?",
]
figure, axis = plt.subplots(figsize=(7.5, 1.8))
for row, text in enumerate(texts):
    tokens = cut(text)
    colors = ["#f4a7a3" if t == "[UNK]" else "#fbd3a5" if t.startswith("##") else "#b5d3ee" for t in tokens]
    boxes(axis, row, tokens, colors)
axis.set(xlim=(0, 70))
axis.invert_yaxis()
axis.axis("off")
plt.show()

# %% [markdown]
# **Break it: expect the best cut.** Greedy never goes back. A list can hold a way to spell a word that the
# greedy cut does not find, and then the word is unknown:

# %%
print(pieces("barks", {"b", "bark", "##arks"}), "though b + ##arks would do")
print(pieces("barks", {"b", "##arks"}))

# %% [markdown]
# That is why real lists hold all single letters, too: then a known way to go on is never missing.
#
# **Exercise 2.** The list is `a`, `ab`, `##bcd`, `##c`, `##d`. Into how many pieces is "abcd" cut?

# %%
answer = None
check(answer, lambda a: a == len(pieces("abcd", {"a", "ab", "##bcd", "##c", "##d"})))

# %% [markdown]
# ## 4. Three embeddings, one norm
#
# **Idea.** BERT reads one text, or two at once: `[CLS] first [SEP] second [SEP]`. Three tables say what the
# token is, where it stands, and to which of the two it belongs. Their rows are added, and the sum is
# normalised before the first layer sees it.
#
# $$x_t = \operatorname{LayerNorm}\big(E[\text{token}_t] + P[p_t] + S[\text{segment}_t]\big)$$
#
# *Section 3 of the paper, figure 2.*


# %%
def encode(first, second=None):
    """`[CLS] first [SEP] second [SEP]`: the numbers of the tokens, and the segment of each."""
    a = ["[CLS]", *cut(first), "[SEP]"]
    b = [*cut(second), "[SEP]"] if second is not None else []
    return [NUMBER[t] for t in a + b], [0] * len(a) + [1] * len(b)


def fill(rows, length=None):
    """Rows of different length as arrays: tokens, positions, segments, each [B, T]. Padding is at -1."""
    length = length or max(len(tokens) for tokens, _ in rows)
    tokens, segments = np.zeros((2, len(rows), length), np.int32)
    positions = np.full((len(rows), length), -1, np.int32)
    for row, (t, s) in enumerate(rows):
        tokens[row, : len(t)], segments[row, : len(t)], positions[row, : len(t)] = t, s, range(len(t))
    return tokens, positions, segments


def spelled(tokens):
    return [VOCABULARY[t] for t in tokens]


tokens, positions, segments = fill([encode("The dog barks in the garden.", "It dreams of bones.")])
norm = twins("LayerNorm", 40, tiny.layer_norm_eps)
parts = {
    "token": rng.normal(size=(tiny.vocab_size, 40))[tokens],
    "position": rng.normal(size=(tiny.max_position_embeddings, 40))[positions],
    "segment": rng.normal(size=(tiny.type_vocab_size, 40))[segments],
}
total = sum(parts.values())
normed = ask(norm, total)
report("embeddings, Flax against PyTorch", *normed)

# %% [markdown]
# **Picture.** Rows are tokens, columns the 40 features. Equal tokens have equal rows in the first table,
# no two rows agree in the second, and the third has only two different ones. The sum tells all of them apart.

# %%
figure, axes = plt.subplots(1, 5, figsize=(10, 3), sharey=True)
panels = {**parts, "sum": total, "normalised": numbers(normed[0])}
for axis, (name, x) in zip(axes, panels.items(), strict=True):
    axis.imshow(x[0], aspect="auto", cmap="RdBu", vmin=-4, vmax=4, interpolation="nearest")
    axis.set(title=name, xticks=[])
axes[0].set_yticks(range(tokens.shape[1]), spelled(tokens[0]), fontsize=7)
plt.tight_layout()
plt.show()

# %% [markdown]
# ## 5. The block
#
# **Idea.** The original encoder's layer, unchanged but for one function: attention, add, normalise; MLP, add,
# normalise (notebook 02, section 5). The function is GELU in its exact form, where GPT-2 has the
# approximation by tanh (notebook 03, section 4).
#
# $$x \leftarrow \operatorname{LayerNorm}(x + \operatorname{Attention}(x)) \qquad
# x \leftarrow \operatorname{LayerNorm}(x + \operatorname{MLP}(x)) \qquad
# \operatorname{GELU}(x) = x\,\Phi(x)$$
#
# *Hendrycks & Gimpel 2016, arXiv:1606.08415.*

# %% twin: layers.ACTIVATIONS[relu, gelu, gelu_new]

# %% twin: bert.Attention

# %% twin: bert.MLP

# %% twin: bert.Block

# %% [markdown]
# **Measured.** The twins against each other, and against a judge that neither was written from:
# `torch.nn.TransformerEncoderLayer`, which is this block if it is told the activation and the epsilon.

# %%
block = twins("Block", tiny)
x = rng.normal(size=(2, 12, 40))
positions = np.stack([np.arange(12), np.arange(12) - 3]).clip(-1).astype(np.int32)  # row 1: three of padding
real = positions >= 0
mask = numbers(pt.visible(torch.tensor(positions), torch.tensor(positions), causal=False))
mine, other = ask(block, x, mask, None)
report("block, Flax against PyTorch", numbers(mine)[real], numbers(other)[real])

judge = torch.nn.TransformerEncoderLayer(
    40,
    5,
    88,
    dropout=0.0,
    activation="gelu",
    layer_norm_eps=tiny.layer_norm_eps,
    batch_first=True,
    dtype=torch.float64,
)
named = dict(block[1].named_parameters())
with torch.no_grad():
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
    expected = judge(torch.tensor(x), src_key_padding_mask=torch.tensor(~real))
report("block, against torch.nn", numbers(other)[real], numbers(expected)[real])

# %% [markdown]
# **Break it: the other GELU.** Left, how far the two forms are apart. Right, what becomes of that in a stack
# of twelve blocks: the norm after each part keeps the numbers at one size, and the error stays where it
# began. It is too small to see in a text, and far above what the twins differ by.

# %%
deep = [twins("Block", tiny, seed=n) for n in range(12)]
other_gelu = replace(tiny, hidden_act="gelu_new")
wrong = [pt.Block(other_gelu, dtype=torch.float64) for _ in deep]
streams = {"Flax": x[:1], "PyTorch": x[:1], "the other GELU": x[:1]}
errors = {"Flax": [], "the other GELU": []}
with torch.no_grad():
    for (ours, theirs), off in zip(deep, wrong, strict=True):
        off.load_state_dict(theirs.state_dict())
        streams["Flax"] = numbers(ours(jnp.asarray(streams["Flax"]), jnp.asarray(mask[:1]), None))
        for name, layer in (("PyTorch", theirs), ("the other GELU", off)):
            streams[name] = numbers(layer(torch.tensor(streams[name]), torch.tensor(mask[:1]), None))
        for name, found in errors.items():
            found.append(difference(streams[name], streams["PyTorch"]))
points = np.linspace(-5, 5, 1001)
exact, tanh = (jx.ACTIVATIONS[name](jnp.asarray(points)) for name in ("gelu", "gelu_new"))
report("exact GELU, Flax against PyTorch", exact, pt.ACTIVATIONS["gelu"](torch.tensor(points)))
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.6))
left.plot(points, np.asarray(tanh - exact) * 1e4, color="C3")
left.set(xlabel="x", ylabel="tanh minus exact, $10^{-4}$")
for name, found in errors.items():
    right.semilogy(range(1, 13), found, "o-", markersize=4, label=name)
right.set(xlabel="blocks", ylabel="difference from PyTorch", ylim=(1e-17, 1))
right.legend(frameon=False)
plt.tight_layout()
plt.show()
assert errors["Flax"][-1] < 1e-12 < 1e-5 < errors["the other GELU"][-1]

# %% [markdown]
# ## 6. The heads and the model
#
# **Idea.** Three heads can sit on the encoder, each with a purpose of its own.
#
# - *Which token stood here?* One more layer (matrix, GELU, norm), then the table of tokens, transposed, and a
#   bias for each token. The matrix is tied; the bias is not: how frequent a token is need not be written
#   into its vector.
#
# $$\text{logits}_t = \operatorname{LayerNorm}(\operatorname{GELU}(W x_t + c))\,E^\top + b$$
#
# - *One vector for the whole.* The **pooler**: $\tanh(W' x_0 + c')$ of the first token, `[CLS]`.
# - *Does the second sentence follow?* Two logits from the pooler's vector.
#
# *Section 3.1 of the paper.* (The extra layer and the tanh are in its code only.)

# %% twin: bert.MaskedLMHead

# %% twin: bert.first, bert.normalised, bert.Bert

# %% [markdown]
# **Measured.** Three texts: one full, one padded on the left, one padded on the right. Padding must say
# nothing, wherever it stands; its own outputs mean nothing and are left out.

# %%
model = twins("Bert", tiny)
tokens = rng.integers(0, tiny.vocab_size, (3, 150)).astype(np.int32)
segments = rng.integers(0, tiny.type_vocab_size, (3, 150)).astype(np.int32)
positions = np.stack([np.arange(150), np.arange(150) - 40, np.arange(150)]).clip(-1).astype(np.int32)
positions[2, 110:] = -1
real = positions >= 0
(logits, pooled), (other, other_pooled) = ask(model, tokens, positions, segments)
logits, other = numbers(logits)[real], numbers(other)[real]
report("logits, Flax against PyTorch", logits, other)
report("pooled, Flax against PyTorch", pooled, other_pooled)
follows = model[0].next_sentence(pooled), model[1].next_sentence(other_pooled)
report("does it follow, Flax against PyTorch", *follows)
(alone, _), _ = ask(model, tokens[2:, :110], positions[2:, :110], segments[2:, :110])
report("without its padding, against with it", alone[0], logits[-110:])
size = sum(p.numel() for p in model[1].parameters())
print(f"{size:,} parameters; the formula says {sum(count(tiny).values()):,}")
assert size == sum(count(tiny).values())

# %% [markdown]
# **Break it: one position for all.** A causal mask gives the order away even without positions: the first
# token sees one key, the second two. Without it, the table of positions is the *only* thing that knows the
# order. Give every token position 0, shuffle the text, and each token gets exactly the vector that it had
# before:


# %%
def look_left(model):
    """The same Flax model, with the causal mask on top."""

    def attend(q, k, v, mask, **options):
        return jx.attend(q, k, v, jnp.tril(mask), **options)

    for layer in model.layers:
        layer.attn.attend = attend
    return model


shuffle = rng.permutation(30)
text, nowhere = jnp.asarray(tokens[:1, :30]), jnp.zeros((1, 30), jnp.int32)
causal = look_left(twins("Bert", tiny)[0])
for name, reader in (("both directions", model[0]), ("causal mask", causal)):
    shuffled = reader.hidden(text[:, shuffle], nowhere)
    changed = difference(shuffled, numbers(reader.hidden(text, nowhere))[:, shuffle])
    print(f"{name:16} a shuffled text differs by {changed:.1e}")
    assert (changed < 1e-12) == (reader is model[0])

# %% [markdown]
# **Break it: teach it the next token.** The text is random: nobody can predict it, and the best loss is
# $\log V$. A model that sees both directions does much better, because the answer is its right-hand
# neighbour. It learns to copy, and nothing else. (At the last place there is no neighbour to copy from; an
# eighth of $\log V$ remains.)

# %%
adam = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-6)  # the numbers of BERT's code


def train_flax(model, loss_of, data_of, rate_of, updates):
    """Adam from the model's weights on; the model has the new ones then. Returns the losses."""
    graph, weights = nnx.graphdef(model), nnx.to_pure_dict(nnx.state(model))
    moments, losses = adam.init(weights), []

    @jax.jit
    def update(weights, moments, data, rate):
        value, gradients = jax.value_and_grad(lambda w: loss_of(nnx.merge(graph, w), *data))(weights)
        steps, moments = adam.update(gradients, moments)
        return jax.tree.map(lambda w, step: w - rate * step, weights, steps), moments, value

    for n in range(1, updates + 1):
        weights, moments, loss = update(weights, moments, data_of(n), rate_of(n))
        losses.append(float(loss))
    nnx.update(model, weights)
    return losses


def fresh(config):
    """Twins as a training begins: small matrices, norms 1, biases 0."""
    ours, theirs = twins("Bert", config)
    with torch.no_grad():
        for path, parameter in theirs.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.1)
            else:
                parameter.fill_(1.0 if "norm.weight" in path else 0.0)
    share(dict(theirs.named_parameters()), ours)
    return ours, theirs


def cross_entropy(logits, labels, kept):
    """The mean of -log p(label) over the places that are kept."""
    each = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(kept, each, 0)) / jnp.sum(kept)


def next_token(model, tokens):
    places = jnp.broadcast_to(jnp.arange(8), (tokens.shape[0], 8))
    logits, _ = model(tokens[:, :-1], places)
    return cross_entropy(logits, tokens[:, 1:], places >= 0)


def noise(n):
    return (np.random.default_rng(n).integers(0, 20, (48, 9)).astype(np.int32),)


copying = replace(
    tiny,
    vocab_size=20,
    hidden_size=32,
    num_attention_heads=4,
    intermediate_size=64,
    num_hidden_layers=1,
    max_position_embeddings=8,
    pooler=False,
)
figure, axis = plt.subplots(figsize=(6.5, 2.4))
ends = {}
for name, change in (("causal mask", look_left), ("both directions", lambda model: model)):
    losses = train_flax(change(fresh(copying)[0]), next_token, noise, lambda n: 5e-3, 200)
    axis.plot(losses, label=name)
    ends[name] = np.mean(losses[-10:])
    print(f"{name:16} last losses {ends[name]:.3f}")
axis.axhline(np.log(20), color="0.6", linestyle=":")
axis.axhline(np.log(20) / 8, color="0.6", linestyle=":")
axis.set(xlabel="update", ylabel="loss", ylim=(0, None))
axis.legend(frameon=False)
plt.show()
assert ends["both directions"] < 1.0 < 2.9 < ends["causal mask"]

# %% [markdown]
# **Exercise 3.** How many parameters does the masked-language-model head add to the encoder of
# `bert-base-uncased` (D = 768, V = 30522)? Its matrix into the vocabulary is tied and counts nothing.

# %%
answer = None
check(answer, lambda a: a == 768 * 768 + 768 + 2 * 768 + 30522)

# %% [markdown]
# ## 7. The first task: what stood there?
#
# **Idea.** Hide some tokens and ask for them. Then the answer is not in sight, and both directions may help
# to find it. Of all tokens 15% are chosen, and the loss is taken at these only:
#
# | of the chosen | the model sees |
# |---|---|
# | 80% | `[MASK]` |
# | 10% | some other token, drawn at random |
# | 10% | the token itself |
#
# $$\text{loss} = -\frac{1}{|M|} \sum_{t \in M} \log p(x_t \mid \tilde{x})$$
#
# Why not `[MASK]` always? Nobody writes `[MASK]` when the model is used later. If a token's own place could
# be trusted whenever it is not masked, the model would have no reason to compute anything there. So it may be
# wrong, or asked for, anywhere.
#
# *Section 3.1 and appendix A.1 of the paper.* (Its code chooses exactly 15% of each text; here each token is
# drawn for itself.)


# %%
def corrupt(tokens, draw):
    """What the model sees, and which places it is asked about. Special tokens are left alone."""
    chosen = (draw.random(tokens.shape) < 0.15) & (tokens >= len(SPECIAL))
    fate = draw.random(tokens.shape)
    seen = np.where(chosen & (fate < 0.8), NUMBER["[MASK]"], tokens)
    other = draw.integers(len(SPECIAL), len(VOCABULARY), tokens.shape)
    return np.where(chosen & (fate >= 0.9), other, seen).astype(np.int32), chosen


row = encode("The dog barks in the garden.", "It dreams of bones.")
many = np.tile(row[0], (20000, 1))
seen, chosen = corrupt(many, np.random.default_rng(0))
asked = chosen.sum()
ordinary = np.sum(many >= len(SPECIAL))
print(f"of {ordinary:,} tokens {asked / ordinary:.1%} are chosen; of these")
print(f"  {np.sum(seen[chosen] == NUMBER['[MASK]']) / asked:.1%} masked")
print(f"  {np.sum(seen[chosen] == many[chosen]) / asked:.1%} as they were")
assert np.array_equal(seen[~chosen], many[~chosen])

# %% [markdown]
# **Picture.** One sentence, eight times: masked (blue), exchanged (red), asked about though it is as it was
# (green). Each time the model meets the sentence, other places are asked about.

# %%
rows = np.flatnonzero((seen != many).sum(1) + (chosen & (seen == many)).sum(1) >= 2)[:200]
odd = [r for r in rows if ((seen[r] != many[r]) & (seen[r] != NUMBER["[MASK]"])).any()][:3]
same = [r for r in rows if (chosen[r] & (seen[r] == many[r])).any() and r not in odd][:2]
plain = [r for r in rows if r not in odd and r not in same][:3]
figure, axis = plt.subplots(figsize=(9.5, 2.9))
for line, r in enumerate(sorted([*odd, *same, *plain])):
    colors = []
    for token, was, is_asked in zip(seen[r], many[r], chosen[r], strict=True):
        changed = "#f4a7a3" if token != was else "#b9deb0"
        changed = "#b5d3ee" if token == NUMBER["[MASK]"] else changed
        colors.append(changed if is_asked else "#eeeeee")
    boxes(axis, line, spelled(seen[r]), colors)
axis.set(xlim=(0, 90))
axis.invert_yaxis()
axis.axis("off")
plt.show()

# %% [markdown]
# **Exercise 4.** Of all tokens, not only the chosen ones: which share does the model see as `[MASK]`?

# %%
answer = None
check(answer, lambda a: np.isclose(a, 0.15 * 0.8))

# %% [markdown]
# ## 8. The second task: does it follow?
#
# **Idea.** In half of the texts the second sentence is the one that followed the first. In the other half it
# comes from somewhere else. The pooler's vector has to tell. To do so `[CLS]` must collect what both
# sentences say, and segments say which word belongs to which.
#
# $$\text{loss} = \text{loss of the first task} + \text{loss of the second task}$$
#
# On the farm, a sentence follows if it wishes for what this animal wishes for.
#
# (It was a reasonable idea. Liu et al. 2019, arXiv:1907.11692, trained without it and lost nothing, and later
# encoders leave it out. The files have it, so a port needs it.)

# %%
ANIMALS = list(FARM)


def does(animal, draw):
    verb, place = FARM[animal][0], draw.choice(PLACES)
    forms = (f"The {animal} {verb}s in the {place}.", f"In the {place} the {animal} {verb}s.")
    return forms[draw.integers(2)]


def wishes(animal, draw):
    food = FARM[animal][1]
    return (f"It dreams of {food}.", f"It would like {food}.")[draw.integers(2)]


def batch(seed, size=64):
    """Tokens seen, positions, segments, labels, places asked about, each [B, 18], and 0 where it follows."""
    draw = np.random.default_rng(seed)
    stray = draw.random(size) < 0.5
    rows = []
    for wrong in stray:
        animal, another = draw.choice(ANIMALS, 2, replace=False)
        rows.append(encode(does(animal, draw), wishes(another if wrong else animal, draw)))
    tokens, positions, segments = fill(rows, 18)
    seen, chosen = corrupt(tokens, draw)
    return seen, positions, segments, tokens, chosen, stray.astype(np.int32)


seen, _, _, labels, _, stray = batch(0)
for r in range(4):
    kept = [t for t in spelled(labels[r]) if t != "[PAD]"]
    print("does not follow:" if stray[r] else "follows:        ", " ".join(kept))

# %% [markdown]
# ## 9. Learning in both
#
# **The two losses.** The same formula twice. JAX wants fixed shapes, and so scores every place and drops
# those that are not asked about; PyTorch picks the places first.


# %%
def flax_loss(model, seen, positions, segments, labels, chosen, stray):
    logits, pooled = model(seen, positions, segments)
    first = cross_entropy(logits, labels, chosen)
    return first + cross_entropy(model.next_sentence(pooled), stray, jnp.ones(stray.shape, bool))


def torch_loss(model, seen, positions, segments, labels, chosen, stray):
    logits, pooled = model(seen, positions, segments)
    first = torch.nn.functional.cross_entropy(logits[chosen], labels[chosen].long())
    return first + torch.nn.functional.cross_entropy(model.next_sentence(pooled), stray.long())


def train_torch(model, data_of, rate_of, updates):
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.999), eps=1e-6)
    losses = []
    for n in range(1, updates + 1):
        loss = torch_loss(model, *map(torch.tensor, data_of(n)))
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate_of(n)
        optimizer.step()
        losses.append(loss.item())
    return losses


UPDATES = 350


def rate(n):
    """Up to 4e-3 in 100 updates, then down in a straight line, as in appendix A.2 of the paper."""
    return 4e-3 * min(n / 100, (UPDATES + 1 - n) / (UPDATES - 100))


farm = replace(
    tiny,
    vocab_size=len(VOCABULARY),
    hidden_size=48,
    num_attention_heads=4,
    intermediate_size=96,
    num_hidden_layers=2,
    max_position_embeddings=24,
    type_vocab_size=2,
)
flax_model, torch_model = fresh(farm)
flax_losses = train_flax(flax_model, flax_loss, batch, rate, UPDATES)
torch_losses = train_torch(torch_model, batch, rate, UPDATES)
print(f"last losses: Flax {np.mean(flax_losses[-10:]):.4f}, PyTorch {np.mean(torch_losses[-10:]):.4f}")

# %% [markdown]
# **Picture.** The two curves, thick and thin, and below them their difference. It begins at the last digit of
# float64 and grows slowly, since each update builds on the one before (notebook 02, section 10). After that
# both get the same weights again, so that what follows can be measured to the last digit.

# %%
apart = np.abs(np.array(flax_losses) - np.array(torch_losses))
figure, axes = plt.subplots(2, 1, figsize=(7, 3.8), sharex=True, height_ratios=(2, 1))
axes[0].plot(flax_losses, color="C0", lw=4, alpha=0.4, label="Flax")
axes[0].plot(torch_losses, color="C1", lw=1, label="PyTorch")
axes[0].set(ylabel="loss", ylim=(0, None))
axes[0].legend(frameon=False)
axes[1].semilogy(np.maximum(apart, 1e-17), color="C3", lw=1)
axes[1].set(xlabel="update", ylabel="difference")
plt.show()
print(f"largest difference in the first 20 updates {apart[:20].max():.1e}, in all {apart.max():.1e}")
assert apart[:20].max() < 1e-10 and apart.max() < 1e-6
assert np.mean(flax_losses[-20:]) < 0.5 * flax_losses[0]
share(dict(torch_model.named_parameters()), flax_model)

# %% [markdown]
# **Break it: look left only.** The same training, with a causal mask. The animal stands before its verb and
# its wish, so a masked animal can be found only from the right. And `[CLS]` stands first: it sees nothing but
# itself, so the second task stays at a coin's $\log 2$.

# %%
left_model = look_left(fresh(farm)[0])
left_losses = train_flax(left_model, flax_loss, batch, rate, UPDATES)


def smooth(losses, width=20):
    return np.convolve(losses, np.ones(width) / width, mode="valid")


figure, axis = plt.subplots(figsize=(7, 2.2))
axis.plot(smooth(flax_losses), label="both directions")
axis.plot(smooth(left_losses), color="C3", label="causal mask")
axis.set(xlabel="update", ylabel="loss, mean of 20", ylim=(0, None))
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# **Measured.** 400 pairs that do follow each other. In each, one kind of word is masked; how often is the
# best guess the right one? A place cannot be known; one in four is what guessing gets.


# %%
def fixed(seed, size=400):
    draw = np.random.default_rng(seed)
    return fill([encode(does(a, draw), wishes(a, draw)) for a in draw.choice(ANIMALS, size)], 18)


tokens, positions, segments = fixed(1_000_000)
kinds = {
    "animal": ANIMALS,
    "verb": [verb for verb, _ in FARM.values()],
    "wish": FOODS,
    "place": PLACES,
}
for kind, members in kinds.items():
    hidden = np.isin(tokens, [NUMBER[w] for w in members])
    seen = np.where(hidden, NUMBER["[MASK]"], tokens).astype(np.int32)
    (mine, _), (other, _) = ask((flax_model, torch_model), seen, positions, segments)
    left, _ = left_model(jnp.asarray(seen), jnp.asarray(positions), jnp.asarray(segments))
    guesses = {"Flax": mine, "PyTorch": other, "causal mask": left}
    hits = {n: np.mean(numbers(g).argmax(-1)[hidden] == tokens[hidden]) for n, g in guesses.items()}
    print(f"{kind:8}", "  ".join(f"{n} {hit:6.1%}" for n, hit in hits.items()))

# %% [markdown]
# Verbs and wishes follow from what stands to the left of them, so the causal mask costs little there. The
# animal stands first, and without the right-hand side it is a guess.
#
# **Picture.** What the models expect at a masked place: with both directions (blue) and with a causal mask
# (red).

# %%
riddles = [
    ("The [MASK] barks in the barn.", "It dreams of bones."),
    ("In the field the [MASK] gallops.", "It would like apples."),
    ("The cow moos in the yard.", "It dreams of [MASK]."),
    ("The cat purrs in the [MASK].", "It would like cream."),
]
tokens, positions, segments = fill([encode(*r) for r in riddles], 18)
at = np.argmax(tokens == NUMBER["[MASK]"], axis=1)
chances = {}
for name, reader in (("both directions", flax_model), ("causal mask", left_model)):
    logits, _ = reader(jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(segments))
    chances[name] = numbers(jax.nn.softmax(logits))[np.arange(4), at]
with torch.no_grad():
    other, _ = torch_model(torch.tensor(tokens), torch.tensor(positions), torch.tensor(segments))
same = torch.softmax(other, -1)[np.arange(4), at]
report("chances, Flax against PyTorch", chances["both directions"], same)
figure, axes = plt.subplots(1, 4, figsize=(10.5, 2.4))
for r, axis in enumerate(axes):
    best = np.argsort(-chances["both directions"][r])[:5]
    axis.barh(np.arange(5) - 0.2, chances["both directions"][r, best], height=0.4, color="C0")
    axis.barh(np.arange(5) + 0.2, chances["causal mask"][r, best], height=0.4, color="C3", alpha=0.6)
    axis.set_yticks(range(5), spelled(best), fontsize=8)
    axis.set_title("\n".join(riddles[r]), fontsize=7)
    axis.set(xlim=(0, 1))
    axis.invert_yaxis()
plt.tight_layout()
plt.show()

# %% [markdown]
# ## 10. Looking inside
#
# **Picture.** The attention of the masked place (the row of `[MASK]`) and of all others, mean over the heads.
# Above both directions, below the causal mask: there nothing is taken from the right.


# %%
def listen(model, *inputs):
    """The attention weights of one pass of a Flax model, one array per layer. [B, N, T, T]"""
    heard, weigh = [], jx.attention_weights

    def spy(q, k, mask):
        heard.append(weigh(q, k, mask))
        return heard[-1]

    jx.attention_weights = spy
    try:
        model(*map(jnp.asarray, inputs))
    finally:
        jx.attention_weights = weigh
    return [numbers(weights) for weights in heard]


tokens, positions, segments = fill([encode(*riddles[0])])
labels = spelled(tokens[0])
figure, axes = plt.subplots(2, 2, figsize=(8, 7.4))
for row, (name, reader) in enumerate((("both directions", flax_model), ("causal mask", left_model))):
    for layer, weights in enumerate(listen(reader, tokens, positions, segments)):
        axis = axes[row, layer]
        axis.imshow(weights[0].mean(0), cmap="Blues", vmin=0, vmax=0.6)
        axis.set_title(f"{name}, layer {layer}", fontsize=9)
        axis.set_xticks(range(len(labels)), labels if row else [], rotation=90, fontsize=7)
        axis.set_yticks(range(len(labels)), [] if layer else labels, fontsize=7)
        axis.tick_params(length=0)
        if row == 0:
            right = weights[0].mean(0)[2, 3:].sum()
            print(f"layer {layer}: [MASK] takes {right:.0%} of what it takes from its right")
plt.tight_layout()
plt.show()

# %% [markdown]
# **Picture.** Left, the head's own bias, in two groups: tokens that the text has, and tokens that it never
# has, such as most letters. The bias pushes the second group down before anything is read. Right, the second
# task: the chance that the sentence follows, for 400 pairs that do and 400 that do not.

# %%
bias = numbers(flax_model.head.bias[...])
number = np.arange(len(VOCABULARY))
occurs, ordinary = np.isin(number, batch(0)[3]), number >= len(SPECIAL)
draw = np.random.default_rng(2_000_000)
verdicts = {}
for name, shift in (("follows", 0), ("does not", 1)):
    rows = []
    for _ in range(400):
        n = draw.integers(len(ANIMALS))
        wish = ANIMALS[(n + shift * draw.integers(1, len(ANIMALS))) % len(ANIMALS)]
        rows.append(encode(does(ANIMALS[n], draw), wishes(wish, draw)))
    (_, pooled), (_, other) = ask((flax_model, torch_model), *fill(rows, 18))
    verdicts[name] = numbers(jax.nn.softmax(flax_model.next_sentence(pooled)))[:, 0]
    same = numbers(torch.softmax(torch_model.next_sentence(other), -1))[:, 0]
    report("chance that it follows, Flax against PyTorch", verdicts[name], same)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
groups = {"in the text": bias[occurs & ordinary], "never in it": bias[~occurs & ordinary]}
left.hist(list(groups.values()), bins=20, label=list(groups), color=["C0", "0.7"])
left.set(xlabel="bias", ylabel="tokens")
left.legend(frameon=False)
right.hist(list(verdicts.values()), bins=np.linspace(0, 1, 21), label=list(verdicts), color=["C0", "C3"])
right.set(xlabel="chance that it follows", ylabel="pairs")
right.legend(frameon=False)
plt.tight_layout()
plt.show()
right_verdicts = np.r_[verdicts["follows"] > 0.5, verdicts["does not"] < 0.5].mean()
print(f"right about {right_verdicts:.1%} of the pairs")

# %% [markdown]
# ## 11. Vectors of sentences
#
# **Idea.** One vector for a whole sentence, so that sentences can be compared by an angle. The pooler was
# trained to see whether a sentence follows, which is another question. What was found to work best is plain:
# the mean of all tokens' vectors, scaled to length 1; a product of two is then the cosine of their angle. For
# that use the encoder is trained further, on pairs of sentences that mean the same.
#
# $$v = \frac{m}{\lVert m \rVert} \qquad m = \frac{1}{|\{t : p_t \ge 0\}|} \sum_{t:\,p_t \ge 0} x_t$$
#
# The sum is over *real* tokens. Padding has a vector, too, a finite one that means nothing.
#
# *Reimers & Gurevych 2019, "Sentence-BERT", arXiv:1908.10084, section 3.*

# %%
draw = np.random.default_rng(3)
lines, owners = [], []
for animal in ANIMALS:
    lines.append(does(animal, draw))
    lines.append(f"The {animal} is in the {draw.choice(PLACES)}.")
    lines.append(f"The {animal} would like {FARM[animal][1]}.")
    owners += [animal] * 3
tokens, positions, segments = fill([encode(line) for line in lines])
trained = flax_model, torch_model
found = {name: ask(trained, tokens, positions, segments, method=name) for name in ("mean", "first")}
for name, vectors in found.items():
    report(f"vectors of sentences, {name}, Flax against PyTorch", *vectors)
alone = [ask(trained, *fill([encode(line)]), method="mean")[0] for line in lines[1::3]]
report("alone, against in a padded batch", np.concatenate(alone), found["mean"][0][1::3])

# %% [markdown]
# **Picture.** Every sentence against every other, three for each animal. (The mean over all sentences is
# subtracted first: in a model that was never trained to compare, all vectors share a large part.)


# %%
def cosines(vectors):
    v = numbers(vectors) - numbers(vectors).mean(0)
    v = v / np.linalg.norm(v, axis=1, keepdims=True)
    return v @ v.T


same = np.equal.outer(owners, owners) & ~np.eye(len(owners), dtype=bool)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
for axis, (name, vectors) in zip(axes, found.items(), strict=True):
    table = cosines(vectors[0])
    axis.imshow(table, cmap="RdBu", vmin=-1, vmax=1)
    axis.set_title({"mean": "mean of all tokens", "first": "first token"}[name], fontsize=9)
    axis.set_xticks(range(1, len(lines), 3), ANIMALS, fontsize=8)
    axis.set_yticks(range(len(lines)) if name == "mean" else [], lines if name == "mean" else [], fontsize=7)
    axis.tick_params(length=0)
    others = table[~same & ~np.eye(len(owners), dtype=bool)].mean()
    print(f"{name:6} same animal {table[same].mean():+.2f}, another one {others:+.2f}")
plt.tight_layout()
plt.show()

# %% [markdown]
# On this farm the first token does as well as the mean: the second task has made it say which animal it is.
# On texts of all kinds the mean was better in the experiments of Reimers & Gurevych.
#
# **Break it: count the padding.** The mean over all places instead of the real ones. The vector of a sentence
# then depends on how long its neighbours in the batch happen to be.

# %%
row = encode(lines[0])
exact = numbers(found["mean"][1])[0]
lengths, cosine = range(len(row[0]), 25), {"real tokens only": [], "padding counted": []}
for length in lengths:
    given = [torch.tensor(x) for x in fill([row], length)]
    with torch.no_grad():
        everything = numbers(torch_model.hidden(*given))[0].mean(0)
        cosine["real tokens only"].append(numbers(torch_model.mean(*given))[0] @ exact)
    cosine["padding counted"].append(everything @ exact / np.linalg.norm(everything))
figure, axis = plt.subplots(figsize=(6, 2.2))
for color, (name, values) in zip(("C0", "C3"), cosine.items(), strict=True):
    axis.plot(lengths, values, "o-", markersize=4, color=color, label=name)
axis.set(xlabel="places in the batch", ylabel="cosine with the right vector")
axis.legend(frameon=False)
plt.show()
assert min(cosine["real tokens only"]) > 1 - 1e-12 > 0.999 > min(cosine["padding counted"])

# %% [markdown]
# **Exercise 5.** A sentence has 5 tokens and 3 places of padding. Somebody sets the vectors of the padding to
# zero, divides the sum by 8 instead of 5, and scales the result to length 1. Is the vector `"right"` or
# `"wrong"`?

# %%
answer = None
check(answer, lambda a: a == "right")

# %% [markdown]
# ## 12. Hugging Face's files
#
# **Idea.** A `safetensors` file is a number (how long the header is), the header in JSON (for each tensor its
# type, its shape, and where it lies), and the bytes. For BERT, names follow the classes in transformers, and
# matrices are [out, in] as PyTorch has them. For Flax they are transposed.
#
# | in the file | shape | ours | for Flax |
# |---|---|---|---|
# | `bert.embeddings.word_embeddings.weight` | [V, D] | `embed` | as it is |
# | `bert.encoder.layer.0.attention.self.query.weight` | [D, D] | `layers.0.attn.q_proj` | transposed |
# | `bert.encoder.layer.0.attention.output.LayerNorm.weight` | [D] | `layers.0.attn_norm` | as it is |
# | `bert.encoder.layer.0.intermediate.dense.weight` | [F, D] | `layers.0.mlp.fc1` | transposed |
# | `cls.predictions.bias` | [V] | `head.bias` | as it is |
# | `cls.predictions.decoder.weight` | [V, D] | tied to `embed` | not read |
#
# BERT was written in TensorFlow, whose norms have a `gamma` and a `beta`. Early files kept these names:
# `LayerNorm.gamma` is today's `LayerNorm.weight`, `LayerNorm.beta` is `LayerNorm.bias`. Files of a later
# time hold `position_ids`, which is 0, 1, 2 and so on, and no parameter.

# %%
NAMES = {
    "embed": "bert.embeddings.word_embeddings",
    "position_embed": "bert.embeddings.position_embeddings",
    "segment_embed": "bert.embeddings.token_type_embeddings",
    "embed_norm": "bert.embeddings.LayerNorm",
    "attn.q_proj": "attention.self.query",
    "attn.k_proj": "attention.self.key",
    "attn.v_proj": "attention.self.value",
    "attn.o_proj": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "mlp_norm": "output.LayerNorm",
    "pooler": "bert.pooler.dense",
    "head": "cls.predictions",
    "head.transform": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "next_sentence": "cls.seq_relationship",
}
REPEATED = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "bert.embeddings.position_ids"}


def hf_name(path):
    """Hugging Face's name of a parameter, from that in the PyTorch twin."""
    owner, _, kind = path.rpartition(".")
    if in_layer := re.fullmatch(r"layers\.(\d+)\.(.+)", owner):
        return f"bert.encoder.layer.{in_layer[1]}.{NAMES[in_layer[2]]}.{kind}"
    return f"{NAMES[owner]}.{kind}"


def save(tensors, path):
    header, data = {}, b""
    for name, x in tensors.items():
        kind = {"float64": "F64", "int64": "I64"}[str(x.dtype)]
        header[name] = {"dtype": kind, "shape": x.shape, "data_offsets": [len(data), len(data) + x.nbytes]}
        data += x.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the bytes begin at a multiple of 8
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def load(path):
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    found = {}
    for name, entry in json.loads(raw[8:start]).items():
        begin, end = entry["data_offsets"]
        kind = {"F64": np.float64, "I64": np.int64}[entry["dtype"]]
        found[name] = np.frombuffer(raw[start + begin : start + end], kind).reshape(entry["shape"])
    return found


written = {hf_name(path): numbers(p) for path, p in torch_model.named_parameters()}
written["cls.predictions.decoder.weight"] = written["bert.embeddings.word_embeddings.weight"]
written["cls.predictions.decoder.bias"] = written["cls.predictions.bias"]
early = {}
for name, x in written.items():
    old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    early[old] = x
early["bert.embeddings.position_ids"] = np.arange(farm.max_position_embeddings)[None]
folder = tempfile.TemporaryDirectory()
files = {name: Path(folder.name) / f"{name}.safetensors" for name in ("today", "early")}
for path, tensors in ((files["today"], written), (files["early"], early)):
    save(tensors, path)
    print(f"{path.name:18} {len(tensors)} tensors, {path.stat().st_size:,} bytes")

# %% [markdown]
# **Reading.** Each name in the file must be known, and each parameter must be found. What is tied or no
# parameter is left out by name, not by chance.


# %%
def modern(name):
    """Today's name of a tensor."""
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        name = name.removesuffix(old) + new if name.endswith(old) else name
    return name


def read(path, config, renamed=modern, strict=True):
    """New twins with the numbers of a file: (Flax, PyTorch)."""
    ours = jx.Bert(config, dtype=jnp.float64, rngs=nnx.Rngs(7))
    theirs = pt.Bert(config, dtype=torch.float64)
    place = {hf_name(name): name for name, _ in theirs.named_parameters()}
    tensors = {renamed(name): x for name, x in load(path).items()}
    unknown = tensors.keys() - place.keys() - REPEATED
    assert not (strict and unknown), f"unknown: {sorted(unknown)}"
    weights = {place[name]: torch.tensor(x) for name, x in tensors.items() if name in place}
    theirs.load_state_dict(weights, strict=strict)
    share(dict(theirs.named_parameters()), ours)
    return ours, theirs


inputs = batch(77)[:3]
expected, expected_pooled = ask(trained, *inputs)[1]
real = inputs[1] >= 0
for path in files.values():
    for framework, (logits, pooled) in zip(("Flax", "PyTorch"), ask(read(path, farm), *inputs), strict=True):
        report(f"logits, {path.name} in {framework}", numbers(logits)[real], numbers(expected)[real])
        report(f"pooled, {path.name} in {framework}", pooled, expected_pooled)

# %% [markdown]
# **Break it: skip what is unknown.** A reader that takes what it knows and passes over the rest (PyTorch's
# `strict=False`) reads an early file without a complaint. All norms then keep the ones and zeros that they
# began with.

# %%
careless = read(files["early"], farm, renamed=lambda name: name, strict=False)
(logits, _), _ = ask(careless, *inputs)
lost = difference(numbers(logits)[real], numbers(expected)[real])
print(f"norms not read: {lost:.1e}")
assert lost > 1e-3
figure, axis = plt.subplots(figsize=(5, 2.6))
lost = dict(careless[1].named_parameters())
for color, kind in (("C0", "weight"), ("C1", "bias")):
    names = [name for name, _ in torch_model.named_parameters() if name.endswith(f"norm.{kind}")]
    given, got = (
        np.concatenate([numbers(d[n]) for n in names]) for d in (dict(torch_model.named_parameters()), lost)
    )
    axis.plot(given, got, ".", color=color, label=kind)
axis.axline((0, 0), slope=1, color="0.6", linestyle=":")
axis.set(xlabel="in the file", ylabel="read")
axis.legend(frameon=False, fontsize=8)
plt.show()
folder.cleanup()

# %% [markdown]
# **Exercise 6.** Which shape has `bert.encoder.layer.0.output.dense.weight` in the file of
# `bert-base-uncased` (D = 768, F = 3072)? Give a tuple.

# %%
answer = None
check(answer, lambda a: tuple(a) == (768, 3072))

# %% [markdown]
# ## What to take along
#
# | part | the mistake to look for |
# |---|---|
# | both directions | a causal mask that was left in; next-token training, which copies |
# | WordPiece | a list that greedy cutting gets stuck in |
# | embeddings | positions forgotten: nothing else knows the order |
# | block | the other GELU; an epsilon of another library |
# | head | the bias forgotten; the matrix not tied |
# | masking | a loss at places that were not asked about |
# | sentence vectors | padding in the mean |
# | files | `gamma` and `beta` skipped without a word |
#
# This is the last notebook of the course. The same code, in `jax_models/bert.py` and `torch_models/bert.py`
# of the repository, reads the released files.
