"""What is measured: a task at a size, and the implementations that do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from twinformers.errors import UsageError

TASKS = ("decode", "prefill", "train", "load", "start")
SWEEPS = ("length", "batch", "size")
FRAMEWORKS = ("jax", "torch", "transformers")

#: In how many ways a task is done: by transformers in every one that it offers; where nothing stands, in one.
#: What compiles comes first, because it may cost the process.
WAYS = {
    ("transformers", "decode"): ("compile", "eager", "sdpa", "static"),
    ("transformers", "prefill"): ("compile", "eager", "sdpa"),
    ("transformers", "train"): ("compile", "eager", "sdpa"),
    ("torch", "train"): ("compile", "eager"),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One task at one size.

    `decode`: `new_tokens` - 1 steps of `batch` sequences after a prompt of `tokens`. `prefill`: the first
    token of `batch` prompts. `train`: an update from `batch` x `tokens`. `load`: a folder to a model.
    `start`: a new process to its first token; `warm` leaves it what earlier ones compiled. `layers` makes
    the model shallower. `sweep` names the line of a plot that the case is a point of.
    """

    task: str
    batch: int = 1
    tokens: int = 128
    new_tokens: int = 1
    warm: bool = False
    layers: int | None = None
    sweep: str = ""

    @property
    def label(self) -> str:
        """The case in words."""
        match self.task:
            case "decode":
                what = f"decode, batch {self.batch}, {self.tokens} in, {self.new_tokens} out"
            case "prefill":
                what = f"prefill {self.tokens} tokens, batch {self.batch}"
            case "train":
                what = f"training step, batch {self.batch} x {self.tokens} tokens"
            case "start":
                what = f"start to first token, compilation cache {'warm' if self.warm else 'cold'}"
            case _:
                what = self.task
        return f"{what}, {self.layers} layers" if self.layers else what

    @property
    def produced(self) -> int:
        """The tokens whose rate is the case's speed; 0 where only the time counts."""
        counts = {"decode": self.new_tokens - 1, "prefill": self.tokens, "train": self.tokens}
        return self.batch * counts.get(self.task, 0)

    def variants(self, framework: str) -> tuple[str, ...]:
        """The ways in which a framework does the task."""
        return WAYS.get((framework, self.task), ("",))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def cases(
    tasks: Sequence[str],
    *,
    batches: Sequence[int] = (1, 8),
    tokens: int = 128,
    new_tokens: int = 64,
) -> list[Case]:
    """Every task at every batch that it knows. Raises UsageError for an unknown task and a bad number."""
    known("task", tasks, TASKS)
    positive("batch", *batches)
    positive("prompt_tokens", tokens)
    if new_tokens < 2 and "decode" in tasks:
        raise UsageError(
            "bad value",
            where="new_tokens",
            expected="2 or more: decoding follows the first",
            found=str(new_tokens),
        )
    found = []
    for task in dict.fromkeys(tasks):
        if task == "start":
            found += [Case(task=task, tokens=tokens, warm=warm) for warm in (False, True)]
        elif task == "load":
            found.append(Case(task=task))
        else:
            new = new_tokens if task == "decode" else 1
            found += [Case(task=task, batch=b, tokens=tokens, new_tokens=new) for b in dict.fromkeys(batches)]
    return found


def swept(case: Case, sweep: str, config: Any) -> list[Case]:
    """The case at several lengths, batches or depths, from small to large."""
    known("sweep", [sweep], SWEEPS)
    if case.task in ("load", "start"):
        raise UsageError(
            "this task has no size to sweep",
            where="sweep",
            expected="decode, prefill, train",
            found=case.task,
        )
    if sweep == "batch":
        values = sorted({max(1, case.batch * n // 4) for n in (1, 2, 4, 8, 16)})
        return [_at(case, sweep, batch=n) for n in values]
    if sweep == "size":
        most = config.num_hidden_layers
        return [_at(case, sweep, layers=n) for n in sorted({max(1, most * n // 4) for n in (1, 2, 3, 4)})]
    most = config.max_position_embeddings - case.new_tokens
    values = sorted({min(most, max(1, case.tokens * n // 4)) for n in (1, 2, 4, 8, 16)})
    return [_at(case, sweep, tokens=n) for n in values]


def _at(case: Case, sweep: str, **size: Any) -> Case:
    return Case(**{**case.to_dict(), **size, "sweep": sweep})


def known(where: str, given: Sequence[str], allowed: Sequence[str]) -> None:
    """Raise UsageError for a name that is not allowed."""
    for name in given:
        if name not in allowed:
            raise UsageError(
                f"unknown {where}", where=where, expected=f"one of {', '.join(allowed)}", found=repr(name)
            )


def positive(where: str, *numbers: float) -> None:
    """Raise UsageError for what is not above 0."""
    for number in numbers:
        if not number > 0:
            raise UsageError("bad value", where=where, expected="a positive number", found=str(number))


def fits(found: Sequence[Case], config: Any) -> None:
    """Raise UsageError where a case needs more positions, or more layers, than the model has."""
    for case in found:
        most = config.max_position_embeddings
        if case.task in ("decode", "prefill", "train") and case.tokens + case.new_tokens > most:
            raise UsageError(
                "more positions than the model was made for",
                where="prompt_tokens",
                expected=f"prompt and new tokens together at most {most}",
                found=f"{case.tokens} + {case.new_tokens}",
            )
