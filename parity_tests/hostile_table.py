"""The table of docs/results/bad-input.md: each hostile file, what this project says, what others do with it.

Every attempt runs in a process of its own, forked from one that has everything imported, with a limit on time
and on memory.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import hostile

SECONDS = 20
#: Memory that an attempt may add to what the imports take.
BYTES = 4 << 30
HEAD = """# Bad input

Each file was broken on purpose (`parity_tests/hostile.py`) and given to this project's command, to the
library of its format (safetensors, torch.load with weights only, the gguf package) and to transformers. Made
by `scripts/bad-input` with {versions};
every attempt had {seconds} s and {bytes} GiB. The tests hold the first column to exit code 2, one message,
2 seconds of processor time, no output and an untouched source (`parity_tests/test_hostile.py`).

"Loads" means that no error was raised; what was made up or left out on the way stands beside it.

| input | twinformers says | s | the format's library | transformers |
|---|---|---|---|---|
"""


def attempt(work: Callable[[], str]) -> tuple[str, float]:
    """What `work` says in a process of its own, and the seconds it took."""
    read, write = os.pipe()
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.close(read)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
            said = work()
        except MemoryError:
            said = f"out of memory ({BYTES >> 30} GiB)"
        except BaseException as error:
            first = next(iter(str(error).strip().splitlines()), "")
            said = f"{type(error).__name__}: {first}"
        os.write(write, said[:1000].encode())
        os._exit(0)
    os.close(write)
    ready, _, _ = select.select([read], [], [], SECONDS)
    seconds = time.perf_counter() - start
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raw = os.read(read, 1 << 16) if ready else b""
    os.close(read)
    if not ready:
        return f"still busy after {SECONDS} s", seconds
    if not raw:
        return "the process died", seconds
    return raw.decode(errors="replace"), seconds


def ours(case: hostile.Case, source: Path) -> str:
    from twinformers.cli.app import run

    fill = {"source": str(source), "dest": str(source.parent / "new"), "root": str(source.parent)}
    text = io.StringIO()
    with contextlib.redirect_stderr(text), contextlib.redirect_stdout(io.StringIO()):
        logging.getLogger().handlers.clear()
        code = run([argument.format(**fill) for argument in case.verb])
    message = text.getvalue().replace(f"{source}/", "").replace(str(source), source.name)
    lines = [x.strip() for x in message.splitlines() if not x.startswith("WARNING")]
    said = "; ".join(lines).removeprefix("error: ")
    return said if code == 2 else f"EXIT CODE {code}: {said}"


def library(case: hostile.Case, source: Path) -> str:
    path = source / case.file
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return f"loads {len(load_file(path))} tensors"
    if path.suffix == ".gguf":
        import gguf

        return f"loads {len(gguf.GGUFReader(path).tensors)} tensors"
    import torch

    found = torch.load(path, weights_only=True)
    return f"loads {len(found)} entries"


def transformers(case: hostile.Case, source: Path) -> str:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    if case.verb == hostile.CHAT:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"))
        tokenizer.chat_template = (source / "chat_template.jinja").read_text()
        text = tokenizer.apply_chat_template([{"role": "user", "content": "w3"}], tokenize=False)
        return f"gives {len(text)} characters"
    options = {"gguf_file": case.file} if case.file.endswith(".gguf") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    odd = {
        "made up at random": info["missing_keys"],
        "left out": info["unexpected_keys"],
        "of another shape, made up at random": info["mismatched_keys"],
    }
    notes = [f"{len(keys)} {what}" for what, keys in odd.items() if keys]
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        notes.append("not all finite")
    return "loads" + "".join(f"; {note}" for note in notes)


def clean(text: str, most: int = 260) -> str:
    """Text for a cell: no paths of this machine, no markup, one line."""
    text = " ".join(text.replace(tempfile.gettempdir(), "").replace("|", "\\|").split())
    text = "".join(c if c.isprintable() else " " for c in text).replace("<", "&lt;").replace("`", "'")
    return text if len(text) <= most else text[:most] + " ..."


def main(target: Path) -> int:
    import gguf  # noqa: F401
    import safetensors
    import torch
    import transformers as reference

    reference.logging.set_verbosity_error()
    torch.set_num_threads(1)
    versions = (
        f"safetensors {safetensors.__version__}, torch {torch.__version__.split('+')[0]} and transformers "
    )
    rows = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "whole"
        hostile.whole(root)
        for number, (name, case) in enumerate(hostile.CASES.items()):
            work = Path(place) / str(number)
            source = work / case.kind
            shutil.copytree(root / case.kind, source)
            case.breaks(source)
            said, seconds = attempt(lambda case=case, source=source: ours(case, source))

            theirs = ["", ""]
            if "destination" not in name:
                if case.file:
                    theirs[0] = attempt(lambda case=case, source=source: library(case, source))[0]
                theirs[1] = attempt(lambda case=case, source=source: transformers(case, source))[0]
            cells = [clean(x.replace(str(work), "")) for x in (name, said, *theirs)]
            rows.append(f"| {cells[0]} | {cells[1]} | {seconds:.2f} | {cells[2]} | {cells[3]} |")
            print(rows[-1], file=sys.stderr)
            shutil.rmtree(work)
    head = HEAD.format(versions=versions + reference.__version__, seconds=SECONDS, bytes=BYTES >> 30)
    target.write_text(head + "\n".join(rows) + "\n")
    return int(any("EXIT CODE" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
