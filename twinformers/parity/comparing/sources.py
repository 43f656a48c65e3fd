"""The twin files side by side, statement by statement, with what really differs apart from mere spelling.

`nnx.Linear(..., use_bias=False, param_dtype=dtype, rngs=rngs)` and `nn.Linear(..., bias=False, dtype=dtype)`
say the same. Statements are compared once both sides' vocabulary is put into the same words; comments, blank
lines and line breaks do not count. What is still unequal is a real difference.
"""

from __future__ import annotations

import difflib
import importlib.util
import io
import re
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: How the frameworks spell what is the same, applied to both sides in this order.
SPELLINGS: tuple[tuple[str, str], ...] = (
    (r"^(import jax|import jax\.numpy as jnp|from flax import nnx|import torch|from torch import nn)$", ""),
    (r"^super\(\)\.__init__\(\)$", ""),
    (r"\b(jax|torch)_models\b", "models"),
    (r"\b(nn\.functional|jax\.nn|jax\.lax|jnp|jax|nnx|nn|torch)\.(?=\w)", ""),
    (r", (rngs=rngs|rngs: Rngs)\b", ""),
    (r"\bforward\b", "__call__"),
    (r"\bArray\b", "Tensor"),
    (r"\bEmbed\b", "Embedding"),
    (r"\bModuleList\b", "List"),
    (r"\buse_bias\b", "bias"),
    (r"\bparam_dtype\b", "dtype"),
    (r"\baxis=", "dim="),
    (r"\bkeepdims\b", "keepdim"),
    (r"\bconcatenate\b", "cat"),
    (r"\.astype\(", ".to("),
    (r"\b(kernel|scale)\b|(?<=\.)embedding\b", "weight"),
    (r"\bParam\b", "Parameter"),
    (r"\[\.\.\.\](?!\w)", ""),
    (r"\bdtype=dtype\b", "dtype"),
    (r"\b(in Flax NNX|in PyTorch)\b", "here"),
)
NOTE = re.compile(r"# vs (torch|jax):")


@dataclass(frozen=True)
class Line:
    """A line of a file: its number there, from 1, its text, and the comment on how the frameworks differ."""

    number: int
    text: str
    note: str


@dataclass(frozen=True)
class Row:
    """Lines that belong beside each other. `kind`: same, spelling (other words for the same) or different."""

    kind: str
    left: list[Line]
    right: list[Line]


@dataclass(frozen=True)
class SourcePair:
    """One architecture's file in both frameworks; how many statements there are on both sides, and differ."""

    name: str
    rows: list[Row]
    statements: int
    different: int


@dataclass(frozen=True)
class Statement:
    """Consecutive lines, and what they say in the common words: "" if it is nothing of their own."""

    lines: list[Line]
    meaning: str


def twin_sources(architecture: str) -> list[SourcePair]:
    """The architecture's own file first, then the twin files that it imports from."""
    names, found = [architecture], []
    for name in names:
        left, right = (_read(f"{side}_models.{name}") for side in ("jax", "torch"))
        found.append(compare_sources(name, left, right))
        imported = re.findall(r"^from jax_models\.(\w+) import", left, re.MULTILINE)
        names += [other for other in imported if other not in names]
    return found


def _read(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"there is no module {module}", name=module)
    return Path(spec.origin).read_text(encoding="utf-8")


def compare_sources(name: str, left: str, right: str) -> SourcePair:
    """Align two files statement by statement."""
    sides = [statements(left), statements(right)]
    speaking = [[n for n, s in enumerate(side) if s.meaning] for side in sides]
    meanings = [[side[n].meaning for n in numbers] for side, numbers in zip(sides, speaking, strict=True)]
    rows, done, different = [], [0, 0], 0
    codes = difflib.SequenceMatcher(None, meanings[0], meanings[1], autojunk=False).get_opcodes()
    for tag, *spans in codes:
        starts, ends = (spans[0], spans[2]), (spans[1], spans[3])
        for k in range(max(e - s for s, e in zip(starts, ends, strict=True))):
            aside, told = [], []
            for n, side in enumerate(sides):
                here = speaking[n][starts[n] + k] if starts[n] + k < ends[n] else None
                # What says nothing of its own stands before the statement that it belongs to.
                stop = done[n] if here is None else here
                aside.append(_lines(side[done[n] : stop]))
                told.append([] if here is None else side[here].lines)
                done[n] = stop if here is None else here + 1
            rows.append(_row("spelling", *aside))
            rows.append(_row("spelling" if tag == "equal" else "different", *told))
        different += 0 if tag == "equal" else sum(e - s for s, e in zip(starts, ends, strict=True))
    rows.append(_row("spelling", *(_lines(side[n:]) for side, n in zip(sides, done, strict=True))))
    return SourcePair(name, [r for r in rows if r.left or r.right], sum(map(len, speaking)), different)


def _lines(found: Sequence[Statement]) -> list[Line]:
    return [line for statement in found for line in statement.lines]


def _row(kind: str, left: list[Line], right: list[Line]) -> Row:
    alike = [(a.text, a.note) for a in left] == [(a.text, a.note) for a in right]
    return Row("same" if alike and kind == "spelling" else kind, left, right)


def statements(text: str) -> list[Statement]:
    """The statements of a file, comment lines and blank lines each on their own."""
    lines = [Line(n, *_parted(line)) for n, line in enumerate(text.splitlines(), start=1)]
    found: list[Statement] = []
    words: list[tokenize.TokenInfo] = []
    first, last = 0, 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.NL,
            tokenize.COMMENT,
            tokenize.ENDMARKER,
        ):
            continue
        if token.type == tokenize.NEWLINE:
            found += [Statement([line], "") for line in lines[last : first - 1]]
            found.append(Statement(lines[first - 1 : token.start[0]], _meaning(words)))
            first, last, words = 0, token.start[0], []
            continue
        first = first or token.start[0]
        words.append(token)
    return found + [Statement([line], "") for line in lines[last:]]


def _parted(line: str) -> tuple[str, str]:
    """What stands before a comment on the difference, and the comment."""
    match = NOTE.search(line)
    return (line[: match.start()], line[match.start() :]) if match else (line, "")


def _meaning(words: Sequence[tokenize.TokenInfo]) -> str:
    """The statement in one line and in the common words, indented as it is: where it stands matters."""
    parts: list[str] = []
    before = words[0]
    for word in words:
        # A line break inside brackets is layout, and so is the comma before a closing bracket.
        apart = word.start != before.end and before.string not in "([{" and word.string not in ")]}"
        if word.string in (")", "]", "}") and parts and parts[-1] == ",":
            parts.pop()
        parts.append(f" {word.string}" if apart else word.string)
        before = word
    text = "".join(parts).strip()
    for pattern, same in SPELLINGS:
        text = re.sub(pattern, same, text)
    text = re.sub(r"\s+", " ", text).strip()
    return f"{' ' * words[0].start[1]}{text}" if text else ""
