"""Damaged files at random: whatever a file holds, it is read whole or refused by a typed error.

Case n of a target is a function of its number alone, so that `scripts/fuzz-files --repeat TARGET:n` shows it
again. What counts as a failure: an error that is not this project's, more than two seconds of processor time,
a message without an end, and memory that grows by more than 256 MB over a run.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from twinformers import port
from twinformers.checkpoints import convert, open_checkpoint
from twinformers.errors import TwinformersError
from twinformers.weight_maps import weight_map

SECONDS = 2.0
GROWTH = 256 << 20
LONGEST = 4000
#: Cases of one worker at a time.
CHUNK = 2500


class Failed(AssertionError):
    """A damaged file did what it must not; the message says how to see it again."""


# Damage


def numbers(rng: random.Random) -> int:
    """Where counts, sizes and offsets break: zero, one off, powers of two, and around them."""
    power = 1 << rng.choice([0, 1, 7, 8, 15, 16, 31, 32, 40, 62, 63, 64, 200])
    return rng.choice([0, -1, 1, power, power - 1, -power, rng.randrange(1 << 16)])


def odd_value(rng: random.Random) -> Any:
    """A value that nobody expects where it stands."""
    return rng.choice(
        [
            lambda: None,
            lambda: rng.random() < 0.5,
            lambda: numbers(rng),
            lambda: float(rng.choice([0.0, -1.0, 0.5, 1e-300, 1e300, float("inf"), float("nan")])),
            lambda: rng.choice(
                ["", "\0", "../x", "/etc/passwd", "F32", "I64", "U8", "llama", "é" * 99, "x" * 70_000]
            ),
            lambda: [],
            lambda: {},
            lambda: [numbers(rng) for _ in range(rng.choice([1, 2, 3, 40, 2000]))],
            lambda: {"type": "linear", "factor": numbers(rng)},
            lambda: json.loads("[" * 90 + "]" * 90),
        ]
    )()


def places(value: Any, at: tuple = ()) -> list[tuple]:
    """The path of every value inside a JSON value."""
    found = [at] if at else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*at, key))
    return found


def damaged_json(text: bytes, rng: random.Random) -> bytes:
    """JSON with one to three values replaced, taken away, exchanged, or named twice."""
    value = json.loads(text)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = places(value)
        if not found:
            break
        *parents, last = rng.choice(found)
        holder = value
        for key in parents:
            holder = holder[key]
        action = rng.randrange(4)
        if action == 0:
            del holder[last]
        elif action == 1 and isinstance(holder, dict):
            name = rng.choice(["", "../x", "a\0b", "__metadata__", "x" * 300, *list(holder)[:3]])
            holder[name] = holder.pop(last)
        else:
            holder[last] = odd_value(rng)
    result = json.dumps(value)
    if rng.random() < 0.1 and result.startswith('{"'):
        key = result[1 : result.index('"', 2) + 1]
        result = "{" + f"{key}: {json.dumps(odd_value(rng))}, " + result[1:]
    return result.encode()


def damaged_bytes(raw: bytes, rng: random.Random, within: int) -> bytes:
    """Bytes flipped, cut out, doubled, put in, or overwritten by numbers, among the first `within`."""
    out = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(max(1, min(within, len(out))))
        size = rng.choice([1, 4, 8, 64])
        action = rng.randrange(6)
        if action == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            del out[at : at + size]
        elif action == 2:
            out[at:at] = out[at : at + size]
        elif action == 3:
            out[at:at] = rng.randbytes(size)
        elif action == 4:
            out[at : at + 8] = (numbers(rng) & (2**64 - 1)).to_bytes(8, "little")
        elif rng.random() < 0.3:
            del out[at:]
    return bytes(out)


def damaged(text: bytes, rng: random.Random) -> bytes:
    return damaged_json(text, rng) if rng.random() < 0.7 else damaged_bytes(text, rng, len(text))


def damaged_header(raw: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header is damaged, its length right or not."""
    if rng.random() < 0.2:
        return damaged_bytes(raw, rng, 200)
    length = int.from_bytes(raw[:8], "little")
    header = damaged(raw[8 : 8 + length], rng)
    claimed = numbers(rng) % 2**64 if rng.random() < 0.05 else len(header)
    return claimed.to_bytes(8, "little") + header + raw[8 + length :]


# What is damaged


