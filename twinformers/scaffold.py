"""The files of a new architecture, laid down from those of one that is close to it.

They are copies under a new name: what differs is then changed where the new model differs. The test that
comes with them is not a copy. It asks transformers' own model, a step at a time, and fails at the first step
that the copies do not take yet.
"""

from __future__ import annotations

import ast
import keyword
import re
from pathlib import Path
from typing import Any

import jinja2

from twinformers.configs import architectures, config_class
from twinformers.errors import DestinationError, UsageError

#: Where the four files of an architecture lie, and its test.
PLACES = ("twinformers/configs", "jax_models", "torch_models", "twinformers/weight_maps")
TEST = "parity_tests/test_{}.py"
TEMPLATE = Path(__file__).with_name("scaffold_test.jinja")


def new_architecture(name: str, *, like: str = "llama", root: Path | None = None) -> list[Path]:
    """Write the four files of architecture `name` and its test into a checkout; their paths.

    `name` is transformers' `model_type`, which also names the files. `like` is an architecture that is here
    already. Raises UsageError for a name that is none or taken, for an unknown `like` and outside of a
    checkout, DestinationError where a file is in the way or cannot be written; then nothing is written.
    """
    root = Path(__file__).parent.parent if root is None else root
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UsageError(
            "not a name for an architecture",
            where="name",
            expected="small letters, digits and _: transformers' model_type",
            found=repr(name),
        )
    if like not in architectures():
        raise UsageError(
            "no such architecture", where="like", expected=" or ".join(architectures()), found=repr(like)
        )
    if name in architectures():
        raise UsageError("this architecture is here already", where="name", found=name)
    if not (root / "parity_tests").is_dir():
        raise UsageError(
            "a new architecture is added to a checkout of the project",
            where=str(root),
            expected="the folders of the repository, parity_tests among them",
            found="an installed package",
            hint="clone the repository, run scripts/setup, and call the verb of that environment",
        )
    files = {
        root / place / f"{name}.py": _renamed(root / place / f"{like}.py", like, name) for place in PLACES
    }
    files[root / TEST.format(name)] = _test(name, like)
    for path in files:
        if path.exists():
            raise DestinationError(
                "the file exists", where=str(path), hint="remove it, or choose another name"
            )
    try:
        for path, text in files.items():
            path.write_text(text)
    except OSError as error:
        for path in files:
            path.unlink(missing_ok=True)
        raise DestinationError(
            "the file cannot be written", where=str(path), found=error.strerror or str(error)
        ) from error
    return list(files)


def class_name(name: str) -> str:
    """What the model's class is called: "qwen2_moe" is Qwen2Moe."""
    return "".join(part.capitalize() for part in name.split("_"))


def _renamed(path: Path, like: str, name: str) -> str:
    """A file's text under another name. Of the presets the tiny one is kept: the others are of `like`."""
    text, cls = path.read_text(), config_class(like)
    for node in ast.parse(text).body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "PRESETS":
            text = _with_one_preset(text, node, f"{like}-tiny")
    ours, theirs = class_name(name), cls.model_class
    text = re.sub(rf"\b{theirs}(?=\b|[A-Z])", ours, text)
    text = text.replace(f"{like}-tiny", f"{name}-tiny")
    # Neither another model's name that begins alike, nor the program that is called so.
    return re.sub(rf"(?<![\w-]){like}(?![\w-]|\.cpp)", name, text)


def _with_one_preset(text: str, node: ast.AnnAssign, kept: str) -> str:
    """The module's text with one entry of the table of presets."""
    table: Any = node.value
    entry = next(v for k, v in zip(table.keys, table.values, strict=True) if k.value == kept)
    lines = text.splitlines(keepends=True)
    first, last = node.lineno - 1, node.end_lineno
    while lines[first - 1].startswith("#"):  # what is said about all of them
        first -= 1
    head = text.splitlines()[node.lineno - 1]
    written = (
        f"#: `{kept}`, in which no two dimensions agree; add the released models from their config.json.\n"
        f'{head}\n    "{kept}": {ast.get_source_segment(text, entry)},\n}}\n'
    )
    return "".join(lines[:first]) + written + "".join(lines[last:])


def _test(name: str, like: str) -> str:
    cls = config_class(like)
    environment = jinja2.Environment(
        trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text()).render(
        name=name, like=like, title=class_name(name), generates=cls.kind == "causal"
    )
