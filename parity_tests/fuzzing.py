"""Random valid models and inputs through both twins and an implementation of other making, in float64.

A case is a dictionary that JSON can hold; `check(case)` measures it. A disagreement names the command that
repeats it. The reference is transformers for LLaMA, Mistral, GPT-2, BERT, Marian and FSMT, and plain numpy
for the mechanisms of attention; the paper's own layout, which transformers lacks, has its twins alone, with
dropout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from test_attention import Module, Shape, by_hand, draw

import jax_models.random
import torch_models.random
import twinformers
from jax_models import functional
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.configs import RopeScaling, config_class
from twinformers.configs import bert as bert_config
from twinformers.configs import gpt2 as gpt2_config
from twinformers.configs.transformer import ACTIVATIONS, SPELLINGS, TransformerConfig
from twinformers.parity.kinds import kind
from twinformers.parity.limits import OUTPUTS
from twinformers.parity.reference import float64_throughout, reference_model
from twinformers.parity.twins import jax_precision

Case = dict[str, Any]
#: Largest differences by what was compared, relative to the largest value on the right.
Gaps = dict[str, float]
# Each program runs once: XLA's optimizations would cost more than they save.
QUICK = {"xla_backend_optimization_level": 0}


class Drawn(PresetCheckpoint):
    """Random weights, drawn once for all three readers."""

    def __init__(self, config: Any, number: int):
        super().__init__("fuzz", config, number)
        self.drawn: dict[str, np.ndarray] = {}

    def read(self, name: str) -> np.ndarray:
        if name not in self.drawn:
            self.drawn[name] = super().read(name)
        return self.drawn[name]


class Disagreement(AssertionError):
    """Two implementations differ on a case; the message says how to see it again."""


# What there is to draw


def log_uniform(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(math.log(low), math.log(high)).map(math.exp)


@st.composite
def layouts(draw: Any, width: int, rows: int, far: int = 0) -> list[list[int]]:
    """For each row how many tokens pad it on the left and on the right, and the first position."""
    found = []
    for _ in range(rows):
        left = draw(st.integers(0, width - 1))
        found.append([left, draw(st.integers(0, width - 1 - left)), draw(st.integers(0, far))])
    return found


@st.composite
def scalings(draw: Any) -> Case | None:
    match draw(st.sampled_from(["none", "linear", "llama3"])):
        case "linear":
            return {"rope_type": "linear", "factor": draw(st.floats(1, 16))}
        case "llama3":
            low = draw(st.floats(0.25, 4))
            return {
                "rope_type": "llama3",
                "factor": draw(st.floats(1, 32)),
                "low_freq_factor": low,
                "high_freq_factor": low * draw(st.floats(1.25, 8)),
                "original_max_position_embeddings": draw(st.integers(8, 400)),
            }
    return None


@st.composite
def llama(draw: Any) -> Case:
    K, G = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    N, chunk, pieces = K * G, draw(st.integers(1, 6)), draw(st.integers(1, 4))
    config = {
        "vocab_size": draw(st.integers(3, 40)),
        # Narrower ones cancel to almost nothing now and then, and the next norm enlarges the rounding.
        "hidden_size": N * draw(st.integers(-(-4 // N), 6)) if N < 4 else N * draw(st.integers(1, 4)),
        "intermediate_size": draw(st.integers(1, 20)),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": 2 * draw(st.integers(1, 5)),
        "rms_norm_eps": draw(log_uniform(1e-8, 1e-1)),
        "rope_theta": draw(log_uniform(10, 1e7)),
        "rope_scaling": draw(scalings()),
        "max_position_embeddings": 2048,
        "tie_word_embeddings": draw(st.booleans()),
    }
    return {
        "kind": "llama",
        "config": config,
        "seed": draw(st.integers(0, 999)),
        "length": chunk * pieces,
        "rows": draw(layouts(chunk * pieces, draw(st.integers(1, 3)), far=500)),
        "chunk": draw(st.sampled_from([0, chunk])),
    }


@st.composite
def mistral(draw: Any) -> Case:
    case = draw(llama())
    window = draw(st.none() | st.integers(1, 9))
    return {**case, "kind": "mistral", "config": case["config"] | {"sliding_window": window}}


@st.composite
def gpt2(draw: Any) -> Case:
    N, chunk, pieces = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    config = {
        "vocab_size": draw(st.integers(3, 40)),
        "hidden_size": N * draw(st.integers(-(-4 // N), 6)),
        "intermediate_size": draw(st.integers(1, 20)),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": N,
        "max_position_embeddings": 600,
        "layer_norm_epsilon": draw(log_uniform(1e-8, 1e-1)),
        "activation_function": draw(st.sampled_from(gpt2_config.ACTIVATIONS)),
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.1),
        "tie_word_embeddings": draw(st.booleans()),
    }
    return {
        "kind": "gpt2",
        "config": config,
        "seed": draw(st.integers(0, 999)),
        "length": chunk * pieces,
        "rows": draw(layouts(chunk * pieces, draw(st.integers(1, 3)), far=500)),
        "chunk": draw(st.sampled_from([0, chunk])),
    }


@st.composite
def bert(draw: Any) -> Case:
    N, width = draw(st.integers(1, 4)), draw(st.integers(1, 20))
    config = {
        "vocab_size": draw(st.integers(3, 40)),
        "hidden_size": N * draw(st.integers(-(-4 // N), 6)),
        "intermediate_size": draw(st.integers(1, 20)),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": N,
        "max_position_embeddings": 600,
        "type_vocab_size": draw(st.integers(1, 4)),
        "hidden_act": draw(st.sampled_from(bert_config.ACTIVATIONS)),
        "layer_norm_eps": draw(log_uniform(1e-8, 1e-1)),
        **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.1),
        "masked_lm_head": draw(st.booleans()),
        "pooler": draw(st.booleans()),
    }
    return {
        "kind": "bert",
        "config": config,
        "seed": draw(st.integers(0, 999)),
        "length": width,
        "rows": draw(layouts(width, draw(st.integers(1, 3)), far=500)),
        "chunk": 0,
    }


@st.composite
def transformer(draw: Any) -> Case:
    heads = [draw(st.integers(1, 4)) for _ in range(2)]
    unit = math.lcm(2, *heads)
    spelling = draw(st.sampled_from(sorted(SPELLINGS)))
    share, tie = draw(st.sampled_from(SPELLINGS[spelling].sharing))
    source, target = draw(st.integers(3, 40)), draw(st.integers(3, 40))
    rates = st.floats(0.05, 0.9) if spelling == "transformer" else st.just(0.0)
    token = st.integers(0, min(source, source if share else target) - 1)
    chunk, pieces = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    rows, width = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    config = {
        "model_type": spelling,
        "source_vocab_size": source,
        "target_vocab_size": source if share else target,
        "d_model": unit * draw(st.integers(-(-4 // unit), max(2, 16 // unit))),
        "encoder_layers": draw(st.integers(1, 2)),
        "decoder_layers": draw(st.integers(1, 2)),
        "encoder_attention_heads": heads[0],
        "decoder_attention_heads": heads[1],
        "encoder_ffn_dim": draw(st.integers(1, 20)),
        "decoder_ffn_dim": draw(st.integers(1, 20)),
        "activation_function": draw(st.sampled_from(ACTIVATIONS)),
        **{name: draw(rates) for name in ("dropout", "attention_dropout", "activation_dropout")},
        "scale_embedding": draw(st.booleans()),
        "share_embeddings": share,
        "tie_word_embeddings": tie,
        "max_position_embeddings": 64,
        "pad_token_id": draw(token),
        "eos_token_id": draw(token),
        "decoder_start_token_id": draw(token),
    }
    return {
        "kind": "transformer",
        "config": config,
        "seed": draw(st.integers(0, 999)),
        "source_length": width,
        "source_rows": draw(layouts(width, rows)),
        "length": chunk * pieces,
        "rows": draw(layouts(chunk * pieces, rows)),
        "chunk": draw(st.sampled_from([0, chunk])),
        "key": draw(st.none() | st.integers(0, 99)) if spelling == "transformer" else None,
    }


@st.composite
def attention(draw: Any) -> Case:
    module = draw(st.sampled_from(sorted(HEADS)))
    chunk, pieces = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    cached = module == "CachedMultiHeadAttention"
    N, K = HEADS[module](draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    return {
        "kind": "attention",
        "module": module,
        "sizes": {"D": draw(st.integers(1, 7)), "N": N, "K": K, "H": draw(st.integers(1, 6))},
        "causal": cached or draw(st.booleans()),
        "window": draw(st.none() | st.integers(1, 9)),
        "use_bias": draw(st.booleans()),
        "seed": draw(st.integers(0, 999)),
        "length": chunk * pieces,
        "rows": draw(layouts(chunk * pieces, draw(st.integers(1, 3)), far=500)),
        "chunk": draw(st.sampled_from([0, chunk])) if cached else 0,
    }


#: Query and key-value heads of each mechanism, from the number of groups and the heads in one.
HEADS: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "SelfAttention": lambda groups, each: (1, 1),
    "MultiHeadAttention": lambda groups, each: (groups * each, groups * each),
    "CachedMultiHeadAttention": lambda groups, each: (groups * each, groups * each),
    "MultiQueryAttention": lambda groups, each: (groups * each, 1),
    "GroupedQueryAttention": lambda groups, each: (groups * each, groups),
}
KINDS: dict[str, Callable[[], st.SearchStrategy[Case]]] = {
    "llama": llama,
    "mistral": mistral,
    "gpt2": gpt2,
    "bert": bert,
    "transformer": transformer,
    "attention": attention,
}


# What is computed


def places(length: int, rows: list[list[int]]) -> np.ndarray:
    """Each token's position in its row, -1 for padding. [B, T]"""
    found = np.full((len(rows), length), -1, np.int32)
    for row, (left, right, first) in zip(found, rows, strict=True):
        count = length - left - right
        row[left : left + count] = first + np.arange(count)
    return found


