"""Checksums: what `port` writes is what `sha256sum` says, and no changed bit passes."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess

import pytest

from twinformers import load, port
from twinformers.checkpoints import manifest, open_checkpoint
from twinformers.cli.app import run
from twinformers.errors import FormatError, IntegrityError, SourceError

TINY = "preset:llama-tiny"
SUMS = "SHA256SUMS"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    for to in ("hf", "torch", "jax"):
        port(TINY, root / to, to=to, shard_size=200_000)
    return root


@pytest.fixture
def hf(folders, tmp_path):
    return shutil.copytree(folders / "hf", tmp_path / "hf")


@pytest.mark.parametrize("kind", ["hf", "torch", "jax"])
def test_sums_match_sha256sum(kind, folders):
    folder = folders / kind
    done = subprocess.run(["sha256sum", "-c", SUMS], cwd=folder, capture_output=True, text=True)
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != SUMS)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines() == [f"{name}: OK" for name in files]


@pytest.mark.parametrize("kind", ["hf", "torch", "jax"])
def test_result_and_check_name_the_same_files(kind, folders, tmp_path):
    result = port(folders / kind, tmp_path / "out", to=kind, check=True)
    expected = {
        str(p.relative_to(tmp_path / "out")): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in (tmp_path / "out").rglob("*")
        if p.is_file() and p.name != SUMS
    }
    assert result.files == manifest.check(tmp_path / "out") == expected


def test_names_that_sha256sum_escapes(tmp_path):
    """A backslash and a line feed in a name: our sums are read by sha256sum, and its by us."""
    for name in ("a\\b", "c\nd", "e f", "\\n", "ü", "*g"):
        (tmp_path / name).write_text(name)
    manifest.write(tmp_path, {})
    written = manifest.check(tmp_path)
    done = subprocess.run(["sha256sum", "-c", SUMS], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and done.stdout.count(b": OK") == 6
    names = sorted(p.name for p in tmp_path.iterdir() if p.name != SUMS)
    theirs = subprocess.run(["sha256sum", "--", *names], cwd=tmp_path, capture_output=True, check=True).stdout
    (tmp_path / SUMS).write_bytes(theirs)
    assert manifest.check(tmp_path) == written


@pytest.mark.parametrize("kind", ["hf", "torch", "jax"])
def test_any_flipped_bit_in_any_file_is_found(kind, folders, tmp_path):
    """One bit of each file, somewhere; the error names the file, or the line of the sums."""
    folder = shutil.copytree(folders / kind, tmp_path / kind)
    generator = random.Random(0)
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size):
        content = bytearray(path.read_bytes())
        place, bit = generator.randrange(len(content)), 1 << generator.randrange(8)
        content[place] ^= bit
        path.write_bytes(content)
        with pytest.raises((IntegrityError, FormatError)) as caught:
            open_checkpoint(folder, check=True)
        if path.name != SUMS:
            assert isinstance(caught.value, IntegrityError) and caught.value.where == str(path)
            assert manifest.read(folder)[str(path.relative_to(folder))] in caught.value.expected
            assert caught.value.found == hashlib.sha256(content).hexdigest()
        content[place] ^= bit
        path.write_bytes(content)
    open_checkpoint(folder, check=True).close()


def test_every_flipped_bit_of_the_sums_is_found(tmp_path):
    for name in ("a", "b.json"):
        (tmp_path / name).write_text(name)
    manifest.write(tmp_path, {})
    content = (tmp_path / SUMS).read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            (tmp_path / SUMS).write_bytes(changed)
            with pytest.raises(IntegrityError):
                manifest.check(tmp_path)


@pytest.mark.parametrize("length", [*range(0, 400, 23), -1])
def test_every_truncation_of_the_sums_is_found(length, hf):
    content = (hf / SUMS).read_bytes()
    (hf / SUMS).write_bytes(content[:length])
    with pytest.raises(IntegrityError):
        manifest.check(hf)


DIGEST = "0" * 64
#: What the sums say, and what the message must.
MALFORMED = {
    "empty": ("", "line 1"),
    "no sums": ("hello\n", "line 1: .*damaged.*found: +'hello"),
    "upper case": (f"{'A' * 64}  config.json\n", "line 1"),
    "outside": (f"{DIGEST}  ../secret\n", r"another file of this folder.*\.\./secret"),
    "absolute": (f"{DIGEST}  /etc/passwd\n", "/etc/passwd"),
    "roundabout": (f"{DIGEST}  params/../config.json\n", "line 1"),
    "itself": (f"{DIGEST}  {SUMS}\n", "line 1"),
    "the folder": (f"{DIGEST}  .\n", "line 1"),
    "twice": (f"{DIGEST}  config.json\n{DIGEST}  config.json\n", "line 2"),
    "NUL": (f"{DIGEST}  a\0b\n", "line 1"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_sums_are_refused(name, hf):
    text, message = MALFORMED[name]
    (hf / SUMS).write_text(text)
    with pytest.raises(IntegrityError, match=f"(?s){message}") as caught:
        open_checkpoint(hf, check=True)
    assert (
        caught.value.where.startswith(str(hf / SUMS)) and caught.value.problem == "the checksums are damaged"
    )


def test_missing_and_added_files_are_named(hf):
    (hf / "extra.bin").write_text("x")
    with pytest.raises(IntegrityError, match="added") as caught:
        manifest.check(hf)
    assert caught.value.where == str(hf / "extra.bin")
    (hf / "extra.bin").rename(hf / "model-00001-of-00002.safetensors.old")
    (hf / "model-00001-of-00002.safetensors.old").unlink()
    (hf / "config.json").unlink()
    with pytest.raises(IntegrityError, match="missing") as caught:
        manifest.check(hf)
    assert caught.value.where == str(hf / "config.json")


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_what_is_no_file_is_never_read(kind, hf, tmp_path):
    """A pipe would be waited for; a link may lead to somebody's secrets, even to a right copy."""
    path = hf / "config.json"
    path.rename(tmp_path / "elsewhere")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.mkdir()
    with pytest.raises((IntegrityError, FormatError)) as caught:
        manifest.check(hf)
    assert caught.value.where == str(path)


