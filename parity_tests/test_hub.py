"""Models from a hub: a small one on localhost keeps to the protocol, and huggingface_hub itself asks it.

Each download runs in a process of its own, since huggingface_hub reads its settings when it is imported.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import pty
import socket
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from twinformers import port
from twinformers.checkpoints import open_checkpoint

OLD, NEW = "a" * 40, "b" * 40
REPO = "somebody/tiny"
CODE = """
import json, sys
from twinformers.checkpoints import open_checkpoint
from twinformers.errors import TwinformersError
try:
    with open_checkpoint(sys.argv[1]) as c:
        name = sorted(c.tensors)[0]
        total = float(c.read(name).astype("float64").sum())
        print(json.dumps([c.format, c.revision, str(c.folder), len(c.tensors), total, sorted(c.assets)]))
except TwinformersError as error:
    print(json.dumps({"kind": type(error).__name__, "where": error.where, "text": str(error)}))
"""


class Hub(http.server.ThreadingHTTPServer):
    """`repos` maps repositories to commits, each a map from file names to contents; `main` is the last."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos, self.asked, self.token, self.drop = {}, [], None, None
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self):
        return [
            path.rpartition("/")[2]
            for method, path, _ in self.asked
            if method == "GET" and "/resolve/" in path
        ]


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def answer(self):
        hub = self.server
        hub.asked.append((self.command, self.path, self.headers.get("Authorization")))
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.reply(401, X_Error_Message="Invalid credentials")
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, rest = "/".join(parts[2:4]), parts[4:]
        else:
            repo, rest = "/".join(parts[:2]), parts[2:]
        if repo not in hub.repos:
            return self.reply(404, X_Error_Code="RepoNotFound")
        commits = hub.repos[repo]
        revision = rest[1] if len(rest) > 1 else "main"
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            return self.reply(404, X_Error_Code="RevisionNotFound")
        files = commits[commit]
        if parts[0] == "api":
            siblings = [{"rfilename": name} for name in files]
            body = {"_id": "0", "id": repo, "modelId": repo, "sha": commit, "siblings": siblings}
            return self.reply(200, json.dumps(body).encode(), Content_Type="application/json")
        name = "/".join(rest[2:])
        if name not in files:
            return self.reply(404, X_Error_Code="EntryNotFound")
        content = files[name]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
        if self.command == "GET" and name == hub.drop:
            self.send_response(200)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        return self.reply(200, content, **headers)


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The same weights as safetensors, as pickles and in shards; other weights for the older commit."""
    root = tmp_path_factory.mktemp("sets")
    port("preset:llama-tiny", root / "new", to="hf")
    port("preset:llama-tiny@1", root / "old", to="hf")
    port("preset:llama-tiny", root / "shards", to="hf", shard_size=60_000)
    torch.save(load_file(root / "new" / "model.safetensors"), root / "new.bin")
    result = {}
    for name in ("new", "old", "shards"):
        files = sorted((root / name).iterdir())
        result[name] = {f.name: f.read_bytes() for f in files if f.name != "SHA256SUMS"}
    result["bin"] = {k: v for k, v in result["new"].items() if k != "model.safetensors"}
    result["bin"]["pytorch_model.bin"] = (root / "new.bin").read_bytes()
    return result


def environment(hub_url, home, **more):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return {**kept, "HF_ENDPOINT": hub_url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **more}


def fetch(hub_url, home, source=REPO, **more):
    """What opening the source gives in a new process; seconds; what it said on stderr."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", CODE, source],
        env=environment(hub_url, home, **more),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), time.monotonic() - start, done.stderr


def total(folder_files, tmp_path):
    """The sum of the first tensor, read from a local copy."""
    tmp_path.mkdir()
    for name, content in folder_files.items():
        (tmp_path / name).write_bytes(content)
    with open_checkpoint(tmp_path) as c:
        assert c.revision == ""
        return float(c.read(min(c.tensors)).astype("float64").sum())


def test_download_and_a_pinned_revision(hub, sets, tmp_path):
    hub.repos[REPO] = {
        OLD: sets["old"],
        NEW: {**sets["new"], "train.py": b"raise SystemExit", "other.bin": b"x"},
    }
    new, _, said = fetch(hub.url, tmp_path / "home")
    assert new[:2] == ["hf", NEW] and new[4] == total(sets["new"], tmp_path / "new")
    assert said == "" and "generation_config.json" in new[5]
    assert sorted(hub.fetched()) == sorted(sets["new"])
    old, _, _ = fetch(hub.url, tmp_path / "home", f"{REPO}@{OLD}")
    assert old[1] == OLD and old[4] == total(sets["old"], tmp_path / "old") != new[4]


