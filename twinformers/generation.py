"""Text from a source: tokenizer, model and engine put together."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinformers.checkpoints import opened
from twinformers.configs import Sampling
from twinformers.configs._sampling import check_guesses
from twinformers.errors import UsageError
from twinformers.loading import FRAMEWORKS, Source, load, load_tokenizer

if TYPE_CHECKING:
    from twinformers.checkpoints.tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerateResult:
    """What one framework generated. `tokens` excludes the prompt and includes the stop token, if one came.

    `prefill_seconds` is the time to the first token once everything is compiled; `compile_seconds` is what
    that took before, which a second generation of the same shapes does not pay.
    """

    framework: str
    text: str
    tokens: list[int]
    prompt_tokens: int
    compile_seconds: float
    prefill_seconds: float
    decode_tokens_per_second: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def encode_prompt(tokenizer: Tokenizer, prompt: str, chat: bool) -> list[int]:
    """Token ids of a prompt; with `chat`, as the one message of a user, in the model's own template."""
    if not chat:
        return tokenizer.encode(prompt)
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    # The template writes the special tokens itself: adding them again would double the first one.
    return tokenizer.encode(text, special=False)


def keep_compilations() -> None:
    """Have JAX keep on disk what it compiles, so that the next process starts several times faster.

    In `$XDG_CACHE_HOME/twinformers/jax`, unless JAX was told a place (JAX_COMPILATION_CACHE_DIR).
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(home / "twinformers" / "jax"))


def _engine(framework: str, model: Any, lookup: int) -> Any:
    if lookup:
        return importlib.import_module(f"{framework}_models.lookup").LookupGenerator(model, lookup)
    return importlib.import_module(f"{framework}_models.generate").Generator(model)


def generate(
    source: Source,
    prompt: str,
    *,
    framework: str = "jax",
    chat: bool = False,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    dtype: str = "float32",
    device: Any = None,
    attention: str = "fused",
    quantize: str | None = None,
    lookup: int = 0,
    on_text: Callable[[str, str], None] | None = None,
) -> list[GenerateResult]:
    """Continue a prompt with "jax", "torch" or "both", one after the other; one result per framework.

    `attention` and `quantize` are as in `load`. `lookup` tokens at a time are guessed from what stands in the
    text already (`lookup.py`), which changes the speed and not the tokens. `on_text(framework, piece)`
    receives the text as it appears. Raises UsageError for bad options and the errors of loading the source.
    """
    frameworks: Sequence[str] = FRAMEWORKS if framework == "both" else (framework,)
    if not set(frameworks) <= set(FRAMEWORKS):
        raise UsageError(
            "unknown framework", where="framework", expected="jax, torch or both", found=repr(framework)
        )
    if lookup:
        check_guesses(lookup)
    with opened(source) as checkpoint:
        if checkpoint.config.kind != "causal":
            raise UsageError(
                "this model continues no text",
                where=checkpoint.source,
                expected="a causal language model",
                found=checkpoint.config.architecture,
                hint="use `twinformers translate`, or `twinformers embed` for an encoder",
            )
        tokenizer = load_tokenizer(checkpoint)
        prompt_ids = encode_prompt(tokenizer, prompt, chat)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling or Sampling()}
        results = []
        for name in frameworks:
            # In PyTorch, what one row gains by the layout is less than it costs in memory.
            choice: dict[str, Any] = {"attention": attention, "quantize": quantize, "decoding": name == "jax"}
            model = load(checkpoint, name, dtype, device, **choice)
            engine = _engine(name, model, lookup)
            started = time.perf_counter()
            engine.warm_up([prompt_ids], **options)
            tokens: list[int] = []
            times = [time.perf_counter()]

            def steps(engine: Any = engine, tokens: list[int] = tokens, times: list[float] = times):
                for (token,) in engine.stream([prompt_ids], stop_tokens=tokenizer.eos_ids, **options):
                    times.append(time.perf_counter())
                    tokens.append(token)
                    yield token

            pieces = []
            for piece in tokenizer.stream(steps()):
                pieces.append(piece)
                if on_text and piece:
                    on_text(name, piece)
            decode = times[-1] - times[1]
            results.append(
                GenerateResult(
                    framework=name,
                    text="".join(pieces),
                    tokens=tokens,
                    prompt_tokens=len(prompt_ids),
                    compile_seconds=times[0] - started,
                    prefill_seconds=times[1] - times[0],
                    decode_tokens_per_second=(len(tokens) - 1) / decode if decode > 0 else 0.0,
                )
            )
            del model, engine
    return results
