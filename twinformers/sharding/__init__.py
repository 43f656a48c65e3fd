"""Which axis of a mesh cuts which axis of a weight: rules by name, outside the models.

The axes of a mesh: "data" holds a copy of the model in each of its parts and shares out the batch; "fsdp"
shares out the batch too, and keeps a part of each weight where all of it is not needed (Rajbhandari et al.
2020, arXiv:1910.02054); "tensor" computes with a part of each weight (Shoeybi et al. 2019, arXiv:1909.08053):
the columns of the matrices that lead into attention and MLP, the rows of those that lead out of them. A mesh
of JAX's may have a fourth, "sequence": it shares out the tokens of each row, where rows are fewer than
devices.
"""

from __future__ import annotations

import re

from twinformers.errors import UsageError

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
SEQUENCE = "sequence"
#: What shares out a batch.
BATCH = (DATA, FSDP)
#: By the end of a Flax name; a kernel is [in, out]. Vectors lie whole on each device: they are small.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(source_|position_|segment_)?embed\.embedding", (TENSOR, FSDP)),
    (r"(q|k|v|gate|up)_proj\.kernel|fc1\.kernel|lm_head\.kernel", (FSDP, TENSOR)),
    (r"(o|down)_proj\.kernel|fc2\.kernel", (TENSOR, FSDP)),
    (r"(pooler|next_sentence|transform)\.kernel", (FSDP, None)),  # small, and read whole by what follows
    (r"\w+\.(scale|bias)", (None,)),
)


def axes(name: str, shape: tuple[int, ...], sizes: dict[str, int]) -> tuple[str | None, ...]:
    """The mesh's axis for each axis of a weight, by its Flax name; None where it is not cut.

    `sizes` are those of the mesh. An axis that does not divide stays whole. Raises UsageError for a name that
    no rule covers, and for one whose rule is for another number of axes.
    """
    rule = next((r for pattern, r in RULES if re.fullmatch(rf"(.*\.)?({pattern})", name)), None)
    if rule is None:
        raise UsageError(
            "no rule says how to share out this parameter",
            where=name,
            expected="a name that a rule of twinformers.sharding ends with",
            hint="add a rule: which mesh axis cuts which of its axes",
        )
    if len(rule) != len(shape):
        raise UsageError(
            "the rule is for another number of axes", where=name, expected=str(len(rule)), found=str(shape)
        )
    return tuple(a if a and n % sizes[a] == 0 else None for a, n in zip(rule, shape, strict=True))
