"""What a compiled program says of itself: its collectives and its cycles, loops counted as often as they run.

The compiler's own analysis counts the body of a loop once. Here the text of the program is read: which
computation calls which, and how often a loop goes round.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field

#: So many cycles, or more, stand for an operation that the compiler has no estimate of.
UNKNOWN = 2**50
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
#: Bits of an element.
_BITS = {"pred": 8, "bf16": 16} | {f"{k}{n}": n for k in "sufc" for n in (2, 4, 8, 16, 32, 64, 128)}
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^(?:ROOT )?%?([\w.-]+) = (.*)$")
#: The operation's name stands before the first bracket that a space does not follow a type with.
_OPERATION = re.compile(r"(?:^|[\s)}])([a-z][\w-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")
_LISTED = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")


@dataclass
class Program:
    """What one device does in one run: collectives by kind with their number and bytes, and cycles."""

    count: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    cycles: float = 0.0
    custom_calls: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    operation: str
    text: str


def read(text: str) -> Program:
    """Read the text of an optimised HLO module (`compiled.as_text()`)."""
    computations, entry = _computations(text)
    times = _times(computations, entry)
    inside = {
        name for body in computations.values() for i in body if i.operation == "fusion" for name in called(i)
    }
    program = Program()
    for name, body in computations.items():
        n = times.get(name, 0)
        for i in body if n else ():
            kind = i.operation.removesuffix("-start")
            if kind in COLLECTIVES:
                program.count[kind] += n
                program.bytes[kind] += n * _moved(kind, i)
            if i.operation == "custom-call":
                target = re.search(r'custom_call_target="([^"]*)"', i.text)
                program.custom_calls[target.group(1) if target else "?"] += n
            if name not in inside and (match := _CYCLES.search(i.text)):
                cycles = int(match.group(1))
                program.cycles += n * cycles if cycles < UNKNOWN else 0
    return program


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation by its name, and the name of the first to run."""
    found: dict[str, list[Instruction]] = {}
    entry, body = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            body = found.setdefault(head.group(1), [])
            entry = head.group(1) if line.startswith("ENTRY") else entry
        elif line == "}" or line.startswith("}, execution_thread"):  # attributes go over lines, too
            body = None
        elif body is not None and (match := _LINE.match(line.strip())):
            rest = match.group(2)
            operation = _OPERATION.search(rest)
            if operation:
                shape = rest[: operation.start(1)]
                body.append(Instruction(match.group(1), shape, operation.group(1), rest))
    return found, entry


def called(instruction: Instruction) -> list[str]:
    """The computations that an instruction names."""
    if instruction.operation.endswith(("-update", "-done")):
        return []  # of what their start began
    names = _CALLED.findall(instruction.text)
    if listed := _LISTED.search(instruction.text):
        names += [name.strip().lstrip("%") for name in listed.group(1).split(",")]
    return names


def _times(computations: dict[str, list[Instruction]], entry: str) -> Counter[str]:
    """How often each computation runs. A branch counts as if it were always taken."""
    order: dict[str, None] = {}

    def visit(name: str) -> None:
        if name in order or name not in computations:
            return
        for i in computations[name]:
            for other in called(i):
                visit(other)
        order[name] = None

    visit(entry)
    times: Counter[str] = Counter({entry: 1})
    for name in reversed(order):  # callers before what they call
        for i in computations[name]:
            rounds = trips(i, computations) if i.operation == "while" else 1
            for other in called(i):
                times[other] += times[name] * rounds
    return times


def trips(loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
    """How often a loop goes round: the constant that its counter, from 0 on, is compared with; else 1."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text):
        return int(known.group(1))
    condition = re.search(r"condition=%?([\w.-]+)", loop.text)
    body = computations.get(condition.group(1), []) if condition else []
    limits = [re.match(r"s32\[\]\S* constant\((\d+)\)", i.text) for i in body if i.operation == "constant"]
    numbers = [int(m.group(1)) for m in limits if m]
    return numbers[0] if len(numbers) == 1 else 1


def size(shape: str) -> int:
    """Bytes of all arrays in a type."""
    bits = sum(
        _BITS.get(kind, 8) * math.prod(int(n) for n in axes.split(",") if n)
        for kind, axes in _ARRAY.findall(shape)
    )
    return bits // 8


def _moved(kind: str, i: Instruction) -> int:
    """Bytes of the larger side of a collective: what is gathered, what is reduced."""
    arrays = [size(f"{kind}[{axes}]") for kind, axes in _ARRAY.findall(i.shape)]
    if not arrays:
        return 0
    # The result of a start holds operands and results; one of them is the larger.
    largest = max(arrays) if i.operation.endswith("-start") else sum(arrays)
    return largest * (_group(i) if kind == "reduce-scatter" else 1)


def _group(i: Instruction) -> int:
    """How many devices share in a collective."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", i.text):
        return len(match.group(1).split(","))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", i.text):
        return int(match.group(2))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", i.text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", match.group(2)))
    return 1
