"""What libtpu, the TPU compiler, has to be told on a machine without TPUs, before JAX looks for devices."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

#: No machine has to be asked what it is, and several programs may compile at a time.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5e-1",  # of the machine that it is not; a topology is named all the same
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
#: Where Linux shows the chips of a TPU, by generation.
DEVICES = ("accel[0-9]*", "vfio/[0-9]*")


def spare_the_search(devices: Path = Path("/dev")) -> None:
    """Where libtpu is installed and no chip is, keep JAX from looking for one in vain, and aloud."""
    chips = (chip for pattern in DEVICES for chip in devices.glob(pattern))
    if importlib.util.find_spec("libtpu") and not any(chips):
        pretend()


def pretend() -> None:
    """Set what is not set already."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
