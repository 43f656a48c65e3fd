"""`twinformers train text`: the signature, read by every call, and the body, which loads what it needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

EPILOG = "Example: twinformers train text --out ./run --data ./texts --preset llama-10m --steps 500"
Text = Optional[str]  # noqa: UP045  (typer resolves annotations at run time)
Count = Optional[int]  # noqa: UP045
Number = Optional[float]  # noqa: UP045


def train_text(
    out: Annotated[Path, typer.Option(help="The run's folder; OUT/model is what `generate` reads.")],
    data: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="A text, a token file (.npy, .bin) or a folder of them; repeatable."),
    ] = None,
    preset: Annotated[Text, typer.Option(help="The model's shape: llama-10m, ...; see `list`.")] = None,
    config: Annotated[Text, typer.Option(help="Or a Hugging Face config.json.")] = None,
    tokenizer: Annotated[
        Text, typer.Option(help="A source or a tokenizer.json; default: one is trained on the data.")
    ] = None,
    vocab_size: Annotated[Count, typer.Option(help="Of a tokenizer to be trained; default 4096.")] = None,
    token_dtype: Annotated[Text, typer.Option(help="uint16 or uint32, for .bin files.")] = None,
    framework: Annotated[Text, typer.Option(help="jax (the default) or torch.")] = None,
    steps: Annotated[Count, typer.Option(help="Updates in all; default 1000.")] = None,
    batch_size: Annotated[Count, typer.Option(help="Windows per update; default 8.")] = None,
    sequence: Annotated[Count, typer.Option(help="Tokens of a window; default 256.")] = None,
    accumulate: Annotated[Count, typer.Option(help="Parts that an update is computed in; default 1.")] = None,
    dtype: Annotated[Text, typer.Option(help="Of weights and moments: float32 or float64.")] = None,
    compute_dtype: Annotated[
        Text, typer.Option(help="What the model computes in: bfloat16, float16; default as the weights.")
    ] = None,
    remat: Annotated[
        Text, typer.Option(help="none, dots or full: what the backward pass computes again.")
    ] = None,
    chunk: Annotated[Count, typer.Option(help="Tokens of a window whose logits exist at a time.")] = None,
    attention: Annotated[Text, typer.Option(help="fused (the default) or einsum.")] = None,
    peak: Annotated[Number, typer.Option(help="The highest learning rate; default 0.001.")] = None,
    floor: Annotated[Number, typer.Option(help="The last one; default a tenth of the peak.")] = None,
    warmup: Annotated[Count, typer.Option(help="Updates of growing rate; default 100.")] = None,
    weight_decay: Annotated[Number, typer.Option(help="AdamW's, of matrices; default 0.1.")] = None,
    clip: Annotated[Number, typer.Option(help="The longest gradient; default 1.")] = None,
    seed: Annotated[Count, typer.Option(help="Of weights, order and dropout; default 0.")] = None,
    save_every: Annotated[Count, typer.Option(help="Updates between checkpoints; default 500.")] = None,
    keep: Annotated[Count, typer.Option(help="So many checkpoints stay; default 2.")] = None,
    eval_every: Annotated[Count, typer.Option(help="Updates between evaluations; default 100.")] = None,
    eval_share: Annotated[Number, typer.Option(help="Share of the tokens held out; default 0.02.")] = None,
    eval_batches: Annotated[Count, typer.Option(help="Held-out batches read at most; default 16.")] = None,
    device: Annotated[Text, typer.Option(help="cpu, gpu, tpu or cuda, as the framework calls it.")] = None,
    mesh: Annotated[
        Text, typer.Option(help="Devices that share the work: data=2,fsdp=4,tensor=1; default one device.")
    ] = None,
    distributed: Annotated[
        bool,
        typer.Option("--distributed", help="Find JAX's other processes: SLURM, a TPU pod, several hosts."),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")] = False,
) -> None:
    """Train a language model on text in either framework; after Ctrl-C or a kill, --resume goes on."""
    settings = {
        "data": tuple(data) if data else None,
        "preset": preset,
        "config": config,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "token_dtype": token_dtype,
        "framework": framework,
        "steps": steps,
        "batch_size": batch_size,
        "sequence": sequence,
        "accumulate": accumulate,
        "dtype": dtype,
        "compute_dtype": compute_dtype,
        "remat": remat,
        "chunk": chunk,
        "attention": attention,
        "peak": peak,
        "floor": floor,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "clip": clip,
        "seed": seed,
        "save_every": save_every,
        "keep": keep,
        "eval_every": eval_every,
        "eval_share": eval_share,
        "eval_batches": eval_batches,
        "device": device,
        "mesh": mesh,
    }
    raise typer.Exit(run(out, resume=resume, distributed=distributed, settings=settings, json=json))


def run(out: Path, *, resume: bool, distributed: bool, settings: dict[str, Any], json: bool) -> int:
    """Train, show how it goes, and say what it came to; the exit code. The first process alone speaks."""
    import sys

    from twinformers.cli.output import console, print_json, progress

    if json:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from twinformers.training.text.run import train_text

    # Several processes share a terminal: they show lines in place of a bar.
    several = distributed or int(os.environ.get("WORLD_SIZE", 1)) > 1
    watched = sys.stderr.isatty() and not json and not several
    with progress("reading", json=json or several) as bar:

        def tokens(count: int) -> None:
            bar.update(bar.task_ids[0], description=f"{count:,} tokens")

        def show(step: int, steps: int, row: dict[str, Any]) -> None:
            held_out = f", held out {row['eval_loss']:.4f}" if "eval_loss" in row else ""
            speed = f"{row['tokens_per_second']:,.0f} tokens/s"
            text = f"{step}/{steps} loss {row['loss']:.4f}{held_out}, {speed}"
            bar.update(bar.task_ids[0], completed=step, total=steps, description=text)
            if not watched and (step % 100 == 0 or held_out):
                print(text, file=sys.stderr, flush=True)

        given = {name: value for name, value in settings.items() if value is not None}
        result = train_text(
            out, resume=resume, distributed=distributed, on_tokens=tokens, on_step=show, **given
        )
    code = 130 if result.interrupted else 0
    if result.process:
        return code
    if json:
        print_json(result.to_dict())
        return code
    say = console().print
    loss = "none yet" if result.loss is None else f"{result.loss:.4f}"
    held_out = "" if result.eval_loss is None else f", held out {result.eval_loss:.4f}"
    say(
        f"{result.framework}: {result.steps} updates, loss {loss}{held_out}, "
        f"{result.seconds / 60:.1f} minutes, {result.tokens_per_second:,.0f} tokens/s",
        soft_wrap=True,
    )
    if result.interrupted:
        say(f"interrupted; go on with --resume\n{result.destination}", soft_wrap=True)
    else:
        say(result.model, soft_wrap=True)
    return code
