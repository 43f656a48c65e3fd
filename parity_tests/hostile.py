"""Files that somebody broke or built to do harm, each with what the command must say about it.

The tests run every case through `twinformers`; `scripts/bad-input` shows beside it what other libraries make
of the same files.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from twinformers import port
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.configs import preset

TINY = preset("llama-tiny")
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PICKLE = "pytorch_model.bin"
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
DEEP = 100_000


@dataclass(frozen=True)
class Case:
    """`breaks` changes a whole folder of a kind in place; `message` is a pattern of what must be said.

    `verb` is the command, with {source}, {dest} and {root}, the folder of both, to be filled in. `file` is
    what a library that reads one file is given; empty where there is no such file.
    """

    breaks: Callable[[Path], object]
    message: str
    kind: str = "hf"
    verb: tuple[str, ...] = ("port", "{source}", "{dest}", "--to", "torch")
    file: str = WEIGHTS


def whole(root: Path) -> None:
    """One good folder of each kind that the cases break."""
    port("preset:llama-tiny", root / "hf", to="hf")
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(TINY.vocab_size)}, "w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(root / "hf" / "tokenizer.json"))
    port("preset:llama-tiny", root / "shards", to="hf", shard_size=60_000)
    port(PresetCheckpoint("tied", TINY.replace(tie_word_embeddings=True)), root / "tied", to="hf")
    shutil.copytree(root / "hf", root / "pickle")
    (root / "pickle" / WEIGHTS).unlink()
    torch.save(state(root / "hf"), root / "pickle" / PICKLE)
    for folder in root.iterdir():  # a sum that does not fit is another case than what it should have caught
        (folder / "SHA256SUMS").unlink(missing_ok=True)
    port("preset:llama-tiny", root / "summed", to="hf")


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in load_file(folder / WEIGHTS).items()}


# Ways to break


def header(change: Callable[[dict], object]) -> Callable[[Path], object]:
    """Change the header of the weights, true or not; the data stays."""

    def breaks(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        tensors = json.loads(content[8 : 8 + length])
        text = change(tensors) or json.dumps(tensors)
        raw = text if isinstance(text, bytes) else text.encode()
        (folder / WEIGHTS).write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])

    return breaks


def tensors(change: Callable[[dict], object], file: str = WEIGHTS) -> Callable[[Path], object]:
    """Rewrite the weights by safetensors itself."""

    def breaks(folder: Path) -> None:
        content = load_file(folder / file)
        change(content)
        save_file({name: np.ascontiguousarray(t) for name, t in content.items()}, folder / file)

    return breaks


def fields(file: str = CONFIG, **changes: object) -> Callable[[Path], object]:
    """Change fields of a JSON file; None takes a field away."""

    def breaks(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        content.update(changes)
        (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return breaks


def content(file: str, what: bytes | str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(what if isinstance(what, bytes) else what.encode())


def resized(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def in_place(file: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Put something else where a file was."""

    def breaks(folder: Path) -> None:
        (folder / file).rename(folder.parent / f"{folder.name}-was-{file}")
        make(folder / file)

    return breaks


def outside(file: str) -> Callable[[Path], object]:
    return in_place(file, lambda path: path.symlink_to(path.parent.parent / f"{path.parent.name}-was-{file}"))


def listed(change: Callable[[dict], object]) -> Callable[[Path], object]:
    """Change the index of the shards."""

    def breaks(folder: Path) -> None:
        found = json.loads((folder / INDEX).read_text())
        text = change(found["weight_map"]) or json.dumps(found)
        (folder / INDEX).write_text(str(text))

    return breaks


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def repeated(folder: Path) -> None:
    last = max(folder.glob("*.safetensors")).name
    tensors(lambda t: t.update({EMBED: load_file(first_shard(folder))[EMBED]}), last)(folder)


def named_twice(tensors: dict) -> str:
    text = json.dumps(tensors)
    return "{" + f'"{NORM}": {json.dumps(tensors[EMBED])}, ' + text[1:]


def retyped(code: str) -> Callable[[Path], object]:
    """Claim another dtype of the same width, as far as there is one: the sizes stay true."""

    def change(tensors: dict) -> None:
        wide = {"F8_E4M3": 4, "F4": 8, "I8": 4, "C64": 0.5}[code]
        shape = tensors[EMBED]["shape"]
        tensors[EMBED].update(dtype=code, shape=[shape[0], int(shape[1] * wide)])

    return header(change)


