"""`twinformers generate`"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from twinformers.cli.output import print_json
from twinformers.configs import Sampling
from twinformers.generation import generate, keep_compilations


def run(
    source: str,
    prompt: str,
    *,
    framework: str,
    chat: bool,
    max_new_tokens: int,
    sampling: dict[str, Any],
    dtype: str,
    attention: str,
    quantize: str | None,
    lookup: int,
    json: bool,
) -> None:
    if framework in ("jax", "both") and importlib.util.find_spec("jax"):
        keep_compilations()
    speaking = ""

    def show(name: str, piece: str) -> None:
        nonlocal speaking
        if name != speaking and framework == "both":
            sys.stdout.write(f"{chr(10) if speaking else ''}[{name}] ")
        speaking = name
        sys.stdout.write(piece)
        sys.stdout.flush()

    results = generate(
        source,
        prompt,
        framework=framework,
        chat=chat,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(**sampling),
        dtype=dtype,
        attention=attention,
        quantize=quantize,
        lookup=lookup,
        on_text=None if json else show,
    )
    if json:
        print_json({"outputs": [r.to_dict() for r in results]})
        return
    print()
    for r in results:
        print(
            f"{r.framework}: {len(r.tokens)} tokens, compiled in {r.compile_seconds:.2f} s, "
            f"first after {r.prefill_seconds:.2f} s, then {r.decode_tokens_per_second:.1f} tokens/s",
            file=sys.stderr,
        )
