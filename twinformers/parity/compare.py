"""`compare`: both twins side by side on the same weights, in figures, in speed and in source.

What `verify` proves comes first, gradients included; beside it stand the choice of every next token, the
speed and memory of each framework, and the twin files with what really differs between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from twinformers.checkpoints import Checkpoint, opened
from twinformers.checkpoints.dtypes import check_dtype
from twinformers.errors import UsageError
from twinformers.loading import Source, find_device, load_tokenizer
from twinformers.parity.comparing.sources import SourcePair, twin_sources
from twinformers.parity.comparing.speed import Speed, measure
from twinformers.parity.comparing.tokens import Agreement, agreement
from twinformers.parity.kinds import kind
from twinformers.parity.page import facts
from twinformers.parity.reference import has_reference
from twinformers.parity.results import VerifyReport
from twinformers.parity.verify import CHECKS, verify
from twinformers.weight_maps import weight_map

PROMPT = "The same sum, added up in another order,"
#: The first tokens of a random text, where there is no tokenizer.
RANDOM_TOKENS = 24


@dataclass(frozen=True)
class CompareResult:
    """Everything that the page shows. `ok`: every judged comparison holds, and the twins choose alike.

    `parameters` names the gradients that belong to a parameter, among those of `report`.
    """

    ok: bool
    source: str
    architecture: str
    report: VerifyReport
    tokens: list[Agreement]
    speed: list[Speed]
    sources: list[SourcePair]
    parameters: list[str]
    facts: dict[str, str]
    config: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    source: Source,
    *,
    dtypes: Sequence[str] = ("float64", "float32"),
    prompt: str | None = None,
    max_new_tokens: int = 32,
    timing: bool = True,
    jax_device: Any = None,
    torch_device: Any = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> CompareResult:
    """Verify the twins and set them side by side; `comparing.page.write_comparison` makes a page of it.

    `prompt` is continued greedily by up to `max_new_tokens`; without one, a text of our own or, where the
    source has no tokenizer, random tokens. `timing` measures speed and memory, in a process for each
    framework, in the first dtype that is not float64. Raises UsageError for a bad dtype, device or number,
    SourceError for a prompt where there is no tokenizer, and the errors of the source.
    """
    for dtype in dtypes:
        check_dtype(dtype)
    if max_new_tokens < 1:
        raise UsageError(
            "bad value", where="max_new_tokens", expected="a positive integer", found=str(max_new_tokens)
        )
    dtypes = sorted(dict.fromkeys(dtypes), key=lambda d: d != "float64")
    with opened(source) as checkpoint:
        if not kind(checkpoint.config).generates:
            raise UsageError(
                "only models that generate are compared token by token",
                where=checkpoint.source,
                expected="a language model or a translator",
                found=checkpoint.config.architecture,
                hint="use `twinformers verify --report`",
            )
        ids, options = _prompt(checkpoint, prompt, max_new_tokens)
        referred = has_reference(checkpoint.config)
        speed: list[Speed] = []
        if timing:  # first of all: an accelerator that this process holds is of no use to another one
            for name in ("jax", "torch", *(["transformers"] if referred else [])):
                on_progress(f"speed of {name}")
                device = _device_name(jax_device if name == "jax" else torch_device)
                working = next((d for d in dtypes if d != "float64"), "float64")
                speed.append(measure(checkpoint.source, name, working, device))
        devices = {"jax": find_device("jax", jax_device), "torch": find_device("torch", torch_device)}
        report = verify(
            checkpoint,
            dtypes=dtypes,
            checks=[c for c in (*CHECKS, "gradients") if referred or c != "reference"],
            jax_device=devices["jax"],
            torch_device=devices["torch"],
            on_progress=on_progress,
        )
        tokens = []
        for dtype in dtypes:
            on_progress(f"{dtype}: token by token")
            tokens.append(
                agreement(checkpoint, dtype, ids, max_new_tokens, devices, reference=referred, **options)
            )
        config = checkpoint.config
        return CompareResult(
            report.ok and all(t.ok for t in tokens),
            checkpoint.source,
            config.architecture,
            report,
            tokens,
            speed,
            twin_sources(config.architecture),
            list(weight_map(config).leaves("torch")),
            facts(report, checkpoint, referred, devices["jax"], devices["torch"]),
            config.to_dict(),
        )


def _prompt(checkpoint: Checkpoint, prompt: str | None, count: int) -> tuple[list[int], dict[str, Any]]:
    """The tokens to continue, and how `agreement` is to show them."""
    config: Any = checkpoint.config
    if prompt is None and "tokenizer.json" not in checkpoint.assets:
        return kind(config).inputs(config)[0][0, :RANDOM_TOKENS].tolist(), {}
    tokenizer, text = load_tokenizer(checkpoint), PROMPT if prompt is None else prompt
    ids = tokenizer.encode(text)
    if not ids:
        raise UsageError("the prompt has no tokens", where="prompt", expected="some text", found=repr(text))
    if len(ids) + count > config.max_position_embeddings:
        raise UsageError(
            "more positions than the model was made for",
            where="prompt",
            expected=f"prompt and new tokens together at most {config.max_position_embeddings}",
            found=f"{len(ids)} + {count}",
        )
    return ids, {
        "text": lambda token: tokenizer.decode([token], skip_special=False),
        "stop": tokenizer.eos_ids,
        "shown": text,
    }


def _device_name(device: Any) -> str | None:
    """The name of a device for another process, which finds it by that."""
    if device is None or isinstance(device, str):
        return device
    return f"{device.platform}:{device.id}" if hasattr(device, "platform") else str(device)
