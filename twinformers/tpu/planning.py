"""Whether a model fits a slice, and what a step takes there, as the TPU compiler says without a TPU."""

from __future__ import annotations

import math
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from twinformers.configs import Config
from twinformers.errors import UsageError
from twinformers.sharding import AXES, SEQUENCE
from twinformers.tpu.generations import Slice, find_slice
from twinformers.weight_maps import weight_map

#: Measured by MaxText in bfloat16 at a sequence of 4096, tokens per second and chip: its own tables.
PUBLISHED = {
    ("llama2-70b", "v5p"): ("v5p-512", 692.0, 0.654),
    ("llama2-70b", "v5e"): ("v5e-256", None, 0.57),
    ("llama2-70b", "v6e"): ("v6e-256", 900.0, 0.438),
}
#: What the figures are.
MEANING = (
    "The compiler's own estimates for the program that a slice would run: memory is exact, time is a model of"
    " the machine (cycles of each operation as the compiler schedules it, one after another, loops counted as"
    " often as they run). The compiler has none for collectives: their bytes over the links' bandwidth are"
    " given beside it, and a step is estimated as the longer of the two. Input, checkpoints and failures are"
    " not in it."
)


@dataclass(frozen=True)
class Plan:
    """What the compiler says of one piece of work on one mesh. Bytes and FLOPs are of one device."""

    model: str
    topology: str
    mode: str
    batch: int
    sequence: int
    mesh: dict[str, int]
    remat: str
    attention: str
    devices: int
    chips: int
    fits: bool
    memory_limit: int
    memory: dict[str, int]
    seconds_compiling: float
    reason: str = ""
    flops: float | None = None  # by the compiler, all layers
    flops_needed: float = 0.0  # by the mathematics, recomputation included
    flops_ratio: float | None = None
    attention_counted: bool | None = None
    compute_seconds: float | None = None  # by the compiler's cycles
    collective_seconds: float | None = None  # by bytes and bandwidth
    step_seconds: float | None = None  # the longer of the two
    tokens_per_second: float | None = None
    tokens_per_second_per_chip: float | None = None
    mfu: float | None = None
    roofline_seconds: float = 0.0
    collectives: dict[str, dict[str, int]] = field(default_factory=dict)
    published: dict[str, Any] | None = None
    meaning: str = MEANING

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    config: Config,
    topology: str,
    *,
    mode: str,
    batch: int,
    sequence: int,
    mesh: dict[str, int] | None = None,
    remat: str = "full",
    attention: str = "splash",
    accumulate: int = 1,
    chunk: int | None = None,
    model: str = "",
    quick: bool = False,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Compile a step of `mode` ("train", "prefill" or "decode") for a slice, and read what came of it.

    `mesh` are the sizes of data, fsdp and tensor (default: `default_mesh`). `quick` leaves out the two
    shallow programs that tell the FLOPs of all layers. What does not fit is an answer (`fits` is false), not
    an error.
    Raises UsageError for a topology, mesh, batch or model that cannot be asked about, and MissingDependency
    without libtpu.
    """
    found = find_slice(topology)
    from twinformers.tpu.programs import Work, lower

    work = Work(
        config=config,
        mode=mode,
        batch=batch,
        sequence=sequence,
        remat=remat,
        attention=attention,
        accumulate=accumulate,
        chunk=chunk,
    )
    sizes = {**dict.fromkeys(AXES, 1), **mesh} if mesh else default_mesh(config, mode, batch, found.devices)
    devices = device_mesh(found, sizes)
    rows = sizes["data"] * sizes["fsdp"] * accumulate
    if mode == "train" and batch % rows:
        raise UsageError(
            "the batch cannot be shared out",
            where="batch",
            expected=f"a multiple of data x fsdp x accumulate = {rows} rows",
            found=str(batch),
        )
    needed, ideal = _needed(work)
    known: dict[str, Any] = {
        "model": model or config.architecture,
        "topology": topology,
        "mode": mode,
        "batch": batch,
        "sequence": sequence,
        "mesh": sizes,
        "remat": remat if mode == "train" else "none",
        "attention": attention,
        "devices": found.devices,
        "chips": found.chips,
        "memory_limit": found.memory,
        "flops_needed": needed / found.devices,
        "roofline_seconds": _roofline(work, found, ideal),
    }
    started = time.monotonic()
    on_progress(f"compiling for {topology}")
    lowered = lower(work, devices)
    try:
        compiled, text = compile_program(lowered.program)
    except Exception as error:
        if not _too_large(error):
            raise
        used, reason = _used(error)
        seconds = time.monotonic() - started
        # Where temporaries alone are too large, that is all that the compiler tells.
        memory = {**lowered.held, "total": max(used, sum(lowered.held.values()))}
        return Plan(**known, fits=False, memory=memory, reason=reason, seconds_compiling=seconds)
    seconds = time.monotonic() - started
    stats = compiled.memory_analysis()
    total = stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    total += stats.output_size_in_bytes - stats.alias_size_in_bytes
    memory = {
        **lowered.held,
        **_activations(work, sizes),
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
        "total": total,
    }
    from twinformers.tpu.hlo import read

    program = read(text)
    computing = program.cycles / found.generation.clock
    # What is summed goes round twice, once to be added up and once to be told.
    told = (sum(program.bytes.values()) + program.bytes["all-reduce"]) / found.links
    step = max(computing, told)
    tokens = batch * (sequence if mode != "decode" else 1)
    flops = None if quick or config.kind != "causal" else all_layers(work, devices)
    counted = None
    if flops is not None and attention == "splash" and mode != "decode":
        counted = False if program.custom_calls.get("tpu_custom_call") else None
    return Plan(
        **known,
        fits=total <= found.memory,
        memory=memory,
        seconds_compiling=seconds,
        flops=flops,
        flops_ratio=flops * found.devices / needed if flops else None,
        attention_counted=counted,
        compute_seconds=computing,
        collective_seconds=told,
        step_seconds=step,
        tokens_per_second=tokens / step,
        tokens_per_second_per_chip=tokens / step / found.chips,
        mfu=ideal / step / (found.flops * found.devices),
        collectives={
            kind: {"count": program.count[kind], "bytes": program.bytes[kind]} for kind in program.count
        },
        published=_published(model, found, mode, tokens / step / found.chips),
    )


def compile_program(program: Any) -> tuple[Any, str]:
    """What a lowered program is compiled to, and its text with what each operation was estimated to take.

    The text comes from the compiler's own dump: JAX's `as_text` fails for some programs of several chips.
    """
    with tempfile.TemporaryDirectory() as room:
        compiled = program.compile(compiler_options={"xla_dump_to": room})
        texts = [path.read_text() for path in Path(room).glob("*.after_codegen.txt")]
    return compiled, max(texts, key=len) if texts else compiled.as_text()


def default_mesh(config: Any, mode: str, batch: int, devices: int) -> dict[str, int]:
    """A mesh to begin with: for training, as much of fsdp as the batch allows and the rest of tensor.

    For generation, as much of tensor as the heads allow, and the rest for rows.
    """
    if config.kind != "causal":
        return {"data": devices, "fsdp": 1, "tensor": 1}
    if mode == "train":
        fsdp = math.gcd(batch, devices)
        return {"data": 1, "fsdp": fsdp, "tensor": devices // fsdp}
    tensor = math.gcd(config.num_key_value_heads, devices)
    return {"data": devices // tensor, "fsdp": 1, "tensor": tensor}


def device_mesh(found: Slice, sizes: dict[str, int]) -> Any:
    """The slice's devices along the axes, neighbours in the machine where they talk the most."""
    if unknown := sorted(set(sizes) - {*AXES, SEQUENCE}):
        expected = ", ".join((*AXES, SEQUENCE))
        raise UsageError("unknown axis", where="mesh", expected=expected, found=", ".join(unknown))
    if math.prod(sizes.values()) != found.devices or min(sizes.values()) < 1:
        raise UsageError(
            "the mesh does not fit the slice",
            where="mesh",
            expected=f"positive sizes whose product is {found.devices}, the devices of {found.name}",
            found=" x ".join(f"{name} {size}" for name, size in sizes.items()),
        )
    from jax.experimental import mesh_utils
    from jax.sharding import Mesh

    from twinformers.sharding.jax_side import mesh_axes

    there = mesh_axes(**sizes)
    devices = mesh_utils.create_device_mesh(
        tuple(there.values()),
        list(found.description.devices),
        allow_split_physical_axes=True,  # a side of the machine may be shared by two axes of the mesh
    )
    return Mesh(devices, tuple(there))


