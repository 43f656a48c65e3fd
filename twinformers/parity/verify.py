"""`verify`: both twins and transformers on the same weights and tokens, compared number by number."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from twinformers.checkpoints import Checkpoint, opened
from twinformers.checkpoints.dtypes import check_dtype
from twinformers.errors import UsageError
from twinformers.loading import Source, find_device, load
from twinformers.parity.kinds import Inputs, kind, real
from twinformers.parity.limits import SMALL_GRADIENT, limit
from twinformers.parity.recording import Activations
from twinformers.parity.reference import (
    batch_first,
    has_reference,
    precise,
    record_reference,
    reference_model,
)
from twinformers.parity.results import CheckResult, VerifyReport, compare
from twinformers.parity.rounding import Rounding
from twinformers.parity.twins import Run, jax_precision, run_jax, run_torch
from twinformers.weight_maps import weight_map

#: What `verify` checks unless told otherwise, and what it checks besides when asked.
CHECKS = ("logits", "activations", "cache", "generation", "reference", "rounding")
FURTHER_CHECKS = ("gradients", "training", "training-run")
#: Of what only models that generate have; of others these are not made.
OF_GENERATION = ("cache", "generation")


def verify(
    source: Source,
    *,
    dtypes: Sequence[str] = ("float64", "float32"),
    checks: Sequence[str] = CHECKS,
    against: Source | None = None,
    jax_device: Any = None,
    torch_device: Any = None,
    attention: str = "einsum",
    steps: int = 20,
    on_progress: Callable[[str], None] = lambda text: None,
) -> VerifyReport:
    """Compare the twins with each other, with themselves in float64, and with transformers.

    `against` is where the weights come from, if `source` was made of it: transformers gets its weights and
    not those of the source, so that what was lost or laid out wrongly on the way is found. `attention` is how
    the twins compute it: "einsum" or "fused", as in `load`. `steps` is the number of updates of `training`
    (each from the same state) and `training-run`. Where a model generates nothing, cache and generation are
    not checked.

    Raises UsageError for an unknown check, dtype or device, where all checks are of generation and the model
    generates nothing, for an `against` that is another architecture or that no check looks at,
    MissingDependency where a framework or (for `reference`) transformers is not installed, and the errors of
    the source.
    """
    for name in checks:
        if name not in CHECKS + FURTHER_CHECKS:
            expected = ", ".join(CHECKS + FURTHER_CHECKS)
            raise UsageError("unknown check", where="check", expected=expected, found=repr(name))
    for dtype in dtypes:
        check_dtype(dtype)
    if steps < 1:
        raise UsageError("bad value", where="steps", expected="a positive integer", found=str(steps))
    devices = {"jax": find_device("jax", jax_device), "torch": find_device("torch", torch_device)}
    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context(opened(source))
        original = checkpoint if against is None else stack.enter_context(opened(against))
        if against is not None:
            _check_comparable(checkpoint, original, checks)
        calls = kind(checkpoint.config)
        inputs = calls.inputs(checkpoint.config)
        results: list[CheckResult] = []
        if not calls.generates:
            checks, left = [c for c in checks if c not in OF_GENERATION], set(checks) & set(OF_GENERATION)
            if left and not checks:
                raise UsageError(
                    "this model generates nothing",
                    where="check",
                    expected=", ".join(c for c in CHECKS + FURTHER_CHECKS if c not in OF_GENERATION),
                    found=", ".join(sorted(left)),
                )
        for dtype in sorted(dict.fromkeys(dtypes), key=lambda d: d != "float64"):
            if set(checks) & set(CHECKS):
                results += _forward(
                    checkpoint, original, dtype, inputs, checks, devices, attention, on_progress
                )
            if "gradients" in checks:
                on_progress(f"{dtype}: gradients")
                results += _gradients(checkpoint, original, dtype, inputs, devices, checks, attention)
            for check in ("training", "training-run"):
                if check in checks:
                    results += _training(check, checkpoint, dtype, devices, steps, attention, on_progress)
        return VerifyReport(
            all(r.ok for r in results), checkpoint.source, checkpoint.config.architecture, results
        )


def _check_comparable(checkpoint: Checkpoint, original: Checkpoint, checks: Sequence[str]) -> None:
    """Raise UsageError where the original could not be seen, or is no original of the source."""
    if original.config.hf_class is None or "reference" not in checks:
        raise UsageError(
            "the original is compared by the check `reference`, which is not made here",
            where="against",
            expected="that check, and an architecture that transformers has",
            found=", ".join(checks),
        )
    if checkpoint.config != original.config:
        ours, theirs = (asdict(c.config) for c in (checkpoint, original))
        field = next((f for f in ours if f not in theirs or ours[f] != theirs[f]), "architecture")
        raise UsageError(
            "the two are not the same model",
            where=f"against: {field}",
            expected=f"{ours.get(field, checkpoint.config.architecture)!r:.100}, as {checkpoint.source} has",
            found=f"{theirs.get(field, original.config.architecture)!r:.100}",
        )


def _forward(
    checkpoint: Checkpoint,
    original: Checkpoint,
    dtype: str,
    inputs: Inputs,
    checks: Sequence[str],
    devices: Mapping[str, Any],
    attention: str,
    on_progress: Callable[[str], None],
) -> list[CheckResult]:
    """Everything that follows from what the models compute: no gradient is taken."""
    on_progress(f"{dtype}: Flax")
    jx = run_jax(checkpoint, dtype, devices["jax"], inputs, checks, attention)
    on_progress(f"{dtype}: PyTorch")
    pt = run_torch(checkpoint, dtype, devices["torch"], inputs, checks, attention)
    results: list[CheckResult] = []
    twins = {"jax": jx, "torch": pt}
    lazy = Rounding(checkpoint, dtype, inputs)

    def add(check: str, left: str, right: str, path: str, a: np.ndarray, b: np.ndarray) -> None:
        keep = real(a, inputs)
        results.append(compare(check, dtype, left, right, path, a[keep], b[keep]))

    if "logits" in checks:
        add("logits", "jax", "torch", "", jx.logits, pt.logits)
    if "activations" in checks:
        results += _structure(dtype, jx, pt)
        for path, x in jx.activations.items():
            if path in pt.activations:
                add("activations", "jax", "torch", path, x, pt.activations[path])
    if "cache" in checks:
        for name, run in twins.items():
            if run.cached is not None:
                add("cache", name, name, "", run.cached, run.logits)
    beside = (
        original is checkpoint
        and "rounding" in checks
        and dtype != "float64"
        and has_reference(checkpoint.config)
    )
    asked = "reference" in checks
    if asked and checkpoint.config.hf_class is None:
        # Said, not passed over: nothing independent was asked about this model.
        note = f"not compared: {weight_map(checkpoint.config).absent}"
        results.append(
            CheckResult("reference", dtype, "jax", "transformers", "", None, None, None, True, note)
        )
        asked = False
    if asked or beside:
        on_progress(f"{dtype}: transformers")
        hf_logits, hf_activations = record_reference(original, inputs, dtype)
    if asked:
        for name, run in twins.items():
            add("reference", name, "transformers", "", run.logits, hf_logits)
            for path, x in hf_activations.items():
                if path in run.activations:
                    add("reference", name, "transformers", path, run.activations[path], x)
    if "rounding" in checks and dtype != "float64":
        on_progress(f"{dtype}: what rounding explains")
        for name, run in twins.items():
            results += _rounding(dtype, name, run.logits, lazy, judged=True)
        if beside:
            results += _rounding(dtype, "transformers", hf_logits, lazy, judged=False)
        if dtype == "float32":
            for name, logits in _emulated(checkpoint, inputs).items():
                results += _rounding(dtype, name, logits, lazy, judged=False)
    if "generation" in checks:
        results.append(_generation(checkpoint, dtype, inputs, jx, pt, lazy))
    return results


def _training(
    check: str,
    checkpoint: Checkpoint,
    dtype: str,
    devices: dict[str, Any],
    steps: int,
    attention: str,
    on_progress: Callable[[str], None],
) -> list[CheckResult]:
    """One result for each update: its worst parameter, over weights and moments, and the loss."""
    from twinformers.parity.training import train_twins
    from twinformers.training.adamw import AdamW

    recipe, results = AdamW(steps=steps), []
    with jax_precision(dtype):
        for number, losses, states in train_twins(
            checkpoint,
            dtype,
            devices,
            recipe,
            free=check == "training-run",
            attention=attention,
            on_progress=lambda text: on_progress(f"{dtype}: {check}, {text}"),
        ):
            left, right = np.asarray(losses["jax"]), np.asarray(losses["torch"])
            found = [compare(check, dtype, "jax", "torch", "loss", left, right)]
            for what, small in (("weights", 0.0), ("first", SMALL_GRADIENT), ("second", SMALL_GRADIENT**2)):
                ours, theirs = states["jax"][what], states["torch"][what]
                floor = small * max(float(np.abs(x).max()) for x in theirs.values())
                found += [
                    compare(check, dtype, "jax", "torch", f"{what} of {name}", ours[name], x, floor)
                    for name, x in theirs.items()
                ]
            worst = max(found, key=lambda r: (not r.ok, np.inf if r.max_rel is None else r.max_rel))
            note = f"loss {losses['jax']:.6f}, learning rate {recipe.rate(number):.3g}, {recipe}"
            results.append(replace(worst, path=f"update {number}: {worst.path}", note=worst.note or note))
    return results


def _gradients(
    checkpoint: Checkpoint,
    original: Checkpoint,
    dtype: str,
    inputs: Inputs,
    devices: Mapping[str, Any],
    checks: Sequence[str],
    attention: str,
) -> list[CheckResult]:
    """Of every parameter and every submodule's output: the twins, and Flax against transformers."""
    import torch

    from twinformers.parity.gradients import gradients_jax, gradients_torch, in_torch_names

    calls = kind(checkpoint.config)
    place = devices["torch"]
    with jax_precision(dtype):
        model = load(checkpoint, "jax", dtype, devices["jax"], attention=attention)
        jx = gradients_jax(model, checkpoint, inputs)
    arguments = [torch.from_numpy(x).to(place) for x in inputs]
    model = load(checkpoint, "torch", dtype, place, attention=attention)
    pt = gradients_torch(model, checkpoint, inputs, lambda m: m(*arguments)[0])
    results = _compare_gradients(dtype, "torch", jx.parameters, pt.parameters)
    results += _compare_gradients(dtype, "torch", _real(jx.outputs, inputs), _real(pt.outputs, inputs))
    if "reference" in checks and checkpoint.config.hf_class is not None:
        with precise(dtype):
            hf = gradients_torch(
                reference_model(original, dtype),
                checkpoint,
                inputs,
                lambda m: calls.reference(m, inputs, getattr(torch, dtype)),
                weight_map(checkpoint.config).module_paths(),
            )
        theirs = in_torch_names(hf.parameters, checkpoint, "hf")
        results += _compare_gradients(dtype, "transformers", jx.parameters, theirs)
        outputs = {path: batch_first(x, inputs) for path, x in hf.outputs.items()}
        both = {path: x for path, x in _real(outputs, inputs).items() if path in jx.outputs}
        ours = {path: x for path, x in _real(jx.outputs, inputs).items() if path in both}
        results += _compare_gradients(dtype, "transformers", ours, both)
    return results


