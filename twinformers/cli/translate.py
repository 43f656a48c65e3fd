"""`twinformers translate`"""

from __future__ import annotations

import sys
from typing import Any

from twinformers.cli.output import print_json
from twinformers.translation import translate


def run(
    source: str, texts: list[str], *, framework: str, dtype: str, beams: dict[str, Any], json: bool
) -> None:
    given = {name: value for name, value in beams.items() if value is not None}
    results = translate(source, texts, framework=framework, dtype=dtype, **given)
    if json:
        print_json({"outputs": [r.to_dict() for r in results]})
        return
    for r in results:
        print(f"[{r.framework}] {r.text}" if framework == "both" else r.text)
    for side, seconds in {r.framework: r.seconds for r in results}.items():
        print(f"{side}: {len(texts)} texts in {seconds:.2f} s, with compiling", file=sys.stderr)