def all_layers(work: Any, mesh: Any) -> float:
    """FLOPs of a device in all layers, from two programs of one and two layers: no loop hides any of them."""
    from twinformers.tpu.programs import lower

    one, two = (
        float(lower(work, mesh, layers=layers).program.compile().cost_analysis()["flops"])
        for layers in (1, 2)
    )
    return one + (work.config.num_hidden_layers - 1) * (two - one)


def _needed(work: Any) -> tuple[float, float]:
    """FLOPs of a step: with what is computed again, and without."""
    from twinformers.benchmarks.cases import Case
    from twinformers.benchmarks.cost import cost, parameters

    c: Any = work.config
    if c.kind != "causal":  # the least: each matrix once for each token of one input
        leaves = weight_map(c).leaves("torch").values()
        matrices = sum(math.prod(x.shape("torch")) for x in leaves if x.name("jax").endswith(".kernel"))
        ideal = 2.0 * matrices * work.batch * work.sequence
        return ideal, ideal
    n = parameters(c)
    if work.mode == "decode":
        attention = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * (work.sequence + 1)
        ideal = float(work.batch * (2 * (n.blocks + n.head) + attention))
        return ideal, ideal
    answer = cost(c, Case(task=work.mode, batch=work.batch, tokens=work.sequence), "bfloat16")
    assert answer is not None  # of these two tasks there always is one
    ideal = answer[1]
    return (ideal * 4 / 3 if work.mode == "train" and work.remat == "full" else ideal), ideal


