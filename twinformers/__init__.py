"""Every transformer architecture written twice, in Flax NNX and in PyTorch, and proven equal.

The public names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from twinformers.tpu.environment import spare_the_search

if TYPE_CHECKING:
    from twinformers.benchmarks.results import BenchResult as BenchResult
    from twinformers.benchmarks.running import bench as bench
    from twinformers.checkpoints import PortResult as PortResult
    from twinformers.checkpoints import open_checkpoint as open_checkpoint
    from twinformers.checkpoints import port as port
    from twinformers.configs import Beams as Beams
    from twinformers.configs import Sampling as Sampling
    from twinformers.embedding import Embeddings as Embeddings
    from twinformers.embedding import embed as embed
    from twinformers.generation import GenerateResult as GenerateResult
    from twinformers.generation import generate as generate
    from twinformers.loading import load as load
    from twinformers.loading import load_config as load_config
    from twinformers.loading import load_tokenizer as load_tokenizer
    from twinformers.parity.compare import CompareResult as CompareResult
    from twinformers.parity.compare import compare as compare
    from twinformers.parity.comparing.page import write_comparison as write_comparison
    from twinformers.parity.diverge import DivergeReport as DivergeReport
    from twinformers.parity.diverge import diverge as diverge
    from twinformers.parity.report import write_report as write_report
    from twinformers.parity.verify import VerifyReport as VerifyReport
    from twinformers.parity.verify import verify as verify
    from twinformers.translation import TranslateResult as TranslateResult
    from twinformers.translation import translate as translate

__version__ = "0.1.0"

spare_the_search()  # here, since JAX looks for devices whoever imports it

_HOMES = {
    "Beams": "configs",
    "BenchResult": "benchmarks.results",
    "DivergeReport": "parity.diverge",
    "Embeddings": "embedding",
    "GenerateResult": "generation",
    "PortResult": "checkpoints",
    "Sampling": "configs",
    "diverge": "parity.diverge",
    "bench": "benchmarks.running",
    "CompareResult": "parity.compare",
    "compare": "parity.compare",
    "embed": "embedding",
    "generate": "generation",
    "load": "loading",
    "load_config": "loading",
    "load_tokenizer": "loading",
    "open_checkpoint": "checkpoints",
    "port": "checkpoints",
    "TranslateResult": "translation",
    "VerifyReport": "parity.verify",
    "translate": "translation",
    "verify": "parity.verify",
    "write_comparison": "parity.comparing.page",
    "write_report": "parity.report",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
