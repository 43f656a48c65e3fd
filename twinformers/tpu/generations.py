"""What is published of each TPU generation, per chip; and slices of them, as the compiler knows them.

Peak bfloat16 FLOP/s, memory, its bandwidth and that of the links between chips: the generations' pages of
the Cloud TPU documentation. The clock: that peak over what all matrix units of a chip do in a cycle (their
number, times twice their area).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from twinformers.errors import MissingDependency, UsageError
from twinformers.tpu.environment import pretend

GIB = 2**30


@dataclass(frozen=True)
class Generation:
    """One kind of chip."""

    name: str
    flops: float  # bfloat16, per second
    bandwidth: float  # of its memory, bytes per second
    memory: int  # bytes
    clock: float  # of its matrix units, per second
    links: float  # between chips, bytes per second of one chip, both ways together


GENERATIONS = {
    g.name: g
    for g in (
        Generation("v4", 275e12, 1.2e12, 32 * GIB, 1.05e9, 3e11),
        Generation("v5e", 197e12, 819e9, 16 * GIB, 1.5e9, 2e11),
        Generation("v5p", 459e12, 2.765e12, 95 * GIB, 1.75e9, 6e11),
        Generation("v6e", 918e12, 1.64e12, 32 * GIB, 1.75e9, 4.48e11),
        Generation("tpu7x", 2307e12, 7.38e12, 192 * GIB, 2.2e9, 1.2e12),
    )
}


@dataclass(frozen=True)
class Slice:
    """A named topology: what the compiler needs of it. `devices` is what JAX sees: some chips are two."""

    name: str
    generation: Generation
    description: Any  # jax.experimental.topologies.TopologyDescription
    devices: int
    chips: int

    @property
    def flops(self) -> float:
        """Peak bfloat16 FLOP/s of a device."""
        return self.generation.flops * self.chips / self.devices

    @property
    def bandwidth(self) -> float:
        """Bytes per second of a device's memory."""
        return self.generation.bandwidth * self.chips / self.devices

    @property
    def links(self) -> float:
        """Bytes per second between a device and the others."""
        return self.generation.links * self.chips / self.devices

    @property
    def memory(self) -> int:
        """Bytes of a device's memory."""
        return self.generation.memory * self.chips // self.devices


def find_slice(name: str) -> Slice:
    """A slice by the name of its topology, such as v5e:16x16 or v5p:4x4x4 (chips along each axis).

    Raises MissingDependency without libtpu, and UsageError for a topology that the compiler does not know.
    """
    kind = name.partition(":")[0]
    if kind not in GENERATIONS:
        raise UsageError(
            "unknown topology",
            where="topology",
            expected=f"GENERATION:SHAPE, as v5e:4x4 or v5p:2x2x2; generations are {', '.join(GENERATIONS)}",
            found=repr(name),
        )
    pretend()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # of the compiler itself
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise MissingDependency(
            "libtpu, the TPU compiler, is not installed", hint="pip install 'twinformers[tpu]'"
        ) from None
    import jax
    from jax.experimental import topologies

    try:
        options = (
            {"chip_config_name": "megacore"} if kind == "v4" else {}
        )  # both cores of a chip as one device
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(
            "the compiler does not know this topology",
            where="topology",
            expected="chips along each axis: two for v5e and v6e (1x1 to 16x16), three for v4, v5p and tpu7x"
            " (from 2x2x1)",
            found=f"{name}: {str(error).splitlines()[0]}",
        ) from None
    devices: Any = described.devices
    chips = len({tuple(d.coords) for d in devices})
    return Slice(name, GENERATIONS[kind], described, len(devices), chips)
