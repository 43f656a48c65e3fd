"""Every limit, in one place: the largest difference, relative to the tensor's largest value, in float64.

Outputs of submodules, logits and cached decoding: 1e-12, where twins measure 1e-15 to 1e-13. Gradients and
one optimizer step from the same state: 1e-10, since their products are longer; a gradient is held against at
least 1e-3 of the model's largest, because some (of key biases) are zero but for rounding. A free-running
training run: 1e-8, because Adam divides small numbers by small numbers (2e-9 was seen between twins whose
gradients differ by 1e-13).

Below float64 the logits are judged by a model of rounding for each dtype, model and input
(`parity.rounding`). Single activations are only reported there: two correct implementations may differ in
one by an order of magnitude.
"""

EXACT: dict[str, float] = {"gradients": 1e-10, "training": 1e-10, "training-run": 1e-8}
OUTPUTS = 1e-12
#: Gradients are compared relative to at least this part of the model's largest.
SMALL_GRADIENT = 1e-3


def limit(check: str, dtype: str) -> float | None:
    """The limit of a check's `max_rel`, or None where the figure is only reported."""
    return EXACT.get(check, OUTPUTS) if dtype == "float64" else None
