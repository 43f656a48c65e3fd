"""Mistakes around the models: caches, random bits, weight maps, configurations, optimizers, search."""

from __future__ import annotations

from mutations.mutation import Found, mistake

JL, TL = "jax_models.layers", "torch_models.layers"
CACHED = "test_llama.py::test_cached_decoding_matches_full_pass[5-{}]"
RING = "test_attention.py::test_cached_decoding_matches_full_pass[{}-7-5]"
MARIAN = "test_transformer.py::test_every_submodule_matches_transformers[marian]"
PORTED = "test_llama.py::test_ported_folder_loads_in_transformers_and_matches[grouped-query]"
FREQUENCIES = "test_configs.py::test_reading_matches_transformers[rope_parameters scaled]"
DROPOUT = "test_transformer.py::test_dropout_jax_matches_torch[paper]"
DEFAULTS = "test_configs.py::test_defaults_match_transformers"
UPDATES = "test_optimizers.py::test_updates_match_the_papers_formulas[{}]"
BEAMS = "test_beam.py::test_jax_matches_torch_and_transformers[marian-default]"
RECIPE = "twinformers.training.adamw"

CACHES = (
    mistake(
        "cache-slot-off-by-one",
        "values are written one slot beside their keys",
        (f"{TL}:store", "cache.v[layer][rows, :, slots]", "cache.v[layer][rows, :, slots - 1]"),
        caught_by=CACHED.format("torch"),
    ),
    mistake(
        "ring-one-slot-short",
        "positions wrap around one slot before the ring ends",
        (f"{JL}:place", "positions % length", "positions % (length - 1)"),
        caught_by=RING.format("jax"),
    ),
    mistake(
        "padding-written-to-the-ring",
        "padding goes to the last slot instead of the scratch slot",
        (f"{TL}:place", "torch.where(kept, positions % length, length)", "positions % length"),
        caught_by="test_caches.py::test_padding_between_tokens_takes_no_slot[torch-7-5]",
    ),
    mistake(
        "scratch-slot-visible",
        "what padding leaves in the scratch slot counts as position 0",
        (f"{JL}:place", "jnp.where(kept, positions, -1)", "jnp.where(kept, positions, 0)"),
        caught_by=CACHED.format("jax"),
    ),
    mistake(
        "empty-slots-visible",
        "slots that nothing was written to count as position 0",
        (f"{TL}:empty_cache", "length + 1), -1,", "length + 1), 0,"),
        caught_by=CACHED.format("torch"),
    ),
    mistake(
        "positions-not-noted",
        "the cache does not learn which positions it holds",
        (f"{JL}:place", "return slots, cache._replace(positions=noted)", "return slots, cache"),
        caught_by=CACHED.format("jax"),
    ),
    mistake(
        "cache-not-advanced",
        "the new cache that an update returns is dropped",
        ("jax_models.llama:Attention.__call__", "cache, k, v = store(", "_, k, v = store("),
        caught_by=CACHED.format("jax"),
    ),
    mistake(
        "cache-of-another-layer",
        "every layer reads the first one's values",
        (f"{TL}:store", "cache.v[layer].swapaxes", "cache.v[0].swapaxes"),
        caught_by=CACHED.format("torch"),
    ),
    mistake(
        "call-overwrites-itself",
        "of a call longer than the cache, earlier tokens are kept as well as later ones",
        (
            f"{JL}:place",
            "(positions >= 0) & (positions > positions.max(axis=1, keepdims=True) - length)",
            "positions >= 0",
        ),
        caught_by="test_caches.py::test_a_call_longer_than_its_cache_leaves_the_last_positions[jax]",
    ),
)

RANDOMNESS = (
    mistake(
        "dropout-not-scaled",
        "what is kept is not scaled up",
        (f"{TL}:dropout", "x * (1 / (1 - rate))", "x"),
        caught_by=DROPOUT,
    ),
    mistake(
        "dropout-keeps-what-it-should-drop",
        "the rate is taken for the probability to keep, in both frameworks",
        (f"{JL}:dropout", "round((1 - rate) * 2**32)", "round(rate * 2**32)"),
        (f"{TL}:dropout", "round((1 - rate) * 2**32)", "round(rate * 2**32)"),
        caught_by="test_transformer.py::test_dropout_masks_are_equal_and_have_their_rate",
    ),
    mistake(
        "layer-keys-not-folded",
        "all encoder layers drop by the same key",
        ("jax_models.transformer:Transformer.encode", "subkey(key, i)", "key"),
        caught_by=DROPOUT,
    ),
    mistake(
        "dropout-after-the-norm",
        "both frameworks drop the sum with the residual instead of what is added",
        (
            "jax_models.transformer:DecoderLayer.__call__",
            "x + dropout(mixed, self.dropout, subkey(key, 3))",
            "dropout(x + mixed, self.dropout, subkey(key, 3))",
        ),
        (
            "torch_models.transformer:DecoderLayer.forward",
            "x + dropout(mixed, self.dropout, subkey(key, 3))",
            "dropout(x + mixed, self.dropout, subkey(key, 3))",
        ),
        caught_by="test_transformer.py::test_dropout_stands_where_transformers_has_it[marian]",
    ),
    mistake(
        "threefry-rotation",
        "one of the generator's rotations is wrong",
        ("torch_models.random", "(13, 15, 26, 6)", "(13, 15, 26, 7)"),
        caught_by="test_llama.py::test_threefry_in_torch_matches_jax",
    ),
)

