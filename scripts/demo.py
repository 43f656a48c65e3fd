"""The main job on real weights: read, port, generate the same answer twice. Called by scripts/demo."""

from __future__ import annotations

import sys
from pathlib import Path

import twinformers

QUESTION = "What is the capital of France?"


def main() -> int:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    root = Path(__file__).resolve().parent.parent / ".demo"
    ports = Table(
        "ported", "from", "tensors", "seconds", title="SmolLM2-135M-Instruct, one source, three formats"
    )
    source = "demo"
    for to in ("hf", "jax", "torch"):
        result = twinformers.port(source, root / to, to=to, overwrite=(root / to).exists())
        ports.add_row(to, result.source_format, str(result.tensors), f"{result.seconds:.1f}")
        source = str(root / to)
    back = root / "hf-again"
    twinformers.port(source, back, to="hf", overwrite=back.exists())
    name = "model.safetensors"
    identical = (root / "hf" / name).read_bytes() == (back / name).read_bytes()
    console.print(ports)
    console.print(f"hf -> jax -> torch -> hf: {'byte-identical' if identical else 'DIFFERENT'}")

    answers = [
        twinformers.generate(root / framework, QUESTION, framework=framework, chat=True)[0]
        for framework in ("jax", "torch")
    ]
    table = Table("framework", "answer", "tokens", "tokens/s", title=QUESTION)
    for a in answers:
        table.add_row(a.framework, a.text, str(len(a.tokens)), f"{a.decode_tokens_per_second:.1f}")
    console.print(table)
    same = answers[0].tokens == answers[1].tokens
    right = all("Paris" in a.text for a in answers)
    console.print("token for token the same" if same else "THE ANSWERS DIFFER")
    return 0 if identical and same and right else 1


if __name__ == "__main__":
    sys.exit(main())
