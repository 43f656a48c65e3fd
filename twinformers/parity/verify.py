"""`verify`: both twins and transformers on the same weights and tokens, compared number by number."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from twinformers.checkpoints import Checkpoint, opened
from twinformers.checkpoints.dtypes import check_dtype
from twinformers.errors import UsageError
from twinformers.loading import Source, load
from twinformers.parity.limits import LIMITS
from twinformers.parity.recording import Activations, record_jax, record_torch

CHECKS = ("logits", "activations", "cache", "generation", "reference")


@dataclass(frozen=True)
class CheckResult:
    """One comparison. `limit` None means that the figure is reported and not judged."""

    check: str
    dtype: str
    left: str
    right: str
    path: str
    max_abs: float | None
    max_rel: float | None
    limit: float | None
    ok: bool


@dataclass(frozen=True)
class VerifyReport:
    """All comparisons of one source; `ok` if none failed."""

    ok: bool
    source: str
    architecture: str
    checks: list[CheckResult]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(
    source: Source,
    *,
    dtypes: Sequence[str] = ("float64", "float32"),
    checks: Sequence[str] = CHECKS,
    jax_device: Any = None,
    torch_device: Any = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> VerifyReport:
    """Compare the twins with each other, with themselves in float64, and with transformers.

    Raises UsageError for an unknown check or dtype, MissingDependency where a framework or (for
    `reference`) transformers is not installed, and the errors of the source.
    """
    for name in checks:
        if name not in CHECKS:
            raise UsageError("unknown check", where="check", expected=", ".join(CHECKS), found=repr(name))
    for dtype in dtypes:
        check_dtype(dtype)
    results: list[CheckResult] = []
    with opened(source) as checkpoint:
        tokens, positions = _inputs(checkpoint)
        truth: np.ndarray | None = None
        for dtype in sorted(dtypes, key=lambda d: d != "float64"):
            on_progress(f"{dtype}: Flax")
            jx, jx_chunks, jx_tokens = _run_jax(checkpoint, dtype, jax_device, tokens, positions, checks)
            on_progress(f"{dtype}: PyTorch")
            pt, pt_chunks, pt_tokens = _run_torch(checkpoint, dtype, torch_device, tokens, positions, checks)
            real = positions >= 0

            def compare(check, left, right, path, a, b, dtype=dtype, real=real):
                results.append(_compare(check, dtype, left, right, path, a[real], b[real]))

            if "logits" in checks:
                compare("logits", "jax", "torch", "", jx[0], pt[0])
                if dtype != "float64" and truth is not None:
                    compare("logits", "jax", "float64", "", jx[0], truth)
                    compare("logits", "torch", "float64", "", pt[0], truth)
            if "activations" in checks:
                _same_paths(jx[1], pt[1])
                for path in jx[1]:
                    compare("activations", "jax", "torch", path, jx[1][path], pt[1][path])
            if "cache" in checks:
                compare("cache", "jax", "jax", "", jx_chunks, jx[0])
                compare("cache", "torch", "torch", "", pt_chunks, pt[0])
            if "generation" in checks:
                same = jx_tokens == pt_tokens
                # Below float64 a near tie may fall either way; only there is a difference a mistake.
                results.append(
                    CheckResult(
                        "generation",
                        dtype,
                        "jax",
                        "torch",
                        "",
                        None,
                        None,
                        None,
                        same or dtype in ("bfloat16", "float16"),
                    )
                )
            if "reference" in checks:
                from twinformers.parity.reference import record_reference

                on_progress(f"{dtype}: transformers")
                hf = record_reference(checkpoint, tokens, positions, dtype)
                for name, (logits, activations) in (("jax", jx), ("torch", pt)):
                    compare("reference", name, "transformers", "", logits, hf[0])
                    for path in hf[1]:
                        if path in activations:
                            compare("reference", name, "transformers", path, activations[path], hf[1][path])
                if dtype != "float64" and truth is not None:
                    compare("reference", "transformers", "float64", "", hf[0], truth)
            if dtype == "float64":
                truth = pt[0]
        return VerifyReport(
            all(r.ok for r in results), checkpoint.source, checkpoint.config.architecture, results
        )


def _inputs(checkpoint: Checkpoint, length: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Two rows of random tokens; the second is left-padded and begins at position 200."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, checkpoint.config.vocab_size, (2, length)).astype(np.int32)  # type: ignore[attr-defined]
    positions = np.tile(np.arange(length, dtype=np.int32), (2, 1))
    positions[1] = np.r_[-np.ones(24), 200 + np.arange(length - 24)]
    return tokens, positions


def _chunks(length: int) -> list[slice]:
    """A prefill in uneven pieces, then single tokens."""
    edges = [0, 1, 50, 55, length - 6, *range(length - 5, length + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def _run_jax(checkpoint, dtype, device, tokens, positions, checks):
    import jax

    from jax_models import functional
    from jax_models.generate import Generator

    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        place = None if device is None else jax.devices(device)[0]
        model = load(checkpoint, "jax", dtype, place)
        recorded = record_jax(model, tokens, positions)
        for path, x in {"": recorded[0], **recorded[1]}.items():
            if x.dtype.name != dtype:
                raise AssertionError(f"{path or 'logits'} is {x.dtype} in a {dtype} model")
        wide = np.float64 if dtype == "float64" else np.float32
        recorded = recorded[0].astype(wide), {p: x.astype(wide) for p, x in recorded[1].items()}
        chunked, generated = None, None
        if "cache" in checks:
            apply, params = functional(model)
            step, cache, parts = jax.jit(apply), model.empty_cache(2, 512), []
            for part in _chunks(tokens.shape[1]):
                logits, cache = step(params, tokens[:, part], positions[:, part], cache)
                parts.append(np.asarray(logits).astype(wide))
            chunked = np.concatenate(parts, 1)
        if "generation" in checks:
            prompt = tokens[:1, :24].tolist()
            generated = list(Generator(model).stream(prompt, max_new_tokens=16))
    return recorded, chunked, generated


def _run_torch(checkpoint, dtype, device, tokens, positions, checks):
    import torch

    from torch_models.generate import Generator

    model = load(checkpoint, "torch", dtype, device)

    def put(x):
        return torch.from_numpy(x.copy()).to(device)

    recorded = record_torch(model, lambda m: m(put(tokens), put(positions))[0])
    chunked, generated = None, None
    if "cache" in checks:
        cache, parts = model.empty_cache(2, 512), []
        with torch.inference_mode():
            for part in _chunks(tokens.shape[1]):
                logits, cache = model(put(tokens[:, part]), put(positions[:, part]), cache)
                parts.append((logits if dtype == "float64" else logits.float()).cpu().numpy())
        chunked = np.concatenate(parts, 1)
    if "generation" in checks:
        generated = list(Generator(model).stream(tokens[:1, :24].tolist(), max_new_tokens=16))
    return recorded, chunked, generated


def _same_paths(left: Activations, right: Activations) -> None:
    if left.keys() != right.keys():
        raise AssertionError(f"the twins have different submodules: {sorted(left.keys() ^ right.keys())[:5]}")


def _compare(check, dtype, left, right, path, a, b) -> CheckResult:
    limit = LIMITS[dtype]
    largest, finite = float(np.abs(b).max()), bool(np.isfinite(a).all() and np.isfinite(b).all())
    if not finite:  # NaN compares as neither larger nor smaller, so it must fail by name
        return CheckResult(check, dtype, left, right, path, None, None, limit, False)
    worst = float(np.abs(a - b).max())
    relative = worst / largest if largest else worst
    return CheckResult(
        check, dtype, left, right, path, worst, relative, limit, limit is None or relative <= limit
    )
