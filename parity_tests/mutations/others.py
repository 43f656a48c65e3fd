"""Mistakes in GPT-2, Mistral and BERT: in what these have besides the layers that all share."""

from __future__ import annotations

from mutations.mutation import Found, mistake

JG, TG = "jax_models.gpt2", "torch_models.gpt2"
JM, TM = "jax_models.mistral", "torch_models.mistral"
JB, TB = "jax_models.bert", "torch_models.bert"

GPT2 = "test_gpt2.py::test_every_submodule_matches_twin_and_transformers[untied]"
GPT2_FILES = "test_gpt2.py::test_folders_of_transformers[whole]"
MISTRAL = "test_mistral.py::test_every_submodule_and_gradient_matches_twin_and_transformers"
RING = "test_mistral.py::test_a_ring_that_comes_round_matches_the_full_pass[5-{}]"
BERT = "test_bert.py::test_every_submodule_matches_twin_and_transformers[masked-lm]"
PADDING = "test_bert.py::test_padding_says_nothing[{}]"
WHOLE = "test_bert.py::test_what_stands_for_the_whole_is_that_of_transformers"

OTHERS = (
    # GPT-2
    mistake(
        "learned-positions-from-one",
        "the first token gets the second position's vector",
        (f"{JG}:GPT2.hidden", "jnp.maximum(positions, 0)", "jnp.maximum(positions, 0) + 1"),
        caught_by=GPT2,
        located=Found("gpt2", ""),
    ),
    mistake(
        "gelu-exact-for-tanh",
        "the activation is the exact GELU, not the one that OpenAI approximated",
        (f"{TG}:MLP.forward", "ACTIVATIONS[self.activation]", 'ACTIVATIONS["gelu"]'),
        caught_by=GPT2,
        located=Found("gpt2", "layers.0.mlp"),
    ),
    mistake(
        "pre-norm-forgotten",
        "attention reads the residual stream as it is",
        (f"{TG}:Block.forward", "self.attn(self.attn_norm(x),", "self.attn(x,"),
        caught_by=GPT2,
        located=Found("gpt2", "layers.0"),
    ),
    mistake(
        "final-norm-forgotten",
        "the head reads the last block's output as it is",
        (f"{JG}:GPT2.hidden", "return self.norm(x), cache", "return x, cache"),
        caught_by=GPT2,
        located=Found("gpt2", ""),
    ),
    mistake(
        "joined-projections-exchanged",
        "of the joined matrix, queries are taken for keys",
        ("twinformers.weight_maps.gpt2", '_projection("q_proj", 0)', '_projection("q_proj", 1)'),
        ("twinformers.weight_maps.gpt2", '_projection("k_proj", 1)', '_projection("k_proj", 0)'),
        caught_by=GPT2_FILES,
    ),
    # Mistral
    mistake(
        "window-forgotten",
        "a token sees all before it",
        (
            f"{JM}:Mistral.hidden",
            "visible(positions, key_positions, window)",
            "visible(positions, key_positions)",
        ),
        caught_by=MISTRAL,
        located=Found("mistral", ""),
    ),
    mistake(
        "window-one-wider",
        "a token sees one key more than its window has",
        (
            f"{TM}:Mistral.hidden",
            "visible(positions, key_positions, window)",
            "visible(positions, key_positions, window + 1)",
        ),
        caught_by=MISTRAL,
        located=Found("mistral", ""),
    ),
    mistake(
        "ring-one-too-small",
        "the model's own cache has a slot less than its longest call needs",
        (
            "twinformers.configs.mistral:MistralConfig",
            "self.sliding_window + tokens - 1, tokens",
            "self.sliding_window + tokens - 2, tokens",
        ),
        caught_by="test_mistral.py::test_the_longest_calls_fill_the_models_own_ring[jax]",
    ),
    # BERT
    mistake(
        "encoder-only-causal",
        "a token sees only those before it",
        (f"{TB}:Bert.hidden", ", causal=False", ""),
        caught_by=BERT,
        located=Found("bert", ""),
    ),
    mistake(
        "segments-ignored",
        "which sentence a token belongs to is not added",
        (f"{JB}:Bert.hidden", " + self.segment_embed(segments)", ""),
        caught_by=BERT,
        located=Found("bert", ""),
    ),
    mistake(
        "norm-before-adding",
        "what attention says is normalised, and the sum is not",
        (
            f"{JB}:Block.__call__",
            "self.attn_norm(x + dropout(mixed, self.dropout, subkey(key, 1)))",
            "x + self.attn_norm(dropout(mixed, self.dropout, subkey(key, 1)))",
        ),
        caught_by=BERT,
        located=Found("bert", "layers.0"),
    ),
    mistake(
        "head-without-its-bias",
        "the tied head has no bias of its own",
        (f"{TB}:MaskedLMHead.forward", " + self.bias", ""),
        caught_by=BERT,
        located=Found("bert", "head"),
    ),
    mistake(
        "head-without-activation",
        "the head's layer is a linear one",
        (
            f"{JB}:MaskedLMHead.__call__",
            "ACTIVATIONS[self.activation](self.transform(x))",
            "self.transform(x)",
        ),
        caught_by=BERT,
        located=Found("bert", "head"),
    ),
    mistake(
        "padding-stands-for-the-whole",
        "the first column is taken, though padding may stand there",
        (f"{JB}:first", "jnp.argmax(positions >= 0, axis=1)", "jnp.argmax(positions * 0, axis=1)"),
        caught_by=PADDING.format("__call__"),
    ),
    mistake(
        "padding-in-the-mean",
        "a text's vector is the mean of its padding, too",
        (f"{TB}:Bert.mean", "torch.where(real, x, 0)", "x"),
        caught_by=PADDING.format("mean"),
    ),
    mistake(
        "pooled-without-tanh",
        "the vector for the whole is the linear layer's",
        (f"{JB}:Bert.pool", "jnp.tanh(self.pooler(first(x, positions)))", "self.pooler(first(x, positions))"),
        caught_by=WHOLE,
    ),
    mistake(
        "gamma-and-beta-exchanged",
        "of early files' norms, the scale is taken for the shift",
        (
            "twinformers.configs.bert:BertConfig.hf_name",
            '(".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")',
            '(".LayerNorm.gamma", ".LayerNorm.bias"), (".LayerNorm.beta", ".LayerNorm.weight")',
        ),
        caught_by="test_bert.py::test_the_tensors_tell_which_parts_there_are",
    ),
)
