"""`twinformers tpu`"""

from __future__ import annotations

from typing import Any

from twinformers.cli.output import console, print_json, progress
from twinformers.loading import load_config
from twinformers.sharding.mesh import mesh_sizes
from twinformers.tpu.planning import Plan, plan
from twinformers.tpu.searching import Found, search


def run(source: str, topology: str, *, mesh: str | None, searching: bool, json: bool, **options: Any) -> int:
    config = load_config(source)
    name = source.removeprefix("preset:").partition("@")[0] if source.startswith("preset:") else source
    with progress("compiling", json=json) as bar:

        def show(text: str) -> None:
            bar.update(bar.task_ids[0], description=text)

        given = {**options, "model": name, "on_progress": show}
        if searching:
            found = search(config, topology, **given)
            best, tried = found.best, found
        else:
            sizes = None if mesh is None else mesh_sizes(mesh)
            best, tried = plan(config, topology, mesh=sizes, **given), None
    if json:
        print_json(tried.to_dict() if tried else best.to_dict())
    else:
        if tried:
            _show_search(tried)
        _show(best)
    return 0 if best.fits else 1


def gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def _show(p: Plan) -> None:
    from rich.table import Table

    say, out = console().print, console()
    axes = ", ".join(f"{axis} {size}" for axis, size in p.mesh.items())
    say(
        f"{p.model}, {p.mode}, batch {p.batch} x {p.sequence}, on {p.topology}: {p.chips} chips",
        soft_wrap=True,
    )
    say(f"mesh: {axes}; remat {p.remat}; attention {p.attention}", soft_wrap=True)
    verdict = "fits" if p.fits else "does not fit"
    say(
        f"{verdict}: {gib(p.memory['total'])} of {gib(p.memory_limit)} on each device; {p.reason}".rstrip(
            "; "
        )
    )
    table = Table(box=None)
    table.add_column("memory of a device")
    table.add_column("", justify="right")
    for kind, count in p.memory.items():
        if kind != "total":
            table.add_row(kind, gib(count))
    out.print(table)
    if p.step_seconds is None:
        return
    if p.flops:
        note = "; those of the attention kernel are not among them" if p.attention_counted is False else ""
        say(
            f"FLOPs of a device: {p.flops:.3e}, {p.flops_ratio:.2f} of the {p.flops_needed:.3e} needed{note}",
            soft_wrap=True,
        )
    say(
        f"a step: {p.step_seconds:.3g} s estimated (computing {p.compute_seconds:.3g} s, collectives "
        f"{p.collective_seconds:.3g} s), {p.roofline_seconds:.3g} s at the least; "
        f"{p.tokens_per_second:,.0f} tokens/s, {p.tokens_per_second_per_chip:,.1f} per chip; MFU {p.mfu:.1%}",
        soft_wrap=True,
    )
    for kind, c in p.collectives.items():
        say(f"{kind}: {c['count']} times, {gib(c['bytes'])}")
    if p.published:
        rate = p.published.get("tokens_per_second_per_chip")
        told = (
            f"{rate:,.0f} tokens/s per chip (the estimate is {p.published['ratio']:.2f} of it), "
            if rate
            else ""
        )
        say(
            f"measured on {p.published['slice']}: {told}MFU {p.published['mfu']:.1%} (MaxText)",
            soft_wrap=True,
        )
    say(f"compiled in {p.seconds_compiling:.0f} s")
    say(p.meaning, soft_wrap=True)


def _show_search(found: Found) -> None:
    from rich.table import Table

    table = Table(box=None)
    for name in ("mesh", "remat", "fits", "memory", "step", "tokens/s per chip", "MFU"):
        table.add_column(name, justify="left" if name in ("mesh", "remat", "fits") else "right")
    for p in found.tried:
        told = (f"{p.step_seconds:.3f} s", f"{p.tokens_per_second_per_chip:,.1f}", f"{p.mfu:.1%}")
        table.add_row(
            " x ".join(str(size) for size in p.mesh.values()),
            p.remat,
            "yes" if p.fits else "no",
            gib(p.memory["total"]),
            *(told if p.step_seconds is not None else ("", "", "")),
        )
    console().print(table)
    console().print(f"of {found.candidates} meshes and policies, {len(found.tried)} were compiled")