def _real(outputs: Activations, inputs: Inputs) -> Activations:
    return {path: x[real(x, inputs)] for path, x in outputs.items()}


def _compare_gradients(dtype: str, right: str, ours: Activations, theirs: Activations) -> list[CheckResult]:
    """Relative to at least a small part of the largest gradient: some are zero but for rounding.

    What trains in one of the two alone is a failure; a gradient of zero where the other has none is not.
    """
    floor = SMALL_GRADIENT * max((float(np.abs(x).max()) for x in theirs.values()), default=0.0)
    results = []
    for path in dict.fromkeys([*ours, *theirs]):
        left = ours.get(path)
        other = theirs.get(path)
        if left is None or other is None:
            present = left if other is None else other
            if present is not None and present.any():
                side = "jax" if other is None else right
                most = limit("gradients", dtype)
                note = f"only {side} has a gradient"
                results.append(
                    CheckResult("gradients", dtype, "jax", right, path, None, None, most, False, note)
                )
            continue
        results.append(compare("gradients", dtype, "jax", right, path, left, other, floor))
    return results


def _structure(dtype: str, jx: Run, pt: Run) -> list[CheckResult]:
    """A failure for each submodule that one twin lacks, and for each activation of another dtype."""
    found = []
    for path in sorted(jx.activations.keys() ^ pt.activations.keys()):
        found.append((path, f"only the {'Flax' if path in jx.activations else 'PyTorch'} twin has it"))
    for name, run in (("Flax", jx), ("PyTorch", pt)):
        found += [(p, f"{d} in {name}'s {dtype} model") for p, d in run.dtypes.items() if d != dtype]
    most = limit("activations", dtype)
    return [
        CheckResult("activations", dtype, "jax", "torch", path, None, None, most, False, note)
        for path, note in found
    ]


