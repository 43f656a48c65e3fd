"""Every limit, in one place.

Equality of the mathematics is decided in float64, relative to the tensor's largest value. The lower dtypes
are measured against float64 and reported; the rounding model that will judge them is not here yet.
"""

LIMITS: dict[str, float | None] = {"float64": 1e-12, "float32": None, "bfloat16": None, "float16": None}
