"""Texts as vectors from a source: tokenizer, encoder and pooling put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from twinformers.checkpoints import opened
from twinformers.errors import UsageError
from twinformers.loading import FRAMEWORKS, Source, load, load_tokenizer

if TYPE_CHECKING:
    import numpy as np

#: How the hidden states of a text become one vector, by the methods of the models.
POOLING = ("mean", "first")


@dataclass(frozen=True)
class Embeddings:
    """What one framework makes of some texts. Vectors have length 1, so their products are cosines."""

    framework: str
    vectors: np.ndarray  # [texts, D], at least float32

    @property
    def similarities(self) -> np.ndarray:
        """The cosine of every text with every other one. [texts, texts]"""
        return self.vectors @ self.vectors.T

    def to_dict(self) -> dict[str, Any]:
        return {
            "framework": self.framework,
            "similarities": self.similarities.tolist(),
            "vectors": self.vectors.tolist(),
        }


def embed(
    source: Source,
    text: str | Sequence[str],
    *,
    framework: str = "jax",
    pooling: str = "mean",
    dtype: str = "float32",
    device: Any = None,
    attention: str = "einsum",
) -> list[Embeddings]:
    """Make vectors of a text, or of several at once, with "jax", "torch" or "both"; one result each.

    `pooling` "mean" averages the hidden states of all tokens (Reimers & Gurevych 2019, arXiv:1908.10084),
    "first" takes that of the first token. The rest as in `load`. Raises UsageError for bad options, for a
    source that is no encoder and for a text that is longer than it takes, SourceError where it has no
    tokenizer.json, and the errors of loading.
    """
    frameworks: Sequence[str] = FRAMEWORKS if framework == "both" else (framework,)
    if not set(frameworks) <= set(FRAMEWORKS):
        raise UsageError(
            "unknown framework", where="framework", expected="jax, torch or both", found=repr(framework)
        )
    if pooling not in POOLING:
        raise UsageError(
            "unknown pooling", where="pooling", expected=" or ".join(POOLING), found=repr(pooling)
        )
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise UsageError("there is nothing to embed", where="text", expected="at least one text")
    with opened(source) as checkpoint:
        config: Any = checkpoint.config
        if config.kind != "encoder":
            raise UsageError(
                "this model makes no vectors of texts",
                where=checkpoint.source,
                expected="an encoder, such as BERT",
                found=config.architecture,
            )
        tokenizer = load_tokenizer(checkpoint)
        rows = [tokenizer.encode(t) for t in texts]
        for number, row in enumerate(rows):
            if not 0 < len(row) <= config.max_position_embeddings:
                raise UsageError(
                    "the model cannot read this text",
                    where=f"text {number + 1}",
                    expected=f"1 to {config.max_position_embeddings} tokens",
                    found=str(len(row)),
                    hint="split it into paragraphs" if row else "",
                )
        tokens, positions = padded(rows)
        results = []
        for name in frameworks:
            model = load(checkpoint, name, dtype, device, attention=attention)
            results.append(Embeddings(name, vectors(name, model, tokens, positions, pooling)))
            del model
    return results


def padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids as one array, filled up with 0 on the right, and their positions. 2 x [B, T] int32"""
    import numpy as np

    length = max(map(len, rows))
    tokens, positions = np.zeros((len(rows), length), np.int32), np.full((len(rows), length), -1, np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)], positions[number, : len(row)] = row, np.arange(len(row))
    return tokens, positions


def vectors(
    framework: str, model: Any, tokens: np.ndarray, positions: np.ndarray, pooling: str
) -> np.ndarray:
    """What a twin makes of rows of tokens, each of length 1. [B, T] -> [B, D]"""
    import numpy as np

    if framework == "jax":
        import jax

        from jax_models import functional

        apply, params = functional(model, pooling)
        return np.asarray(jax.jit(apply)(params, tokens, positions))
    import torch

    device = next(model.parameters()).device
    with torch.inference_mode():
        given = (torch.from_numpy(x).to(device) for x in (tokens, positions))
        return getattr(model, pooling)(*given).cpu().numpy()
