"""A mesh of devices as the command line and `run.json` name it."""

from __future__ import annotations

import re

from twinformers.errors import UsageError
from twinformers.sharding import AXES, SEQUENCE


def mesh_sizes(text: str) -> dict[str, int]:
    """The sizes of a mesh by the names of its axes, from "data=2,fsdp=4"; an axis left out has size 1.

    Of "sequence" they say nothing where it shares out nothing: a mesh then has no such axis.

    Raises UsageError for other axes, sizes that are no positive integers, and an axis that is named twice.
    """
    found: dict[str, int] = {}
    known = (*AXES, SEQUENCE)
    for part in text.split(","):
        name, equals, size = (word.strip() for word in part.partition("="))
        if not equals or name not in known or name in found or not re.fullmatch("[1-9][0-9]{0,8}", size):
            raise UsageError(
                "the mesh cannot be read",
                where="mesh",
                expected=f"positive sizes of {', '.join(known)}, each at most once, such as data=2,fsdp=4",
                found=text,
            )
        found[name] = int(size)
    sizes = {name: found.get(name, 1) for name in AXES}
    return sizes | {SEQUENCE: found[SEQUENCE]} if found.get(SEQUENCE, 1) > 1 else sizes


def mesh_text(sizes: dict[str, int]) -> str:
    """A mesh in the one way in which the settings keep it: "data=2,fsdp=4,tensor=1"."""
    return ",".join(f"{name}={size}" for name, size in sizes.items())