def moved(offset: int) -> Callable[[Path], object]:
    """The last tensor begins earlier or later than the one before it ends."""

    def change(tensors: dict) -> None:
        last = max((t for t in tensors.values() if "shape" in t), key=lambda t: t["data_offsets"][1])
        last["data_offsets"] = [n + offset for n in last["data_offsets"]]

    def breaks(folder: Path) -> None:
        header(change)(folder)
        resized(lambda raw: raw + bytes(offset) if offset > 0 else raw[:offset])(folder)

    return breaks


def added(name: str) -> Callable[[Path], object]:
    return tensors(lambda t: t.update({name: np.zeros(3, np.float32)}))


def poisoned(value: float) -> Callable[[Path], object]:
    return tensors(lambda t: t[NORM].__setitem__(3, value))


# Pickles


class Code:
    """What a pickle may ask for when it is loaded."""

    def __reduce__(self):
        return os.system, ("echo this was run",)


class Unknown:
    pass


def pickled(value: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: torch.save(value(folder), folder / PICKLE)


def rezipped(change: Callable[[str, bytes], bytes], compress: int = zipfile.ZIP_STORED):
    """Write the entries of the pickle's zip anew."""

    def breaks(folder: Path) -> None:
        with zipfile.ZipFile(folder / PICKLE) as old:
            entries = [(i.filename, old.read(i)) for i in old.infolist()]
        with zipfile.ZipFile(folder / PICKLE, "w", compress) as new:
            for name, raw in entries:
                new.writestr(name, change(name, raw))

    return breaks


def larger_storage(folder: Path) -> None:
    """The pickle says that a storage holds a million times more numbers than the file does."""
    count = TINY.vocab_size * TINY.hidden_size

    def change(name: str, raw: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return raw
        old = b"M" + struct.pack("<H", count) if count < 65536 else b"J" + struct.pack("<i", count)
        assert old in raw
        return raw.replace(old, b"J" + struct.pack("<i", 2**31 - 1))

    rezipped(change)(folder)


# Templates


def template(source: str) -> Callable[[Path], object]:
    return content("chat_template.jinja", source)


CHAT = ("generate", "{source}", "--chat", "--framework", "torch", "--prompt", "w3")


# GGUF


def gguf(case: str) -> Callable[[Path], object]:
    def breaks(folder: Path) -> None:
        import test_gguf

        (folder / "model.gguf").write_bytes(test_gguf.CORRUPT[case][0])

    return breaks


GGUF = ("port", "{source}/model.gguf", "{dest}", "--to", "hf")


def zeros(count: int) -> str:
    each = '"{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    return "{" + ",".join(each.format(n) for n in range(count)) + "}"


def flipped(folder: Path) -> None:
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / WEIGHTS).write_bytes(raw)


CASES: dict[str, Case] = {
    # one file of weights
    "truncated": Case(resized(lambda raw: raw[:-10]), f"{WEIGHTS}: the file is truncated"),
    "cut in its header": Case(resized(lambda raw: raw[:100]), f"{WEIGHTS}: the file ends in its header"),
    "extended": Case(
        resized(lambda raw: raw + b"\0" * 8), f"{WEIGHTS}: the file holds more than its tensors"
    ),
    "empty": Case(resized(lambda raw: b""), f"{WEIGHTS}: not a safetensors file"),
    "header of 2^64 - 1 bytes": Case(
        resized(lambda raw: b"\xff" * 8 + raw[8:]), f"{WEIGHTS}: the header is too long"
    ),
    "a million tensors of no size": Case(
        header(lambda t: zeros(1_000_000)), f"{WEIGHTS}: the header is too long"
    ),
    "80,000 tensors of no size": Case(
        header(lambda t: zeros(80_000)), "truncated|holds more|left over|missing"
    ),
    "tensors overlap": Case(moved(-4), f"{WEIGHTS}: .*: the tensor overlaps"),
    "a hole between tensors": Case(moved(4), f"{WEIGHTS}: .*: the tensor leaves a hole"),
    "a key twice in the header": Case(
        header(named_twice), f"{WEIGHTS}: {NORM}: a tensor occurs twice in the header"
    ),
    "a tensor called ../x": Case(added("../x"), r"\.\./x.*"),
    "a tensor with NUL in its name": Case(
        header(lambda t: json.dumps({"a\0b" if k == NORM else k: v for k, v in t.items()})),
        rf"(?s)missing.*{NORM}",
    ),
    "a tensor without a name": Case(added(""), "left over"),
    "a tensor of rank 1000": Case(
        header(lambda t: t[NORM].update(shape=[1] * 999 + t[NORM]["shape"])), f"{WEIGHTS}: {NORM}: bad shape"
    ),
    "an enormous shape": Case(
        header(lambda t: t[EMBED].update(shape=[2**31, 2**31])),
        f"{WEIGHTS}: {EMBED}: the header contradicts itself",
    ),
    "a negative shape": Case(
        header(lambda t: t[EMBED].update(shape=[-1, -1])), f"{WEIGHTS}: {EMBED}: bad shape"
    ),
    "header not in UTF-8": Case(header(lambda t: b'{"\xff": 1}'), f"{WEIGHTS}: the header .* is not JSON"),
    "header nested 100,000 deep": Case(
        header(lambda t: "[" * DEEP + "]" * DEEP), f"{WEIGHTS}: the header .* is not JSON"
    ),
    "fp8": Case(retyped("F8_E4M3"), f"(?s){WEIGHTS}: {EMBED}: unsupported dtype.*to do"),
    "fp4": Case(retyped("F4"), f"(?s){WEIGHTS}: {EMBED}: unsupported dtype.*to do"),
    "int8": Case(retyped("I8"), f"(?s){WEIGHTS}: {EMBED}: unsupported dtype.*to do"),
    "complex": Case(retyped("C64"), f"(?s){WEIGHTS}: {EMBED}: unsupported dtype.*to do"),
    # tensors against the configuration
    "a tensor is missing": Case(tensors(lambda t: t.pop(NORM)), f"(?s)1 tensor is missing.*{NORM}"),
    "a tensor too many": Case(added("model.extra"), "1 tensor is left over"),
    "a wrong shape": Case(
        tensors(lambda t: t.update({NORM: t[NORM][:-1]})), f"{WEIGHTS}: {NORM}: wrong shape"
    ),
    "one layer more in the configuration": Case(
        fields(num_hidden_layers=TINY.num_hidden_layers + 1), "(?s)9 tensors are missing.*layers.3"
    ),
    "one layer less in the configuration": Case(
        fields(num_hidden_layers=TINY.num_hidden_layers - 1), "(?s)9 tensors are left over"
    ),
    "tied weights that differ": Case(
        tensors(lambda t: t.update({"lm_head.weight": t[EMBED] + 1})),
        f"(?s){WEIGHTS}: lm_head.weight: the configuration ties two tensors that differ",
        "tied",
    ),
    "NaN": Case(
        poisoned(np.nan),
        f"(?s){NORM}.*NaN",
        verb=("port", "{source}", "{dest}", "--to", "torch", "--strict"),
    ),
    "infinity": Case(
        poisoned(np.inf),
        f"(?s){NORM}.*[Ii]nf",
        verb=("port", "{source}", "{dest}", "--to", "torch", "--strict"),
    ),
    # config.json
    "enormous shapes in config.json": Case(fields(vocab_size=2**39), "(?s)wrong shape.*549755813888"),
    "a width that is no number": Case(
        fields(hidden_size="48"), f"(?s){CONFIG}: hidden_size: bad value.*found: +'48'"
    ),
    "a missing field": Case(fields(model_type=None), f"(?s){CONFIG}: model_type: .*found: +None"),
    "config.json not in UTF-8": Case(
        content(CONFIG, b'{"a": "\xff\xfe"}'), f"{CONFIG}: not readable as JSON"
    ),
    "config.json nested 100,000 deep": Case(
        content(CONFIG, '{"model_type": ' + "[" * DEEP + "]" * DEEP + "}"), f"{CONFIG}: not readable as JSON"
    ),
    "config.json is a pipe": Case(in_place(CONFIG, os.mkfifo), f"(?s){CONFIG}: not a regular file.*a pipe"),
    # shards
    "a shard is missing": Case(
        lambda f: first_shard(f).unlink(), "model-00001.*the file does not exist", "shards", file=""
    ),
    "the index lies": Case(
        listed(lambda m: m.update({EMBED: max(m.values())})),
        f"{EMBED}: the index and the files disagree",
        "shards",
        file="",
    ),
    "the index names a key twice": Case(
        listed(lambda m: json.dumps({"weight_map": m}).replace("{", '{"weight_map": {}, ', 1)),
        f"{INDEX}: a key appears twice",
        "shards",
        file="",
    ),
    "the index leaves the folder": Case(
        listed(lambda m: m.update({EMBED: "../hf/model.safetensors"})),
        "the index points out of its folder",
        "shards",
        file="",
    ),
    "a tensor in two shards": Case(repeated, f"{EMBED}: a tensor occurs in two files", "shards", file=""),
    # what is no file
    "a link that leaves the folder": Case(
        outside(WEIGHTS), f"{WEIGHTS}: the file is a link that leaves its folder"
    ),
    "a link to nowhere": Case(
        in_place(WEIGHTS, lambda p: p.symlink_to("nothing")), "no weights|does not exist"
    ),
    "a pipe for the weights": Case(
        in_place(WEIGHTS, os.mkfifo), f"(?s){WEIGHTS}: not a regular file.*a pipe"
    ),
    "a folder for the weights": Case(
        in_place(WEIGHTS, Path.mkdir), f"(?s){WEIGHTS}: not a regular file.*a folder"
    ),
    # pickles
    "a pickle with code": Case(
        pickled(lambda f: {"a": Code()}), f"(?s){PICKLE}: the file asks for code", "pickle", file=PICKLE
    ),
    "a pickle of an unknown type": Case(
        pickled(lambda f: {"a": Unknown()}), f"(?s){PICKLE}: the file asks for code", "pickle", file=PICKLE
    ),
    "a pickle of something else": Case(
        pickled(lambda f: [1, 2]), f"(?s){PICKLE}: not a dictionary", "pickle", file=PICKLE
    ),
    "a storage larger than the file": Case(larger_storage, PICKLE, "pickle", file=PICKLE),
    "a compressed bomb": Case(
        rezipped(lambda name, raw: raw if "pkl" in name else bytes(1 << 24), zipfile.ZIP_DEFLATED),
        PICKLE,
        "pickle",
        file=PICKLE,
    ),
    "a truncated pickle": Case(
        lambda f: (f / PICKLE).write_bytes((f / PICKLE).read_bytes()[:-100]), PICKLE, "pickle", file=PICKLE
    ),
    # chat templates
    "a template that loops for ever": Case(
        template(
            "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}{% endfor %}"
            "{% endfor %}{% endfor %}"
        ),
        "the chat template failed",
        verb=CHAT,
        file="",
    ),
    "a template that eats memory": Case(
        template("{{ 'x' * 10**10 }}"), "the chat template failed", verb=CHAT, file=""
    ),
    "a template that reaches for attributes": Case(
        template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        "the chat template failed",
        verb=CHAT,
        file="",
    ),
    # GGUF
    "GGUF with a corrupt count of keys": Case(gguf("many keys"), "key count", verb=GGUF, file="model.gguf"),
    "GGUF with a corrupt count of tensors": Case(
        gguf("many tensors"), "tensor count", verb=GGUF, file="model.gguf"
    ),
    "GGUF with nested arrays": Case(gguf("nested array"), "nested", verb=GGUF, file="model.gguf"),
    "GGUF with a lying offset": Case(gguf("far beyond"), "beyond the end", verb=GGUF, file="model.gguf"),
    "GGUF with a string of 2^63 bytes": Case(
        gguf("long string"), "ends before", verb=GGUF, file="model.gguf"
    ),
    # destinations
    "the destination is the source": Case(
        lambda f: None,
        "the destination is the source",
        verb=("port", "{source}", "{source}", "--to", "hf", "--overwrite"),
        file="",
    ),
    "the destination exists": Case(
        lambda f: (f.parent / "other").mkdir(),
        "the destination exists",
        verb=("port", "{source}", "{root}/other", "--to", "torch"),
        file="",
    ),
    # after writing
    "a bit flip after writing": Case(
        flipped, f"{WEIGHTS}", "summed", verb=("inspect", "{source}", "--check")
    ),
}
