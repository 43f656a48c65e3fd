"""The verbs' signatures. Bodies live in one module per verb and are imported when the verb runs."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from twinformers.cli import train_text
from twinformers.errors import TwinformersError

app = typer.Typer(
    help="Every transformer written twice, in Flax NNX and in PyTorch, and proven equal.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Source = Annotated[
    str,
    typer.Argument(help="A path, preset:NAME[@SEED], demo, demo:minilm, or a hub id org/name[@revision]."),
]


def _no_bars(json: bool) -> bool:
    """The hub's progress bars are not for machines either."""
    if json:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return json


Json = Annotated[bool, typer.Option("--json", callback=_no_bars, help="Print JSON alone on stdout.")]
Text = Optional[str]  # noqa: UP045  (typer resolves annotations at run time)
Attention = Annotated[str, typer.Option(help="einsum, or fused: the device's fastest kernel.")]


@app.command("list", epilog="Example: twinformers list --json")
def list_(json: Json = False) -> None:
    """List architectures and presets with their parameter counts."""
    from twinformers.cli import list as verb

    verb.run(json=json)


@app.command(epilog="Example: twinformers inspect demo")
def inspect(
    source: Source,
    check: Annotated[bool, typer.Option("--check", help="Read every file and compare its checksum.")] = False,
    json: Json = False,
) -> None:
    """Show format, configuration, parameters and tensors of a source; reads headers only."""
    from twinformers.cli import inspect as verb

    verb.run(source, check=check, json=json)


@app.command(epilog="Example: twinformers port demo ./smollm2-jax --to jax --dtype bfloat16")
def port(
    source: Source,
    dest: Annotated[Path, typer.Argument(help="The folder to write, or NAME.gguf.")],
    to: Annotated[str, typer.Option(help="hf, torch, jax or gguf.")],
    dtype: Annotated[str, typer.Option(help="keep, float64, float32, bfloat16 or float16.")] = "keep",
    kv_heads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Pool the key and value heads to this many (grouped-query attention)."),
    ] = None,
    shard_size: Annotated[str, typer.Option(help="The most bytes in a file: 5GB, 500MB.")] = "5GB",
    check: Annotated[bool, typer.Option("--check", help="Compare the source's checksums first.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse NaN and infinite weights.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    json: Json = False,
) -> None:
    """Write a source as a Hugging Face, PyTorch or Flax folder, or as a GGUF file."""
    from twinformers.cli import port as verb

    options = {"dtype": dtype, "kv_heads": kv_heads, "check": check, "strict": strict, "overwrite": overwrite}
    verb.run(source, dest, to=to, shard_size=shard_size, options=options, json=json)


@app.command(epilog='Example: twinformers generate demo --framework both --chat --prompt "Who are you?"')
def generate(
    source: Source,
    prompt: Annotated[str, typer.Option(help="The text to continue, or with --chat to answer.")],
    framework: Annotated[str, typer.Option(help="jax, torch or both.")] = "jax",
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that sum to p.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, tokens seen before get rarer.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same tokens in both frameworks.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    attention: Attention = "fused",
    quantize: Annotated[Text, typer.Option(help="int8: weights of one byte, for faster decoding.")] = None,
    lookup: Annotated[
        int, typer.Option(help="Guess so many tokens from the text so far; the same tokens, sooner.")
    ] = 0,
    json: Json = False,
) -> None:
    """Continue a prompt, streaming the text."""
    from twinformers.cli import generate as verb

    verb.run(
        source,
        prompt,
        framework=framework,
        chat=chat,
        max_new_tokens=max_new_tokens,
        sampling={
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
        },
        dtype=dtype,
        attention=attention,
        quantize=quantize,
        lookup=lookup,
        json=json,
    )


@app.command(epilog="Example: twinformers verify demo --dtype float64 --dtype float32")
def verify(
    source: Source,
    dtype: Annotated[Optional[list[str]], typer.Option(help="Repeatable; default float64, float32.")] = None,  # noqa: UP045
    check: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="logits, activations, cache, generation, reference, rounding (the default: these); "
            "gradients, training, training-run. Repeatable."
        ),
    ] = None,
    against: Annotated[
        Text, typer.Option(help="Where the source was made from: transformers gets its weights.")
    ] = None,
    attention: Attention = "einsum",
    steps: Annotated[int, typer.Option(help="Updates of training and training-run.")] = 20,
    jax_device: Annotated[Text, typer.Option(help="cpu, gpu or tpu.")] = None,
    torch_device: Annotated[Text, typer.Option(help="cpu or cuda.")] = None,
    report: Annotated[Optional[Path], typer.Option(help="Write an HTML page of all figures here.")] = None,  # noqa: UP045
    json: Json = False,
) -> None:
    """Prove the twins equal; exit code 1 if a check fails."""
    from twinformers.cli import verify as verb

    code = verb.run(
        source,
        dtypes=dtype or [],
        checks=check or [],
        against=against,
        attention=attention,
        steps=steps,
        jax_device=jax_device,
        torch_device=torch_device,
        report_file=report,
        json=json,
    )
    raise typer.Exit(code)