@pytest.mark.parametrize(
    ("kinds", "weights"),
    [
        (["bin", "new"], ["model.safetensors"]),
        (["bin"], ["pytorch_model.bin"]),
        (["bin", "shards"], ["model.safetensors.index.json", "model-0"]),
    ],
    ids=["safetensors-first", "pickle", "shards-first"],
)
def test_one_set_of_weights_is_fetched(kinds, weights, hub, sets, tmp_path):
    hub.repos[REPO] = {NEW: {k: v for kind in kinds for k, v in sets[kind].items()}}
    found, _, _ = fetch(hub.url, tmp_path / "home")
    assert found[:2] == ["hf", NEW] and found[4] == total(sets["new"], tmp_path / "new")
    fetched = [n for n in hub.fetched() if "model" in n]
    assert fetched and all(any(n.startswith(w) for w in weights) for n in fetched)
    assert len(set(fetched)) == len(fetched)


def test_flax_weights_are_fetched(hub, tmp_path):
    folder = Path(__file__).parent / "fixtures" / "flax_llama"
    hub.repos[REPO] = {NEW: {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}}
    found, _, _ = fetch(hub.url, tmp_path / "home")
    assert found[:2] == ["flax", NEW] and "logits.json" not in hub.fetched()


def test_token_of_the_environment_is_sent(hub, sets, tmp_path):
    hub.repos[REPO], hub.token = {NEW: sets["new"]}, "secret-of-a-test"
    found, _, _ = fetch(hub.url, tmp_path / "home", HF_TOKEN=hub.token)
    assert found[1] == NEW and {token for _, _, token in hub.asked} == {f"Bearer {hub.token}"}
    (tmp_path / "home" / "token").write_text(hub.token)  # where `hf auth login` puts it
    assert fetch(hub.url, tmp_path / "home")[0][1] == NEW


def refused(answer, kind="SourceError"):
    found, seconds, said = answer
    assert isinstance(found, dict) and found["kind"] == kind and seconds < 15, (found, seconds)
    assert "Traceback" not in said
    return found["text"]


def test_what_the_hub_refuses(hub, sets, tmp_path):
    hub.repos[REPO] = {NEW: sets["new"]}
    assert "404" in refused(fetch(hub.url, tmp_path / "home", "somebody/else"))
    assert "404" in refused(fetch(hub.url, tmp_path / "home", f"{REPO}@{OLD}"))
    hub.token = "secret-of-a-test"
    text = refused(fetch(hub.url, tmp_path / "home", HF_TOKEN="another"))
    assert "401" in text and "access token" in text and "another" not in text


@pytest.mark.parametrize("left_out", ["config.json", "model.safetensors"])
def test_repository_without_weights(left_out, hub, sets, tmp_path):
    hub.repos[REPO] = {NEW: {k: v for k, v in sets["new"].items() if k != left_out} | {"model.onnx": b"x"}}
    text = refused(fetch(hub.url, tmp_path / "home"))
    assert "no weights that can be read" in text and "model.onnx" in text and hub.fetched() == []


def test_index_that_leaves_the_repository(hub, sets, tmp_path):
    index = json.dumps({"weight_map": {"a": "../../x.safetensors"}}).encode()
    files = {"config.json": sets["new"]["config.json"], "model.safetensors.index.json": index}
    hub.repos[REPO] = {NEW: files}
    assert "points out of its folder" in refused(fetch(hub.url, tmp_path / "home"), "FormatError")
    assert set(hub.fetched()) == {"model.safetensors.index.json"}


def test_dropped_connection(hub, sets, tmp_path):
    hub.repos[REPO], hub.drop = {NEW: sets["new"]}, "model.safetensors"
    refused(fetch(hub.url, tmp_path / "home"))
    hub.drop = None  # the next try starts from what is there, and is whole
    found, _, _ = fetch(hub.url, tmp_path / "home")
    assert found[4] == total(sets["new"], tmp_path / "new")


def test_without_a_network(hub, sets, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    refused(fetch(nobody, tmp_path / "home"))
    refused(fetch(hub.url, tmp_path / "home", HF_HUB_OFFLINE="1"))
    hub.repos[REPO] = {NEW: sets["new"]}
    online, _, _ = fetch(hub.url, tmp_path / "home")
    for url, more in ((nobody, {}), (hub.url, {"HF_HUB_OFFLINE": "1"})):
        assert fetch(url, tmp_path / "home", **more)[0] == online  # what was fetched before


@pytest.mark.parametrize("more", [{}, {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}], ids=["watched", "disabled"])
def test_progress_is_shown_where_a_terminal_watches(more, hub, sets, tmp_path):
    hub.repos[REPO] = {NEW: sets["new"]}
    watching, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    try:
        done = subprocess.run(
            [sys.executable, "-c", CODE, REPO],
            env=environment(hub.url, tmp_path / "home", **more),
            stdout=subprocess.PIPE,
            stderr=terminal,
            timeout=60,
        )
        os.set_blocking(watching, False)
        try:
            shown = os.read(watching, 1 << 16)
        except BlockingIOError:
            shown = b""
    finally:
        os.close(watching)
        os.close(terminal)
    assert json.loads(done.stdout)[1] == NEW
    assert (b"model.safetensors" in shown and b"%" in shown) == (not more)