def _rounding(
    dtype: str, name: str, logits: np.ndarray, lazy: Rounding, *, judged: bool
) -> list[CheckResult]:
    """The error against float64, held against what the rounding model explains."""
    explained, largest = lazy.limit, float(np.abs(lazy.truth).max())
    finite = bool(np.isfinite(logits[lazy.real]).all())
    results = []
    for path, error, most in zip(
        ("rms", "max"), lazy.errors(logits), (explained.rms, explained.max), strict=True
    ):
        results.append(
            CheckResult(
                "rounding",
                dtype,
                name,
                "float64",
                path,
                error if finite else None,
                error / largest if finite else None,
                most / largest if judged else None,
                finite and (not judged or error <= most),
                "" if not finite else f"{error / most:.2f} of what rounding explains",
            )
        )
    return results


def _emulated(checkpoint: Checkpoint, inputs: Inputs) -> dict[str, np.ndarray]:
    """The float32 logits that a device's default products would give."""
    import torch

    from twinformers.parity.emulation import DEFAULTS, products_in

    model = load(checkpoint, "torch", "float32")
    found = {}
    for name, rounded in DEFAULTS.items():
        with torch.inference_mode(), products_in(rounded):
            found[name] = model(*(torch.from_numpy(x) for x in inputs))[0].numpy()
    return found


def _generation(
    checkpoint: Checkpoint, dtype: str, inputs: Inputs, jx: Run, pt: Run, lazy: Rounding
) -> CheckResult:
    """The same tokens, or a difference where float64 puts the two closer than rounding can tell apart."""
    ours, theirs = jx.generated or [], pt.generated or []
    if ours == theirs:
        return CheckResult("generation", dtype, "jax", "torch", "", None, None, None, True)
    at = next(
        (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    note, excused = f"the tokens differ from number {at} on", False
    if dtype != "float64" and at < min(len(ours), len(theirs)):
        continued = kind(checkpoint.config).continued(checkpoint.config, inputs, ours[:at])
        logits = lazy.true_logits(continued)[0, -1]
        gap = abs(float(logits[ours[at][0]] - logits[theirs[at][0]]))
        excused = gap <= 2 * lazy.limit.max
        note += f", where float64 puts the two {gap:.1e} apart; rounding explains {2 * lazy.limit.max:.1e}"
    return CheckResult("generation", dtype, "jax", "torch", "", None, None, None, excused, note)