@app.command(epilog="Example: twinformers compare demo --report comparison.html")
def compare(
    source: Source,
    report: Annotated[Optional[Path], typer.Option(help="Write an HTML page of everything here.")] = None,  # noqa: UP045
    dtype: Annotated[Optional[list[str]], typer.Option(help="Repeatable; default float64, float32.")] = None,  # noqa: UP045
    prompt: Annotated[Text, typer.Option(help="The text that is continued token by token.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Continue it by at most so many tokens.")] = 32,
    no_timing: Annotated[bool, typer.Option("--no-timing", help="Leave speed and memory out.")] = False,
    jax_device: Annotated[Text, typer.Option(help="cpu, gpu or tpu.")] = None,
    torch_device: Annotated[Text, typer.Option(help="cpu or cuda.")] = None,
    json: Json = False,
) -> None:
    """Set the twins side by side: figures, tokens, speed, source; exit code 1 if a check fails."""
    from twinformers.cli import compare as verb

    code = verb.run(
        source,
        report_file=report,
        dtypes=dtype or [],
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        timing=not no_timing,
        jax_device=jax_device,
        torch_device=torch_device,
        json=json,
    )
    raise typer.Exit(code)


@app.command(epilog="Example: twinformers bench demo --task decode --batch 1 --batch 8 --report speed.md")
def bench(
    source: Source,
    task: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="decode, prefill, train, load, start; repeatable, default all of them."),
    ] = None,
    batch: Annotated[Optional[list[int]], typer.Option(help="Repeatable; default 1 and 8.")] = None,  # noqa: UP045
    prompt_tokens: Annotated[int, typer.Option(help="The length of prompts and of training rows.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="How many tokens decoding generates.")] = 64,
    sweep: Annotated[Text, typer.Option(help="length, batch or size: each task at several of them.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    framework: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="jax, torch, transformers; repeatable, default those installed."),
    ] = None,
    attention: Attention = "fused",
    quantize: Annotated[Text, typer.Option(help="int8: the twins' weights, rounded for decoding.")] = None,
    repeats: Annotated[int, typer.Option(help="Measure so many times and take the median.")] = 5,
    limit: Annotated[float, typer.Option(help="Give up what is not ready after so many seconds.")] = 300,
    jax_device: Annotated[Text, typer.Option(help="cpu, gpu or tpu.")] = None,
    torch_device: Annotated[Text, typer.Option(help="cpu or cuda; of transformers too.")] = None,
    report: Annotated[Optional[Path], typer.Option(help="Write a page here, .html or .md.")] = None,  # noqa: UP045
    plots: Annotated[Optional[Path], typer.Option(help="Write pictures into this folder.")] = None,  # noqa: UP045
    json: Json = False,
) -> None:
    """Measure speed and memory of both twins and of transformers, side by side."""
    from twinformers.cli import bench as verb

    sizes = {"batches": batch or (1, 8), "tokens": prompt_tokens, "new_tokens": new_tokens}
    options = {
        "frameworks": framework or None,
        "dtype": dtype,
        "attention": attention,
        "quantize": quantize,
        "repeats": repeats,
        "limit": limit,
        "jax_device": jax_device,
        "torch_device": torch_device,
    }
    verb.run(
        source,
        tasks=task or [],
        sizes=sizes,
        sweep=sweep,
        options=options,
        report_file=report,
        plots=plots,
        json=json,
    )


@app.command(epilog="Example: twinformers diverge jax:demo torch:demo --gradients")
def diverge(
    left: Annotated[str, typer.Argument(help="jax:SOURCE, torch:SOURCE or hf:SOURCE (transformers).")],
    right: Annotated[str, typer.Argument(help="The same; the two need one architecture, not one source.")],
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Where outputs agree, search the backward pass too.")
    ] = False,
    limit: Annotated[float, typer.Option(help="The largest relative difference that is none.")] = 1e-9,
    json: Json = False,
) -> None:
    """Find the first submodule where two models part, and say why; exit code 1 if they do."""
    from twinformers.cli import diverge as verb

    raise typer.Exit(verb.run(left, right, gradients=gradients, limit=limit, json=json))


@app.command(
    epilog="Example: twinformers tpu preset:llama2-70b --topology v5p:4x4x4 --batch 64 --sequence 4096"
)
def tpu(
    source: Source,
    topology: Annotated[
        str, typer.Option(help="GENERATION:SHAPE, as v5e:16x16 or v5p:4x4x4; v4, v5e, v5p, v6e, tpu7x.")
    ],
    mode: Annotated[str, typer.Option(help="train, prefill or decode (one token a row).")] = "train",
    batch: Annotated[int, typer.Option(help="Rows in all.")] = 64,
    sequence: Annotated[int, typer.Option(help="Tokens of a row, or of its cache.")] = 4096,
    mesh: Annotated[
        Text, typer.Option(help="Sizes as data=1,fsdp=64,tensor=1; their product is the devices.")
    ] = None,
    remat: Annotated[str, typer.Option(help="What training computes again: none, dots or full.")] = "full",
    attention: Annotated[str, typer.Option(help="splash, or einsum.")] = "splash",
    accumulate: Annotated[int, typer.Option(help="Micro-batches of an update.")] = 1,
    chunk: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Tokens of a row whose logits are held at a time; default all."),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Try several meshes and policies, and recommend one.")
    ] = False,
    json: Json = False,
) -> None:
    """Compile for a TPU slice without a TPU: does it fit, and what would a step take? Exit code 1 if not."""
    from twinformers.cli import tpu as verb

    options = {
        "mode": mode,
        "batch": batch,
        "sequence": sequence,
        "attention": attention,
        "accumulate": accumulate,
        "chunk": chunk,
    }
    if not search:
        options["remat"] = remat
    code = verb.run(source, topology, mesh=mesh, searching=search, json=json, **options)
    raise typer.Exit(code)


