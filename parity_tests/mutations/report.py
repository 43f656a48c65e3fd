"""`python -m mutations.report FILE`: runs all mistakes and writes what became of them as Markdown."""

from __future__ import annotations

import sys
from pathlib import Path

from mutations.mutation import Mutation
from mutations.running import MUTATIONS, NOTICED, Outcome, run

HEAD = """# The suite tested

Known mistakes, planted one at a time in the running process. Each must make a test of the ordinary suite
fail that passes without it, and where a pass through a model shows it in float64, `twinformers diverge` must
locate it at the right submodule ("the model itself" means what a model does between its submodules). Written
by `scripts/mutations`; `parity_tests/mutations/` has the mistakes, `parity_tests/test_mutations.py` runs them
with the suite.
"""


def page(outcomes: dict[str, Outcome]) -> str:
    """The report; `outcomes` by the mistake's name."""
    in_models = {name: m.located.path for name, m in MUTATIONS.items() if m.located}
    caught = [name for name, outcome in outcomes.items() if outcome.error in NOTICED]
    located = [name for name, path in in_models.items() if outcomes[name].path == path]
    lines = [
        HEAD,
        f"**{len(caught)} of {len(outcomes)} caught; {len(located)} of the {len(in_models)} to be located "
        f"are at the right submodule ({len(located) / len(in_models):.0%}).**",
        "",
        "| planted | where | caught by | located at |",
        "|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_row(MUTATIONS[name], o) for name, o in outcomes.items()), ""])


def _row(mutation: Mutation, outcome: Outcome) -> str:
    by = f"`{mutation.caught_by}`" if outcome.error in NOTICED else f"**not** by `{mutation.caught_by}`"
    at = "shows in no single pass"
    if mutation.located:
        at = _named(outcome.path)
        if outcome.path != mutation.located.path:
            at = f"**{at}** instead of {_named(mutation.located.path)}"
    where = mutation.where.replace(", ", "`, `")
    return f"| {mutation.name}: {mutation.says} | `{where}` | {by} | {at} |"


def _named(path: str | None) -> str:
    return "nothing" if path is None else f"`{path}`" if path else "the model itself"


def main(target: Path) -> int:
    outcomes: dict[str, Outcome] = {}

    def note(outcome: Outcome) -> None:
        print(outcome, file=sys.__stderr__, flush=True)
        if outcome.mutation:
            outcomes[outcome.mutation] = outcome
        elif outcome.error:
            raise SystemExit(f"{outcome.test} fails without any mistake: {outcome.message}")

    run(MUTATIONS.values(), note)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(outcomes), encoding="utf-8")
    return 0 if all(o.error in NOTICED for o in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