MAPS = (
    mistake(
        "square-matrix-transposed",
        "Hugging Face's output projection is read transposed; it is square, so every shape fits",
        (
            "twinformers.weight_maps.transformer:_linear",
            '{"hf": f"{hf}.{leaf}", "torch.nn"',
            '{"hf": (f"{hf}.{leaf}", "D O") if f"{hf[-4:]}.{leaf}" == "proj.weight" else f"{hf}.{leaf}", '
            '"torch.nn"',
        ),
        caught_by=MARIAN,
        located=Found("marian-hf", "encoder.0.self_attn.o_proj"),
    ),
    mistake(
        "query-and-key-exchanged",
        "Hugging Face's query and key projections are read into each other's place",
        (
            "twinformers.weight_maps.transformer:_attention",
            '"hf": f"{hf}.{name}.weight"',
            "\"hf\": f\"{hf}.{dict(q_proj='k_proj', k_proj='q_proj').get(name, name)}.weight\"",
        ),
        caught_by=MARIAN,
        located=Found("marian-hf", "encoder.0.self_attn.k_proj"),
    ),
    mistake(
        "gate-and-up-exchanged-in-the-map",
        "Hugging Face's two parallel products are read into each other's place",
        ("twinformers.weight_maps.llama", 'hf=f"{HF}.mlp.gate_proj.weight"', 'hf=f"{HF}.mlp.UP.weight"'),
        ("twinformers.weight_maps.llama", 'hf=f"{HF}.mlp.up_proj.weight"', 'hf=f"{HF}.mlp.gate_proj.weight"'),
        ("twinformers.weight_maps.llama", 'hf=f"{HF}.mlp.UP.weight"', 'hf=f"{HF}.mlp.up_proj.weight"'),
        caught_by=PORTED,
        # The map pairs the submodules too: each agrees with its partner, what they make up does not.
        located=Found("llama-hf", "layers.0.mlp"),
    ),
    mistake(
        "norms-exchanged-in-the-map",
        "Hugging Face's two norms of a block are read into each other's place",
        ("twinformers.weight_maps.llama", 'hf=f"{HF}.input_layernorm.weight"', 'hf=f"{HF}.OTHER.weight"'),
        (
            "twinformers.weight_maps.llama",
            'hf=f"{HF}.post_attention_layernorm.weight"',
            'hf=f"{HF}.input_layernorm.weight"',
        ),
        (
            "twinformers.weight_maps.llama",
            'hf=f"{HF}.OTHER.weight"',
            'hf=f"{HF}.post_attention_layernorm.weight"',
        ),
        caught_by=PORTED,
        located=Found("llama-hf", "layers.0"),
    ),
    mistake(
        "fused-parts-in-the-wrong-order",
        "queries and keys change places in the matrix that torch.nn packs them into",
        (
            "twinformers.weight_maps.transformer:_attention",
            'enumerate(("q_proj", "k_proj", "v_proj"))',
            'zip((1, 0, 2), ("q_proj", "k_proj", "v_proj"))',
        ),
        caught_by="test_transformer.py::test_hidden_states_match_torch_nn_transformer[relu]",
    ),
    mistake(
        "meta-rows-not-permuted",
        "Meta's interleaved query rows are taken for halves",
        (
            "twinformers.weight_maps.llama",
            'meta=(f"{META}.attention.wq.weight", "(N h r) D")',
            'meta=f"{META}.attention.wq.weight"',
        ),
        caught_by="test_meta.py::test_logits_of_both_twins_match_metas_model[llama2-1]",
    ),
    mistake(
        "flax-kernel-not-transposed",
        "a square kernel reaches Flax as PyTorch has it",
        (
            "twinformers.weight_maps.transformer:_linear",
            "[Linear(path, axes, **weight)",
            "[(lambda row: replace(row, places={**row.places, 'jax': replace(row.places['jax'], axes=axes)})"
            " if axes == 'O D' else row)(Linear(path, axes, **weight))",
        ),
        caught_by="test_transformer.py::test_logits_jax_matches_torch[paper-0]",
        located=Found("transformer", "encoder.0.self_attn.o_proj"),
    ),
)

