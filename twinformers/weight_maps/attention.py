"""The tensors of the attention mechanisms, one row each: the twins' and the two frameworks' own modules'.

`torch.nn.MultiheadAttention` keeps the three input projections in one matrix and one vector, the queries'
rows first. `flax.nnx.MultiHeadAttention` gives the heads an axis of their own. Both know as many key-value
heads as query heads, and torch's only head_dim = hidden_size / num_heads.
"""

from __future__ import annotations

from twinformers.weight_maps.base import Bias, Linear, Row, There, WeightMap

PACKED = "([N H | K H | K H])"


def _projection(name: str, letter: str, part: int, flax: str) -> tuple[Row, Row]:
    """The matrix and the bias of one of the three projections that torch.nn packs into one."""
    weight: dict[str, There] = {
        "torch.nn": ("in_proj_weight", f"{PACKED} D", part),
        "flax.nnx": (f"{flax}.kernel", f"D {letter} H"),
    }
    bias: dict[str, There] = {
        "torch.nn": ("in_proj_bias", PACKED, part),
        "flax.nnx": (f"{flax}.bias", f"{letter} H"),
    }
    return Linear(name, f"({letter} H) D", **weight), Bias(name, f"({letter} H)", **bias)


OUT_WEIGHT: dict[str, There] = {"torch.nn": "out_proj.weight", "flax.nnx": ("out.kernel", "N H D")}
WEIGHTS, BIASES = zip(
    _projection("q_proj", "N", 0, "query"),
    _projection("k_proj", "K", 1, "key"),
    _projection("v_proj", "K", 2, "value"),
    (
        Linear("o_proj", "D (N H)", **OUT_WEIGHT),
        Bias("o_proj", "D", **{"torch.nn": "out_proj.bias", "flax.nnx": "out.bias"}),
    ),
    strict=True,
)


def weight_map(
    hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, *, use_bias: bool
) -> WeightMap:
    """The table for one attention module; one head is N = K = 1, multi-query K = 1."""
    return WeightMap(
        rows=WEIGHTS + BIASES if use_bias else WEIGHTS,
        sizes={"D": hidden_size, "N": num_heads, "K": num_kv_heads, "H": head_dim},
        counts={},
        modules={},
    )
