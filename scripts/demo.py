"""The main job on real weights: read, port, prove equal, and give the same answer twice.

Called by scripts/demo, which sets the environment up first.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import twinformers
from twinformers.errors import TwinformersError

MODEL = "SmolLM2-135M-Instruct"
QUESTION = "What is the capital of France?"
WEIGHTS = "model.safetensors"


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.partition("\n")[0])
    default = Path(__file__).resolve().parent.parent / ".demo"
    parser.add_argument("--out", type=Path, default=default, help="where to write (default: %(default)s)")
    root = parser.parse_args().out
    try:
        root.mkdir(parents=True, exist_ok=True)
        return run(root)
    except (TwinformersError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(root: Path) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from twinformers.checkpoints import open_checkpoint
    from twinformers.cli.output import size
    from twinformers.cli.verify import show
    from twinformers.parity.report import write_report

    console = Console(highlight=False)
    start = time.perf_counter()

    def step(text: str) -> None:
        console.print(f"[dim]{time.perf_counter() - start:5.0f} s[/]  {text}")

    step(f"reading {MODEL}, a quantised GGUF, and porting it")
    ports = Table("from", "to", "tensors", "size", "seconds", title=f"{MODEL}: one source, three formats")
    source = "demo"
    for name in ("hf", "jax", "torch", "hf-again"):
        to = name.removesuffix("-again")
        result = twinformers.port(source, root / name, to=to, overwrite=(root / name).exists())
        ports.add_row(
            result.source_format, to, str(result.tensors), size(result.bytes), f"{result.seconds:.1f}"
        )
        step(f"  {result.source_format} -> {to}")
        source = str(root / name)
    identical = (root / "hf" / WEIGHTS).read_bytes() == (root / "hf-again" / WEIGHTS).read_bytes()

    step("comparing Flax, PyTorch and transformers, submodule by submodule")
    page = root / "report.html"
    with open_checkpoint("demo") as checkpoint:
        report = twinformers.verify(checkpoint, on_progress=lambda text: step(f"  {text}"))
        write_report(report, page, checkpoint=checkpoint)

    step("asking both the same question")
    answers = []
    for framework in ("jax", "torch"):
        answers += twinformers.generate(root / framework, QUESTION, framework=framework, chat=True)
        step(f"  {framework}")
    same = answers[0].tokens == answers[1].tokens
    right = all("Paris" in a.text for a in answers)

    console.print()
    console.print(ports)
    show(report)
    table = Table("framework", "answer", "tokens", "tokens/s", title=QUESTION)
    for a in answers:
        table.add_row(a.framework, escape(a.text), str(len(a.tokens)), f"{a.decode_tokens_per_second:.1f}")
    console.print(table)
    results = {
        "hf -> jax -> torch -> hf gives the same bytes": identical,
        f"all of {len(report.checks)} comparisons are as they should be": report.ok,
        "both answers are the same, token for token": same,
        "and they say Paris": right,
    }
    for text, ok in results.items():
        console.print(f"{'[green]yes[/]' if ok else '[red]NO [/]'}  {text}")
    console.print(f"report: {page}", markup=False, soft_wrap=True)
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