CONFIGURATIONS = (
    mistake(
        "default-epsilon",
        "a file that omits rms_norm_eps is read as 1e-5",
        ("twinformers.configs.llama:LlamaConfig", '"rms_norm_eps": 1e-6', '"rms_norm_eps": 1e-5'),
        caught_by=DEFAULTS,
    ),
    mistake(
        "default-tying",
        "a file that does not say so is read as tied",
        (
            "twinformers.configs.llama:LlamaConfig",
            '"tie_word_embeddings": False',
            '"tie_word_embeddings": True',
        ),
        caught_by=DEFAULTS,
    ),
    mistake(
        "rope-parameters-ignored",
        "only the old spelling of theta and scaling is read",
        (
            "twinformers.configs._rope:read_rope",
            '"rope_scaling" if raw.get("rope_scaling") else "rope_parameters"',
            '"rope_scaling"',
        ),
        caught_by="test_configs.py::test_reading_matches_transformers[rope_parameters]",
    ),
    mistake(
        "llama3-bands-exchanged",
        "high frequencies are stretched and low ones kept",
        (
            "twinformers.configs._rope:rotary_frequencies",
            "keep * f + (1 - keep) * f / scaling.factor",
            "(1 - keep) * f + keep * f / scaling.factor",
        ),
        caught_by=FREQUENCIES,
        located=Found("llama-hf", ""),
    ),
    mistake(
        "llama3-without-a-band-between",
        "frequencies between the bands are scaled like the low ones",
        (
            "twinformers.configs._rope:rotary_frequencies",
            "min(max((turns - low) / (high - low), 0.0), 1.0)",
            "float(turns > high)",
        ),
        caught_by=FREQUENCIES,
        located=Found("llama-hf", ""),
    ),
    mistake(
        "fairseq-offset-missing",
        "FSMT's positions count from 0 instead of after the padding token's id",
        ("twinformers.configs.transformer:TransformerConfig.position_offset", "self.pad_token_id + 1", "0"),
        caught_by="test_transformer.py::test_every_submodule_matches_transformers[fsmt]",
    ),
)

OPTIMIZERS = (
    mistake(
        "weight-decay-from-a-default",
        "torch.optim's own weight decay stays",
        (f"{RECIPE}:torch_adamw", ', "weight_decay": recipe.weight_decay}', "}"),
        caught_by=UPDATES.format("by_torch"),
    ),
    mistake(
        "epsilon-of-adam-from-a-default",
        "optax's own epsilon stays",
        (f"{RECIPE}:optax_adamw", "        eps=recipe.eps,\n", ""),
        caught_by=UPDATES.format("by_optax"),
    ),
    mistake(
        "betas-from-a-default",
        "torch.optim's own betas stay",
        (f"{RECIPE}:torch_adamw", "betas=(recipe.b1, recipe.b2), ", ""),
        caught_by=UPDATES.format("by_torch"),
    ),
    mistake(
        "decay-coupled",
        "decay is added to the gradient, as in Adam with L2",
        (f"{RECIPE}:torch_adamw", "torch.optim.AdamW(", "torch.optim.Adam("),
        caught_by=UPDATES.format("by_torch"),
    ),
    mistake(
        "clipping-with-torchs-guard",
        "1e-6 is added to the norm before clipping, as torch.nn.utils does",
        (f"{RECIPE}:torch_adamw", "recipe.clip / norm", "recipe.clip / (norm + 1e-6)"),
        caught_by=UPDATES.format("by_torch"),
    ),
    mistake(
        "clipping-per-tensor",
        "each gradient is clipped by its own norm",
        (f"{RECIPE}:optax_adamw", "recipe.clip / norm, 1.0", "recipe.clip / jnp.sqrt(jnp.sum(g * g)), 1.0"),
        caught_by=UPDATES.format("by_optax"),
    ),
    mistake(
        "norms-decay",
        "scales and biases decay like matrices, in both frameworks",
        (f"{RECIPE}:decays", "len(shape) >= 2", "len(shape) >= 1"),
        caught_by=UPDATES.format("by_optax"),
    ),
    mistake(
        "bias-correction-off-by-one",
        "a run that goes on from saved moments counts one update too few",
        ("twinformers.parity.training:TorchRun.adopt", "float(updates)", "float(updates - 1)"),
        caught_by="test_optimizers.py::test_twins_train_alike_from_the_same_state",
    ),
    mistake(
        "schedule-off-by-one",
        "update n has the rate of update n - 1",
        (
            f"{RECIPE}:AdamW.rate",
            "        if update <= self.warmup:",
            "        update -= 1\n        if update <= self.warmup:",
        ),
        caught_by="test_optimizers.py::test_rates_match_values_computed_by_hand",
    ),
)

SEARCH = (
    mistake(
        "beams-not-reordered",
        "the cache's rows stay where they were when beams change places",
        ("jax_models.beam:advance", "cache=reorder(cache, rows.reshape(B * n))", "cache=cache"),
        caught_by=BEAMS,
    ),
    mistake(
        "length-penalty-off-by-one",
        "a translation's length does not count its last token",
        ("torch_models.beam:advance", "best / divisors[t]", "best / divisors[max(t - 1, 0)]"),
        caught_by="test_beam.py::test_torch_matches_transformers[marian-long ones-2]",
    ),
)

AROUND = CACHES + RANDOMNESS + MAPS + CONFIGURATIONS + OPTIMIZERS + SEARCH