def check(case: Case) -> Gaps:
    """The largest differences; Disagreement, with the command that repeats it, where one is too large."""
    try:
        arrays, positions = RUN[case["kind"]](case)
        names, gaps = list(arrays), {}
        for n, right in enumerate(names):
            for left in names[:n]:
                gaps[f"{left} and {right}"] = difference(arrays[left], arrays[right], positions)
    except Exception as error:
        raise Disagreement(f"{type(error).__name__}: {error}\n{command(case)}") from error
    worst = max(gaps, key=gaps.__getitem__)
    if not gaps[worst] <= OUTPUTS:
        raise Disagreement(f"{worst} differ by {gaps[worst]:.1e}, more than {OUTPUTS:g}\n{command(case)}")
    return gaps


def command(case: Case) -> str:
    return f"repeat with: scripts/fuzz --repeat {shlex.quote(json.dumps(case))}"


def difference(left: np.ndarray, right: np.ndarray, positions: np.ndarray) -> float:
    """The largest difference over real tokens, relative to the largest value; infinite for no number."""
    real = positions >= 0
    a, b = left[real], right[real]
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.inf
    return float(np.abs(a - b).max() / np.abs(b).max())


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """transformers in float64 where it says float32, takes the default, or casts its table of positions."""
    before, tensor = torch.get_default_dtype(), torch.FloatTensor
    try:
        torch.set_default_dtype(torch.float64)
        torch.FloatTensor = torch.DoubleTensor  # type: ignore[assignment, misc]
        with float64_throughout(), torch.inference_mode():
            yield
    finally:
        torch.set_default_dtype(before)
        torch.FloatTensor = tensor  # type: ignore[misc]


