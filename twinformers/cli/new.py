"""`twinformers new`"""

from __future__ import annotations

from twinformers.cli.output import print_json
from twinformers.scaffold import PLACES, TEST, new_architecture


def run(name: str, *, like: str, json: bool) -> None:
    paths = new_architecture(name, like=like)
    if json:
        print_json({"name": name, "like": like, "files": [str(p) for p in paths]})
        return
    for folder in PLACES:
        print(f"{folder}/{name}.py")
    print(f"{TEST.format(name)}\n\nNext: scripts/test {TEST.format(name)} -n 0 -x")