train = typer.Typer(no_args_is_help=True)
app.add_typer(
    train,
    name="train",
    help="Train a language model on text, or a translator; each task has --help and --json.",
    epilog="Example: twinformers train translation --framework jax --out ./numbers",
)
train.command("text", epilog=train_text.EPILOG)(train_text.train_text)


@train.command("translation", epilog="Example: twinformers train translation --framework jax --out ./numbers")
def train_translation(
    out: Annotated[Path, typer.Option(help="The folder to write; `translate` reads it.")],
    framework: Annotated[str, typer.Option(help="jax or torch.")] = "jax",
    steps: Annotated[Optional[int], typer.Option(help="Updates in all; default 3000.")] = None,  # noqa: UP045
    batch_size: Annotated[Optional[int], typer.Option(help="Pairs per update; default 64.")] = None,  # noqa: UP045
    warmup: Annotated[Optional[int], typer.Option(help="Updates of growing rate; default 1000.")] = None,  # noqa: UP045
    dropout: Annotated[Optional[float], typer.Option(help="Default 0.")] = None,  # noqa: UP045
    seed: Annotated[Optional[int], typer.Option(help="Of weights, batches and dropout; default 0.")] = None,  # noqa: UP045
    preset: Annotated[Text, typer.Option(help="The model; default transformer-numbers.")] = None,
    save_every: Annotated[int, typer.Option(help="Write a checkpoint after so many updates.")] = 500,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    json: Json = False,
) -> None:
    """Train a translator of number names, English to German; after Ctrl-C, --resume goes on."""
    from twinformers.cli import train as verb

    settings = {
        "steps": steps,
        "batch_size": batch_size,
        "warmup": warmup,
        "dropout": dropout,
        "seed": seed,
        "preset": preset,
    }
    options = {"framework": framework, "resume": resume, "save_every": save_every}
    raise typer.Exit(verb.run("translation", out, **options, settings=settings, json=json))  # type: ignore[arg-type]