@dataclass(frozen=True)
class Target:
    """One file of a checkpoint: which, what is done to it, and what the command is then given."""

    file: str
    damage: Callable[[bytes, random.Random], bytes]
    kind: str = "hf"
    source: str = "."


def gguf_header(raw: bytes, rng: random.Random) -> bytes:
    return damaged_bytes(raw, rng, raw.index(b"token_embd.weight") + 2500)


def pickle_header(raw: bytes, rng: random.Random) -> bytes:
    """The zip's own records at both ends of the file, or the program of the pickle inside."""
    if rng.random() < 0.5:
        return damaged_bytes(raw, rng, 4000)
    cut = len(raw) - rng.choice([100, 1000, 8000])
    return raw[:cut] + damaged_bytes(raw[cut:], rng, len(raw) - cut)


def anywhere(raw: bytes, rng: random.Random) -> bytes:
    """Around one of the places where names are."""
    at = max(0, raw.find(rng.choice(NAMES), rng.randrange(len(raw))) - 40)
    return raw[:at] + damaged_bytes(raw[at:], rng, 120)


NAMES = (b"kernel", b"embedding", b"float32", b"layers", b"weight")

TARGETS = {
    "safetensors": Target("model.safetensors", damaged_header),
    "index": Target("model.safetensors.index.json", damaged, "shards"),
    "config": Target("config.json", damaged),
    "gguf": Target("model.gguf", gguf_header, "gguf", "model.gguf"),
    "pickle": Target("pytorch_model.bin", pickle_header, "pickle"),
    "msgpack": Target("flax_model.msgpack", anywhere, "msgpack"),
}


def write_gguf(path: Path) -> None:
    """llama-tiny, by the format's own library."""
    import gguf

    with open_checkpoint("preset:llama-tiny") as checkpoint:
        c: Any = checkpoint.config
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(c.num_hidden_layers)
        writer.add_context_length(c.max_position_embeddings)
        writer.add_embedding_length(c.hidden_size)
        writer.add_feed_forward_length(c.intermediate_size)
        writer.add_head_count(c.num_attention_heads)
        writer.add_head_count_kv(c.num_key_value_heads)
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_rope_freq_base(c.rope_theta)
        writer.add_token_list([f"w{n}" for n in range(c.vocab_size)])
        writer.add_token_types([1] * c.vocab_size)
        for name, array in convert(checkpoint, "gguf"):
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def write_pickle(path: Path) -> None:
    import torch

    with open_checkpoint("preset:llama-tiny") as checkpoint:
        torch.save({n: torch.from_numpy(x) for n, x in convert(checkpoint, "hf")}, path)


def write_msgpack(path: Path) -> None:
    from flax.serialization import msgpack_serialize

    tree: dict[str, Any] = {}
    with open_checkpoint("preset:llama-tiny") as checkpoint:
        for name, array in convert(checkpoint, "flax"):
            *parents, leaf = name.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = array
    path.write_bytes(msgpack_serialize(tree))


@dataclass
class Bench:
    """Good folders, copied once into memory, in which one file after the other is damaged."""

    root: Path = field(
        default_factory=lambda: Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    )

    def __post_init__(self) -> None:
        port("preset:llama-tiny", self.root / "hf", to="hf")
        port("preset:llama-tiny", self.root / "shards", to="hf", shard_size=120_000)
        for kind in ("gguf", "pickle", "msgpack"):
            (self.root / kind).mkdir()
            shutil.copy(self.root / "hf" / "config.json", self.root / kind)
        write_pickle(self.root / "pickle" / "pytorch_model.bin")
        write_msgpack(self.root / "msgpack" / "flax_model.msgpack")
        write_gguf(self.root / "gguf" / "model.gguf")
        self.whole = {n: (self.root / t.kind / t.file).read_bytes() for n, t in TARGETS.items()}

    def close(self) -> None:
        shutil.rmtree(self.root)

    def case(self, target: str, number: int) -> str:
        """Damage one file and read it. What came of it: "read", or the error's type. Raises Failed."""
        about = TARGETS[target]
        path = self.root / about.kind / about.file
        path.write_bytes(about.damage(self.whole[target], random.Random(f"{target}:{number}")))
        repeat = f"repeat with: scripts/fuzz-files --repeat {target}:{number}"
        try:
            _begun.append(time.thread_time())
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            read(self.root / about.kind / about.source)
            return "read"
        except TwinformersError as error:
            if not str(error).strip() or len(str(error)) > LONGEST:
                raise Failed(f"a message of {len(str(error))} characters; {repeat}") from error
            return type(error).__name__
        except BaseException as error:
            where = "".join(traceback.format_tb(error.__traceback__)[-3:])
            raise Failed(f"{type(error).__name__}: {str(error)[:300]}\n{where}{repeat}") from error
        finally:
            _begun.clear()
            signal.setitimer(signal.ITIMER_PROF, 0)
            path.write_bytes(self.whole[target])


