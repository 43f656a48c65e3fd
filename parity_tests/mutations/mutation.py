"""What a planted mistake is: where, what, which test notices, and where it must be found."""

from __future__ import annotations

from dataclasses import dataclass

from mutations.planting import Edit


@dataclass(frozen=True)
class Found:
    """`diverge` on `pair`, a name in `locating.PAIRS`, must give `path` as the submodule with the cause.

    The model itself has the path "": what it does between its submodules is wrong.
    """

    pair: str
    path: str


@dataclass(frozen=True)
class Mutation:
    """One mistake. `caught_by` is a test that must fail with it.

    `located` is None where no single pass through a model shows it in float64.
    """

    name: str
    says: str
    edits: tuple[Edit, ...]
    caught_by: str
    located: Found | None = None

    @property
    def where(self) -> str:
        return ", ".join(dict.fromkeys(edit.where for edit in self.edits))


def mistake(
    name: str, says: str, *edits: tuple[str, str, str], caught_by: str, located: Found | None = None
) -> Mutation:
    return Mutation(name, says, tuple(Edit(*edit) for edit in edits), caught_by, located)