def transformers_logits(checkpoint: PresetCheckpoint, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
    with exact():
        model = reference_model(checkpoint, "float64")
        logits = kind(checkpoint.config).reference(model, inputs, torch.float64)
    assert logits.dtype == torch.float64
    return logits.numpy()


def parts(case: Case) -> list[slice]:
    step = case["chunk"] or case["length"]
    return [slice(start, start + step) for start in range(0, case["length"], step)]


def run_decoder(case: Case) -> tuple[dict[str, np.ndarray], np.ndarray]:
    config: Any = config_class(case["kind"])(**case["config"] | rope(case))
    checkpoint = Drawn(config, case["seed"])
    positions = places(case["length"], case["rows"])
    tokens = np.random.default_rng(case["seed"]).integers(0, config.vocab_size, positions.shape, np.int32)

    def pieces(model: Any, call: Any, put: Any) -> list[Any]:
        # As few slots as there are positions, so that rows which begin late wrap around.
        cache, out = model.empty_cache(len(tokens), case["length"]) if case["chunk"] else None, []
        for part in parts(case):
            logits, cache = call(put(tokens[:, part]), put(positions[:, part]), cache)
            out.append(np.asarray(logits))
        return out

    with jax_precision("float64"):
        model = twinformers.load(checkpoint, "jax", "float64")
        apply, params = functional(model)
        compiled = jax.jit(apply, compiler_options=QUICK)
        left = pieces(model, lambda *given: compiled(params, *given), np.asarray)
    with torch.inference_mode():
        model = twinformers.load(checkpoint, "torch", "float64")
        right = pieces(model, model, torch.tensor)
    reference = transformers_logits(checkpoint, (tokens, positions))
    found = {"jax": np.concatenate(left, 1), "torch": np.concatenate(right, 1), "transformers": reference}
    return found, positions


def rope(case: Case) -> Case:
    """The scaling of the angles as an object, of those configurations that have one."""
    scaling = case["config"].get("rope_scaling")
    return {"rope_scaling": RopeScaling(**scaling)} if scaling else {}


def run_bert(case: Case) -> tuple[dict[str, np.ndarray], np.ndarray]:
    config = bert_config.BertConfig(**case["config"])
    checkpoint, rng = Drawn(config, case["seed"]), np.random.default_rng(case["seed"])
    positions = places(case["length"], case["rows"])
    tokens = rng.integers(0, config.vocab_size, positions.shape, np.int32)
    given = tokens, positions, rng.integers(0, config.type_vocab_size, positions.shape, np.int32)
    with jax_precision("float64"):
        apply, params = functional(twinformers.load(checkpoint, "jax", "float64"))
        left, _ = jax.jit(apply, compiler_options=QUICK)(params, *given)
        left = np.asarray(left)
    with torch.inference_mode():
        right, _ = twinformers.load(checkpoint, "torch", "float64")(*map(torch.tensor, given))
    found = {"jax": left, "torch": right.numpy(), "transformers": transformers_logits(checkpoint, given)}
    return found, positions


def run_transformer(case: Case) -> tuple[dict[str, np.ndarray], np.ndarray]:
    config = TransformerConfig(**case["config"])
    checkpoint, rng = Drawn(config, case["seed"]), np.random.default_rng(case["seed"])
    given: list[np.ndarray] = []
    for side, vocabulary in (("source_", config.source_vocab_size), ("", config.target_vocab_size)):
        positions = places(case[f"{side}length"], case[f"{side}rows"])
        if config.model_type == "marian":  # counts from the beginning of the row, padding too
            positions = np.where(positions < 0, -1, np.arange(positions.shape[1], dtype=np.int32))
        # The padding token itself stands only where padding is: FSMT tells padding by it.
        tokens = rng.choice(np.setdiff1d(np.arange(vocabulary), config.pad_token_id), positions.shape)
        given += [np.where(positions < 0, config.pad_token_id, tokens).astype(np.int32), positions]
    source, source_positions, tokens, positions = given

    def pieces(model: Any, call: Any, put: Any, key: Any) -> list[Any]:
        if not case["chunk"]:
            return [np.asarray(call("__call__")(*map(put, given), key=key)[0])]
        # Dropped elements depend on the shape of a call: with a cache there is no dropout.
        memory = call("encode")(put(source), put(source_positions))
        cross = call("cross_cache")(memory, put(source_positions))
        cache, out = model.empty_cache(len(tokens), case["length"]), []
        for part in parts(case):
            logits, cache = call("decode")(put(tokens[:, part]), put(positions[:, part]), cross, cache)
            out.append(np.asarray(logits))
        return out

    with jax_precision("float64"):
        model = twinformers.load(checkpoint, "jax", "float64")
        compiled: dict[str, Any] = {}

        def call(name: str) -> Any:
            if name not in compiled:
                apply, params = functional(model, name)
                step = jax.jit(apply, compiler_options=QUICK)
                compiled[name] = lambda *args, **options: step(params, *args, **options)
            return compiled[name]

        key = None if case["key"] is None else jax_models.random.key(case["key"])
        left = pieces(model, call, np.asarray, key)
    with torch.inference_mode():
        twin = twinformers.load(checkpoint, "torch", "float64")
        seeded = None if case["key"] is None else torch_models.random.key(case["key"])
        methods = {"__call__": twin}
        right = pieces(twin, lambda name: methods.get(name) or getattr(twin, name), torch.tensor, seeded)
    found = {"jax": np.concatenate(left, 1), "torch": np.concatenate(right, 1)}
    if config.model_type != "transformer":
        found["transformers"] = transformers_logits(checkpoint, tuple(given))
    return found, positions


def run_attention(case: Case) -> tuple[dict[str, np.ndarray], np.ndarray]:
    shape, positions = Shape(case["module"], **case["sizes"]), places(case["length"], case["rows"])
    options = {name: case[name] for name in ("causal", "window", "use_bias")}
    x = np.random.default_rng(case["seed"]).standard_normal((*positions.shape, shape.D))
    weights, found = draw(shape.table(case["use_bias"]), case["seed"]), {}
    for framework, device in (("jax", jax.devices("cpu")[0]), ("torch", "cpu")):
        with jax_precision("float64"):
            module = Module(framework, shape, device, weights=weights, **options)
            if not case["chunk"]:
                found[framework] = module(x, positions)
                continue
            slots = case["length"] if case["window"] is None else case["window"] + case["chunk"] - 1
            found[framework], _ = module.cached(x, positions, parts(case), slots)
    found["numpy"], _ = by_hand(shape, weights, x, positions, case["causal"], case["window"])
    return found, positions


RUN = {
    "llama": run_decoder,
    "mistral": run_decoder,
    "gpt2": run_decoder,
    "bert": run_bert,
    "transformer": run_transformer,
    "attention": run_attention,
}


# Many of them


def fuzz(name: str, examples: int, number: int, on_case: Callable[[Case, Gaps], None]) -> None:
    """Check so many random cases of one kind; Disagreement for the smallest one that fails."""

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(KINDS[name]())
    def run(case: Case) -> None:
        on_case(case, check(case))

    run()


def features(case: Case) -> list[str]:
    """What a case has besides the ordinary, for counting."""
    config = case.get("config", case)
    names = [f"{case['kind']} cases"]
    if (name := case["kind"]) in ("llama", "mistral"):
        names.append(f"{name}, scaling {(config['rope_scaling'] or {'rope_type': 'none'})['rope_type']}")
        names += [f"{name}, tied head"] * config["tie_word_embeddings"]
        names += [f"{name}, grouped heads"] * (
            config["num_attention_heads"] > config["num_key_value_heads"] > 1
        )
        names += [f"{name}, window"] * (config.get("sliding_window") is not None)
    elif name == "gpt2":
        names.append(f"gpt2, {config['activation_function']}")
        names += ["gpt2, tied head"] * config["tie_word_embeddings"]
    elif name == "bert":
        names.append(f"bert, {config['hidden_act']}")
        names += ["bert, masked-language-model head"] * config["masked_lm_head"]
        names += ["bert, pooler"] * config["pooler"]
    elif case["kind"] == "transformer":
        names.append(f"transformer, spelled {config['model_type']}")
        names += ["transformer, tables shared"] * config["share_embeddings"]
        names += ["transformer, dropout"] * (case["key"] is not None and not case["chunk"])
    else:
        names.append(f"attention, {case['module']}")
        names += ["attention, window"] * (case["window"] is not None)
    names += [f"{case['kind']}, with a cache"] * bool(case["chunk"])
    names += [f"{case['kind']}, padding"] * any(left or right for left, right, _ in case["rows"])
    return names


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--examples", type=int, default=100, help="how many cases in all")
    parser.add_argument("--seed", type=int, help="of the first kind; a run with the same one draws the same")
    parser.add_argument("--kind", choices=KINDS, action="append", help="by default all, in equal parts")
    parser.add_argument("--repeat", metavar="JSON", help="check this one case")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the figures as Markdown")
    options = parser.parse_args(arguments)
    if options.repeat:
        try:
            gaps = check(json.loads(options.repeat))
        except Disagreement as error:
            print(error)
            return 1
        print("\n".join(f"{name}: {gap:.1e}" for name, gap in gaps.items()))
        return 0
    kinds = options.kind or list(KINDS)
    first = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    counts: Counter[str] = Counter()
    worst: dict[tuple[str, str], float] = {}
    distinct: set[str] = set()
    start = time.perf_counter()

    def note(case: Case, gaps: Gaps) -> None:
        if (text := json.dumps(case)) in distinct:
            return
        distinct.add(text)
        counts.update(features(case))
        for pair, gap in gaps.items():
            worst[case["kind"], pair] = max(gap, worst.get((case["kind"], pair), 0.0))
        if len(distinct) % 50 == 0:
            jax.clear_caches()  # which would grow with every shape
            print(f"{len(distinct)} cases, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)

    print(f"seed {first}", file=sys.stderr, flush=True)
    for n, name in enumerate(kinds):
        wanted, number = len(range(n, options.examples, len(kinds))), first + n
        try:
            # Some are drawn twice: go on, with other seeds, until there are as many different ones. Each run
            # begins with the simplest case of all, which only the first one counts.
            while (missing := wanted - (known := counts[f"{name} cases"])) > 0:
                fuzz(name, missing + bool(known), number, note)
                number += len(kinds)
        except Disagreement as error:
            print(error)
            return 1
    lines = [f"{len(distinct)} different cases, no disagreement; seed {first}.", ""]
    lines += ["| kind | compared | largest difference |", "|---|---|---|"]
    lines += [f"| {k} | {pair} | {gap:.1e} |" for (k, pair), gap in sorted(worst.items())]
    lines += ["", "| among them | cases |", "|---|---|"]
    lines += [f"| {name} | {count} |" for name, count in sorted(counts.items())]
    print("\n".join(lines))
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text("\n".join([*REPORT, *lines, ""]), encoding="utf-8")
    return 0


REPORT = [
    "# Differential fuzzing",
    "",
    "Random valid configurations, weights and inputs through both twins and an implementation of other",
    f"making, in float64. The limit is {OUTPUTS:g} of the largest value. Written by",
    "`scripts/fuzz --examples N --report FILE`; a disagreement would print the command that repeats it.",
    "",
]

if __name__ == "__main__":
    sys.exit(main())