@app.command(epilog='Example: twinformers translate ./numbers --text "two hundred fifty-four"')
def translate(
    source: Source,
    text: Annotated[list[str], typer.Option(help="What to translate; repeatable.")],
    framework: Annotated[str, typer.Option(help="jax, torch or both.")] = "jax",
    num_beams: Annotated[Optional[int], typer.Option(help="1 is greedy; default the model's, or 4.")] = None,  # noqa: UP045
    length_penalty: Annotated[Optional[float], typer.Option(help="Larger favours longer ones.")] = None,  # noqa: UP045
    penalty: Annotated[Text, typer.Option(help="length: n^a; wu: ((5+n)/6)^a.")] = None,
    max_new_tokens: Annotated[Optional[int], typer.Option(help="Stop after this many tokens.")] = None,  # noqa: UP045
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    json: Json = False,
) -> None:
    """Translate texts with an encoder-decoder model, by beam search."""
    from twinformers.cli import translate as verb

    beams = {
        "num_beams": num_beams,
        "length_penalty": length_penalty,
        "penalty": penalty,
        "max_new_tokens": max_new_tokens,
    }
    verb.run(source, text, framework=framework, dtype=dtype, beams=beams, json=json)


@app.command(epilog='Example: twinformers embed ./all-MiniLM-L6-v2 --text "a cat" --text "a kitten"')
def embed(
    source: Source,
    text: Annotated[list[str], typer.Option(help="What to make a vector of; repeatable.")],
    framework: Annotated[str, typer.Option(help="jax, torch or both.")] = "both",
    pooling: Annotated[str, typer.Option(help="mean of all tokens, or the first one.")] = "mean",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    json: Json = False,
) -> None:
    """Compare texts by the vectors that an encoder makes of them."""
    from twinformers.cli import embed as verb

    verb.run(source, text, framework=framework, pooling=pooling, dtype=dtype, json=json)


@app.command(epilog="Example: twinformers new qwen2 --like llama")
def new(
    name: Annotated[str, typer.Argument(help="transformers' model_type; it names the files.")],
    like: Annotated[str, typer.Option(help="The architecture here that is closest.")] = "llama",
    json: Json = False,
) -> None:
    """Lay down the files of a new architecture, with a test that leads from step to step."""
    from twinformers.cli import new as verb

    verb.run(name, like=like, json=json)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and give its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        app(args=arguments, prog_name="twinformers", standalone_mode=True)
    except TwinformersError as error:
        # Names out of a foreign file are not to be trusted with the terminal.
        text = "".join(c if c.isprintable() or c == "\n" else " " for c in str(error))
        print(f"error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # which typer would give as 1: a check failed
            return 141
        return stop.code if isinstance(stop.code, int) else 2
    return 0
