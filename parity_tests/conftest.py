"""Options that say where each framework runs, and what several test files need."""

from __future__ import annotations

import gc
import logging
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # each test compiles what it measures


def pytest_addoption(parser):
    parser.addoption("--jax-device", default="cpu", help="where the Flax twin runs: cpu, gpu or tpu")
    parser.addoption("--torch-device", default="cpu", help="where the PyTorch twin runs: cpu or cuda")


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled():
    """What one file compiled is of no use to the next, and adds up to gigabytes."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def jax_device(request):
    import jax

    return jax.devices(request.config.getoption("--jax-device"))[0]


@pytest.fixture(scope="session")
def torch_device(request):
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device(request.config.getoption("--torch-device"))


@pytest.fixture(autouse=True)
def _highest_precision():
    import jax

    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def own_logging():
    """`run` configures logging for a process of its own; other tests are not to see it."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before
