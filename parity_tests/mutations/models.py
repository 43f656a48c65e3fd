"""Mistakes in the models: LLaMA, the Transformer, the attention mechanisms and the layers that they share.

About half are planted in each framework. Those that stand in both at once show to transformers alone.
"""

from __future__ import annotations

from mutations.mutation import Found, mistake

JL, TL = "jax_models.layers", "torch_models.layers"
JLLAMA, TLLAMA = "jax_models.llama", "torch_models.llama"
JT, TT = "jax_models.transformer", "torch_models.transformer"

LOGITS = "test_llama.py::test_logits_jax_matches_torch[grouped-query]"
TRANSLATION = "test_transformer.py::test_logits_jax_matches_torch[paper-0]"
GELU = "test_transformer.py::test_logits_jax_matches_torch[paper-output-shared-0]"
MECHANISM = "test_attention.py::test_twins_match_each_other_and_plain_numpy[grouped-query-True-7-True]"
MASKS = "test_attention.py::test_visible_matches_matrices_checked_by_eye[{}]"

LLAMA, TRANSFORMER = "llama", "transformer"
ATTENTION = Found(LLAMA, "layers.0.attn")

MODELS = (
    # Attention
    mistake(
        "rotary-pairs-swapped",
        "the two halves that are turned together change places",
        (f"{JL}:rotate", "first, second =", "second, first ="),
        caught_by=LOGITS,
        located=ATTENTION,
    ),
    mistake(
        "rotary-interleaved",
        "neighbours are turned together instead of the two halves",
        (
            f"{TL}:rotate",
            "torch.chunk(x.to(cos.dtype), 2, dim=-1)",
            "x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)",
        ),
        caught_by=LOGITS,
        located=ATTENTION,
    ),
    mistake(
        "rotary-on-values",
        "the values are turned too",
        (
            f"{JLLAMA}:Attention.__call__",
            "k = rotate(k, context.cos",
            "v = rotate(v, context.cos, context.sin)\n        k = rotate(k, context.cos",
        ),
        caught_by=LOGITS,
        located=ATTENTION,
    ),
    mistake(
        "theta-from-a-default",
        "the angles are made with theta 10000, whatever the configuration says",
        (
            f"{TLLAMA}:Llama.hidden",
            "self.config.rotary_frequencies",
            "self.config.replace(rope_theta=1e4).rotary_frequencies",
        ),
        caught_by=LOGITS,
        located=Found(LLAMA, ""),
    ),
    mistake(
        "angles-in-float32",
        "the rotary angles are float32 in a float64 model",
        (f"{JL}:rotary_angles", "wide = at_least_float32(dtype)", "wide = jnp.float32"),
        caught_by=LOGITS,
        located=Found(LLAMA, ""),
    ),
    mistake(
        "tile-for-repeat",
        "query head n reads key-value head n % K instead of n // G",
        (
            f"{TL}:attention_weights",
            "q.reshape(B, T, K, N // K, H).permute(0, 2, 3, 1, 4)",
            "q.reshape(B, T, N // K, K, H).permute(0, 3, 2, 1, 4)",
        ),
        (
            f"{TL}:attention_weights",
            "dim=-1).reshape(B, N, T, S)",
            "dim=-1).transpose(1, 2).reshape(B, N, T, S)",
        ),
        (
            f"{TL}:attend",
            "weights.reshape(B, K, -1, S)",
            "weights.reshape(B, N // K, K, T, S).transpose(1, 2).reshape(B, K, -1, S)",
        ),
        (
            f"{TL}:attend",
            ".reshape(B, N, T, H)",
            ".reshape(B, K, N // K, T, H).transpose(1, 2).reshape(B, N, T, H)",
        ),
        caught_by=LOGITS,
        located=ATTENTION,
    ),
    mistake(
        "attention-unscaled",
        "the scores are not divided by sqrt(H)",
        (f"{JL}:attention_weights", " * H**-0.5", ""),
        caught_by=LOGITS,
        located=ATTENTION,
    ),
    mistake(
        "attention-scaled-by-width",
        "the scores are divided by the root of the model's width, not of a head's",
        (f"{TL}:attention_weights", "H**-0.5", "(N * H) ** -0.5"),
        caught_by=TRANSLATION,
        located=Found(TRANSFORMER, "encoder.0.self_attn"),
    ),
    mistake(
        "softmax-in-float32",
        "the softmax of a float64 model runs in float32",
        (f"{TL}:attention_weights", "scores.to(at_least_float32(scores.dtype))", "scores.to(torch.float32)"),
        caught_by=LOGITS,
        located=ATTENTION,
    ),
    mistake(
        "softmax-in-half-precision",
        "the softmax of a half-precision model runs in half precision",
        (f"{JL}:attention_weights", ".astype(at_least_float32(scores.dtype))", ""),
        caught_by="test_attention.py::test_lower_precision_keeps_its_dtype_and_weighs_in_float32[grouped-query-bfloat16]",
    ),
    mistake(
        "mask-off-by-one",
        "a token does not see itself",
        (f"{JL}:visible", "distance >= 0", "distance > 0"),
        caught_by=MASKS.format("jax"),
        located=Found(LLAMA, ""),
    ),
    mistake(
        "mask-one-ahead",
        "a token sees the next one",
        (f"{TL}:visible", "distance >= 0", "distance >= -1"),
        caught_by=MASKS.format("torch"),
        located=Found(LLAMA, ""),
    ),
    mistake(
        "padding-visible",
        "padding can be attended to",
        (f"{TL}:visible", "key_positions[:, None, :] >= 0", "key_positions[:, None, :] >= -1"),
        caught_by=MASKS.format("torch"),
        located=Found(LLAMA, ""),
    ),
    mistake(
        "window-off-by-one",
        "the sliding window is one position too wide",
        (f"{JL}:visible", "jnp.abs(distance) < window", "jnp.abs(distance) <= window"),
        caught_by=MECHANISM,
        located=Found("attention", ""),
    ),
    mistake(
        "window-one-sided",
        "without the causal rule the window bounds the past and not the future",
        (f"{TL}:visible", "torch.abs(distance) < window", "distance < window"),
        caught_by=MASKS.format("torch"),
        located=Found("attention", ""),
    ),
    # Norms, features, head
    mistake(
        "epsilon-from-a-default",
        "RMSNorm uses 1e-6 where the configuration says 1e-5",
        (f"{JL}:RMSNorm.__init__", "self.eps = eps", "self.eps = 1e-6"),
        caught_by=LOGITS,
        located=Found(LLAMA, "layers.0.attn_norm"),
    ),
    mistake(
        "epsilon-outside-the-root",
        "epsilon is added to the standard deviation instead of the variance",
        (
            f"{TL}:LayerNorm.forward",
            "torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + self.eps)",
            "(1 / (torch.sqrt(torch.mean(wide * wide, dim=-1, keepdim=True)) + self.eps))",
        ),
        caught_by=TRANSLATION,
        located=Found(TRANSFORMER, "encoder.0.self_attn_norm"),
    ),
    mistake(
        "variance-over-n-minus-1",
        "LayerNorm divides by n - 1, as a sample's variance",
        (
            f"{TL}:LayerNorm.forward",
            "torch.mean(wide * wide, dim=-1, keepdim=True)",
            "torch.var(wide, dim=-1, keepdim=True)",
        ),
        caught_by=TRANSLATION,
        located=Found(TRANSFORMER, "encoder.0.self_attn_norm"),
    ),
    mistake(
        "norm-offset",
        "RMSNorm multiplies by 1 + scale",
        (f"{TL}:RMSNorm.forward", "* self.weight", "* (1 + self.weight)"),
        caught_by=LOGITS,
        located=Found(LLAMA, "layers.0.attn_norm"),
    ),
    mistake(
        "norms-exchanged",
        "a block's two norms stand in each other's place",
        (f"{JLLAMA}:Block.__call__", "self.attn_norm(x)", "self.mlp_norm(x)"),
        (f"{JLLAMA}:Block.__call__", "self.mlp(self.mlp_norm(x))", "self.mlp(self.attn_norm(x))"),
        caught_by=LOGITS,
        located=Found(LLAMA, "layers.0"),
    ),
    mistake(
        "final-norm-missing",
        "the last norm's output is not used",
        (f"{TLLAMA}:Llama.hidden", "return self.norm(x), cache", "self.norm(x)\n        return x, cache"),
        caught_by=LOGITS,
        located=Found(LLAMA, ""),
    ),
    mistake(
        "residual-after-the-norm",
        "the residual stream goes on from the normalised values",
        (
            f"{JLLAMA}:Block.__call__",
            "x + self.mlp(self.mlp_norm(x))",
            "self.mlp_norm(x) + self.mlp(self.mlp_norm(x))",
        ),
        caught_by=LOGITS,
        located=Found(LLAMA, "layers.0"),
    ),
    mistake(
        "gelu-for-silu",
        "the gate goes through GELU",
        (f"{JLLAMA}:MLP.__call__", "jax.nn.silu", "jax.nn.gelu"),
        caught_by=LOGITS,
        located=Found(LLAMA, "layers.0.mlp"),
    ),
    mistake(
        "gelu-by-tanh",
        "GELU is the approximation by tanh",
        (TL, 'approximate="none"', 'approximate="tanh"'),
        caught_by=GELU,
        located=Found("transformer-gelu", "encoder.0.mlp"),
    ),
    mistake(
        "gate-and-up-exchanged",
        "the activation goes to the wrong one of two products",
        (
            f"{TLLAMA}:MLP.forward",
            "silu(self.gate_proj(x)) * self.up_proj(x)",
            "silu(self.up_proj(x)) * self.gate_proj(x)",
        ),
        caught_by=LOGITS,
        located=Found(LLAMA, "layers.0.mlp"),
    ),
    mistake(
        "head-untied",
        "the head reads the source's table where it is tied to the target's",
        (
            f"{TT}:Transformer.head",
            "self.embed.weight",
            "self.source_embed.weight[: self.config.target_vocab_size]",
        ),
        caught_by=GELU,
        located=Found("transformer-gelu", ""),
    ),
    mistake(
        "head-untied-in-training",
        "no gradient flows from the tied head into the embedding",
        (f"{TT}:Transformer.head", "self.embed.weight", "self.embed.weight.detach()"),
        caught_by="test_transformer.py::test_gradients_jax_match_torch[paper-None]",
        located=Found("transformer-gradients", ""),
    ),
    # The Transformer
    mistake(
        "pre-norm-for-post-norm",
        "the encoder normalises before attention instead of after the sum",
        (
            f"{TT}:EncoderLayer.forward",
            "mixed = self.self_attn(x, *self.self_attn.keys_values(x), mask, subkey(key, 0))",
            "n = self.self_attn_norm(x)\n"
            "        mixed = self.self_attn(n, *self.self_attn.keys_values(n), mask, subkey(key, 0))",
        ),
        (
            f"{TT}:EncoderLayer.forward",
            "self.self_attn_norm(x + dropout(mixed, self.dropout, subkey(key, 1)))",
            "x + dropout(mixed, self.dropout, subkey(key, 1))",
        ),
        caught_by=TRANSLATION,
        located=Found(TRANSFORMER, "encoder.0"),
    ),
    mistake(
        "embedding-scale-missing",
        "embeddings are not multiplied by sqrt(D)",
        (f"{JT}:Transformer._place", "x * self.config.d_model**0.5", "x"),
        caught_by=TRANSLATION,
        located=Found(TRANSFORMER, ""),
    ),
    mistake(
        "sinusoids-in-halves",
        "all sines come first where they should alternate with the cosines",
        (f"{TT}:sinusoids", "-1 if config.positions_interleaved else -2", "-2"),
        caught_by=TRANSLATION,
        located=Found(TRANSFORMER, ""),
    ),
    mistake(
        "positions-from-one",
        "the first position is 1",
        (f"{JT}:sinusoids", "positions + config.position_offset", "positions + config.position_offset + 1"),
        caught_by=TRANSLATION,
        located=Found(TRANSFORMER, ""),
    ),
    mistake(
        "source-padding-visible",
        "the decoder attends to the source's padding",
        (f"{JT}:DecoderLayer.__call__", "cross.positions >= 0", "cross.positions >= -1"),
        caught_by=TRANSLATION,
        located=Found(TRANSFORMER, "decoder.0"),
    ),
    mistake(
        "encoder-causal",
        "a source token sees only those before it",
        (f"{TT}:Transformer.encode", ", causal=False", ""),
        caught_by=TRANSLATION,
        located=Found(TRANSFORMER, ""),
    ),
    mistake(
        "cross-cache-of-another-layer",
        "every decoder layer attends with the first one's keys",
        (f"{JT}:DecoderLayer.__call__", "cross.k[i]", "cross.k[0]"),
        caught_by=TRANSLATION,
        located=Found(TRANSFORMER, "decoder.1"),
    ),
)