class TooSlow(Exception):
    """The processor's time is up."""


#: The processor time of this thread when the file that is being read was begun.
_begun: list[float] = []


def _too_slow(*_: object) -> None:
    if not _begun:
        return  # it was on its way when the file was done
    left = SECONDS - (time.thread_time() - _begun[0])
    if left > 0:  # the timer counts what other threads of the process do as well
        signal.setitimer(signal.ITIMER_PROF, left)
        return
    raise TooSlow(f"more than {SECONDS} s of processor time")


def read(source: Path) -> None:
    """Everything that `port` would read."""
    with open_checkpoint(source) as checkpoint:
        weight_map(checkpoint.config).check(checkpoint.side, checkpoint.tensors, checkpoint.source)
        for name in weight_map(checkpoint.config).tensors(checkpoint.side):
            checkpoint.read(name)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


def run(target: str, first: int, count: int) -> tuple[Counter, int]:
    """Cases from number `first` on: how each ended, and by how many bytes the process grew."""
    logging.disable(logging.WARNING)
    # It stays: a signal that comes late, with nobody there to hear it, would end the process without a word.
    signal.signal(signal.SIGPROF, _too_slow)
    bench = Bench()
    try:
        bench.case(target, -1)  # what is loaded on first use
        before, ends = peak(), Counter()
        for number in range(first, first + count):
            ends[bench.case(target, number)] += 1
        if (grown := peak() - before) > GROWTH:
            raise Failed(f"memory grew by {grown >> 20} MB over {target}:{first} to {first + count - 1}")
        return ends, grown
    finally:
        bench.close()
        logging.disable(logging.NOTSET)


HEAD = """# Damaged files at random

`scripts/fuzz-files --cases {cases}`: each case damages one file of a checkpoint (values of its JSON replaced,
taken away, exchanged or named twice; bytes flipped, cut, doubled, overwritten by extreme numbers) and reads
the checkpoint as `port` does. No case crashed, took {seconds:g} s, raised an error that is not this project's
or made memory grow by {growth} MB or more over a chunk of {chunk} cases (the most: {most:.0f} MB).

| file | cases | read whole | refused, by error |
|---|---|---|---|
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/fuzz-files", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=50_000, help="in all, shared out over the targets")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--repeat", metavar="TARGET:n", help="one case, as a failure prints it")
    parser.add_argument("--report", type=Path, help="write a table in Markdown here")
    options = parser.parse_args(arguments)
    if options.repeat:
        target, _, number = options.repeat.partition(":")
        print(dict(run(target, int(number), 1)[0]))
        return 0
    each = options.cases // len(TARGETS)
    work = [(t, first, min(CHUNK, each - first)) for t in TARGETS for first in range(0, each, CHUNK)]
    totals: dict[str, Counter] = {t: Counter() for t in TARGETS}
    most, start = 0, time.monotonic()
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for (target, *_), (ends, grown) in zip(work, pool.map(run, *zip(*work, strict=True)), strict=True):
            totals[target] += ends
            most = max(most, grown)
            print(f"{sum(x.total() for x in totals.values())} cases", end="\r", file=sys.stderr)
    rows = []
    for target, ends in totals.items():
        refused = ", ".join(f"{n} {name}" for name, n in ends.most_common() if name != "read")
        rows.append(f"| {TARGETS[target].file} | {ends.total()} | {ends['read']} | {refused} |")
    head = HEAD.format(
        cases=options.cases, seconds=SECONDS, growth=GROWTH >> 20, chunk=CHUNK, most=most / 2**20
    )
    print(head + "\n".join(rows) + f"\n\n{time.monotonic() - start:.0f} s")
    if options.report:
        options.report.write_text(head + "\n".join(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