def _roofline(work: Any, found: Slice, ideal: float) -> float:
    """Seconds at the least: by peak FLOP/s, or by one read of weights and cache where that takes longer."""
    from twinformers.benchmarks.cost import parameters

    seconds = ideal / (found.flops * found.devices)
    if work.mode != "decode":
        return seconds
    c, n = work.config, parameters(work.config)
    keys = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * work.sequence * work.batch
    read = 2 * (n.blocks + n.head + n.vectors + keys)
    return max(seconds, read / (found.bandwidth * found.devices))


def _activations(work: Any, sizes: dict[str, int]) -> dict[str, int]:
    """Of the temporaries, what a full recomputation keeps for the backward pass: the input of each block."""
    if work.mode != "train" or work.remat != "full":
        return {}
    rows = work.batch // (sizes["data"] * sizes["fsdp"] * work.accumulate)
    c, tokens = work.config, work.sequence // sizes.get(SEQUENCE, 1)
    return {"activations": 2 * c.num_hidden_layers * rows * tokens * c.hidden_size}


def _too_large(error: Exception) -> bool:
    text = str(error)
    return "RESOURCE_EXHAUSTED" in text or "Ran out of memory" in text or "HbmOom" in text


def _used(error: Exception) -> tuple[int, str]:
    """Bytes that the compiler wanted, and its own sentence about it."""
    text = str(error)
    number = r"([\d.]+)([KMGT])"
    match = re.search(rf"[Uu]sed {number} of {number}", text)
    match = match or re.search(rf"required for [^(]*\({number}\) exceeds available HBM \({number}\)", text)
    if match is None:
        return 0, text.splitlines()[0][:300]
    used, unit, limit, of = match.groups()
    power = {"K": 10, "M": 20, "G": 30, "T": 40}[unit]
    return int(float(used) * 2**power), f"the program needs {used} {unit}iB of {limit} {of}iB on each device"


def _published(model: str, found: Slice, mode: str, rate: float) -> dict[str, Any] | None:
    """What was measured of this model on this generation, and how the estimate compares."""
    row = PUBLISHED.get((model, found.generation.name)) if mode == "train" else None
    if row is None:
        return None
    where, measured, mfu = row
    known = {"source": "MaxText, bfloat16, sequence 4096", "slice": where, "mfu": mfu}
    if measured is not None:
        known |= {"tokens_per_second_per_chip": measured, "ratio": rate / measured}
    return known
