"""`python -m mutations [NAME...]`: one line of JSON for each test as it is, then for each mistake."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from mutations.running import MUTATIONS, Outcome, run

out = sys.stdout  # pytest's own words go elsewhere


def tell(outcome: Outcome) -> None:
    print(json.dumps(asdict(outcome)), file=out, flush=True)


run([MUTATIONS[name] for name in sys.argv[1:] or MUTATIONS], tell)
