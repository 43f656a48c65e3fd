"""A mesh of devices as the command line and `run.json` name it."""

from __future__ import annotations

import re

from twinformers.errors import UsageError
from twinformers.sharding import AXES


def mesh_sizes(text: str) -> dict[str, int]:
    """The sizes of a mesh by the names of its axes, from "data=2,fsdp=4"; an axis left out has size 1.

    Raises UsageError for other axes, sizes that are no positive integers, and an axis that is named twice.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = (word.strip() for word in part.partition("="))
        if not equals or name not in AXES or name in found or not re.fullmatch("[1-9][0-9]{0,8}", size):
            raise UsageError(
                "the mesh cannot be read",
                where="mesh",
                expected=f"positive sizes of {', '.join(AXES)}, each at most once, such as data=2,fsdp=4",
                found=text,
            )
        found[name] = int(size)
    return {name: found.get(name, 1) for name in AXES}


def mesh_text(sizes: dict[str, int]) -> str:
    """A mesh in the one way in which the settings keep it: "data=2,fsdp=4,tensor=1"."""
    return ",".join(f"{name}={sizes[name]}" for name in AXES)
