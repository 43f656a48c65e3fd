"""`twinformers embed`"""

from __future__ import annotations

from typing import Any

from twinformers.cli.output import print_json
from twinformers.embedding import embed


def run(source: str, texts: list[str], *, framework: str, pooling: str, dtype: str, json: bool) -> None:
    results = embed(source, texts, framework=framework, pooling=pooling, dtype=dtype)
    apart = max(float(abs(r.vectors - results[0].vectors).max()) for r in results)
    if json:
        told: dict[str, Any] = {"texts": texts, "pooling": pooling, "dtype": dtype}
        if len(results) > 1:
            told["largest_difference"] = apart
        print_json({**told, "outputs": [r.to_dict() for r in results]})
        return
    for number, text in enumerate(texts, 1):
        print(f"{number:3} {text}")
    for r in results:
        print(f"\n{r.framework:>5}" + "".join(f"{n:8}" for n in range(1, len(texts) + 1)))
        for number, row in enumerate(r.similarities, 1):
            print(f"{number:5}" + "".join(f"{x:8.4f}" for x in row))
    if len(results) > 1:
        print(f"\nThe vectors of the two differ by {apart:.1e} at most.")
