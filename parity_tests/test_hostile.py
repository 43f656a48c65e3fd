"""Hostile files through the command: exit code 2, one message, nothing written, the source as it was."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import time

import pytest
from hostile import CASES, whole

from twinformers.cli.app import run

#: Seconds of this process's own time, so that a busy machine changes nothing.
MOST = 2.0


pytestmark = pytest.mark.usefixtures("own_logging")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    whole(root)
    # What is imported on first use is not part of a file's cost.
    assert run(["port", str(root / "pickle"), str(root.parent / "warm"), "--to", "torch", "--overwrite"]) == 0
    return root


def listing(folder):
    """Every entry below a folder with its kind and the hash of what a file holds; links are not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = stat.S_IFMT(os.lstat(path).st_mode)
        is_file = kind == stat.S_IFREG
        found[str(path)] = kind, hashlib.sha256(path.read_bytes()).hexdigest() if is_file else ""
    return found


@pytest.mark.parametrize("name", CASES)
def test_hostile_input_is_refused(name, folders, tmp_path, capsys):
    case = CASES[name]
    source = tmp_path / case.kind
    shutil.copytree(folders / case.kind, source)
    case.breaks(source)
    before = listing(tmp_path)
    fill = {"source": str(source), "dest": str(tmp_path / "new" / "deep"), "root": str(tmp_path)}
    capsys.readouterr()
    start = time.process_time()
    code = run([argument.format(**fill) for argument in case.verb])
    spent = time.process_time() - start
    out, err = capsys.readouterr()
    assert code == 2, (code, err)
    assert out == ""
    assert re.search(case.message, err), err
    assert "Traceback" not in err and len(err) < 3000
    assert spent < MOST
    assert listing(tmp_path) == before


@pytest.mark.parametrize("kind", ["hf", "shards", "tied", "pickle", "summed"])
def test_the_same_folders_unbroken_are_accepted(kind, folders, tmp_path):
    assert run(["port", str(folders / kind), str(tmp_path / "out"), "--to", "torch", "--strict"]) == 0