def test_links_to_folders_are_added_files(hf, tmp_path):
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "a").write_text("a")
    (hf / "more").symlink_to(tmp_path / "secrets")
    with pytest.raises(IntegrityError, match="added") as caught:
        manifest.check(hf)
    assert caught.value.where == str(hf / "more")


def test_what_has_no_sums_says_so(hf, tmp_path):
    (hf / SUMS).unlink()
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for source, expected in ((hf, str(hf / SUMS)), (tmp_path / "m.gguf", str(tmp_path / "m.gguf.sha256"))):
        with pytest.raises(SourceError, match="no checksums") as caught:
            open_checkpoint(source, check=True)
        assert caught.value.expected == expected and caught.value.hint
    with pytest.raises(SourceError, match="no checksums"):
        open_checkpoint(TINY, check=True)


def test_checking_comes_first(hf, tmp_path):
    """Damage that reading would have found in its own way is found by the sum."""
    (hf / "config.json").write_text("{")
    with pytest.raises(FormatError):
        open_checkpoint(hf)
    for read in (
        lambda: open_checkpoint(hf, check=True),
        lambda: port(hf, tmp_path / "out", to="torch", check=True),
        lambda: load(hf, "torch", check=True),
    ):
        with pytest.raises(IntegrityError, match="not the one that was written"):
            read()
    assert not (tmp_path / "out").exists()


def test_an_open_checkpoint_is_checked_too(hf):
    with open_checkpoint(hf) as checkpoint:
        assert open_checkpoint(checkpoint, check=True) is checkpoint
        (hf / "config.json").write_text("{}")
        with pytest.raises(IntegrityError):
            open_checkpoint(checkpoint, check=True)


def test_progress_counts_every_byte(hf):
    seen = []
    open_checkpoint(hf, check=True, on_bytes=lambda done, total: seen.append((done, total))).close()
    size = sum(p.stat().st_size for p in hf.iterdir() if p.name != SUMS)
    assert seen[-1] == (size, size) and seen == sorted(seen)


def test_commands_check(hf, tmp_path, capsys):
    assert run(["inspect", str(hf), "--check"]) == 0
    out = capsys.readouterr().out
    assert f"all {len(manifest.read(hf))} agree" in out
    assert run(["port", str(hf), str(tmp_path / "out"), "--to", "torch", "--check"]) == 0
    path = max(hf.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    for arguments in (
        ["inspect", str(hf), "--check"],
        ["inspect", str(hf), "--check", "--json"],
        ["port", str(hf), str(tmp_path / "other"), "--to", "torch", "--check"],
    ):
        assert run(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and str(path) in err and hashlib.sha256(content).hexdigest() in err
    assert not (tmp_path / "other").exists()
    assert run(["inspect", str(hf)]) == 0  # unless it is asked for
