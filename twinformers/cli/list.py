"""`twinformers list`"""

from __future__ import annotations

from twinformers.cli.output import console, print_json
from twinformers.configs import architectures, config_class, presets
from twinformers.weight_maps import weight_map


def run(*, json: bool) -> None:
    rows = [(name, config, weight_map(config).parameters) for name, config in presets().items()]
    if json:
        print_json(
            {
                "architectures": [
                    {
                        "architecture": a,
                        "transformers": [c for c in config_class(a).hf_classes().values() if c],
                    }
                    for a in architectures()
                ],
                "presets": [
                    {"preset": n, "architecture": c.architecture, "parameters": p} for n, c, p in rows
                ],
            }
        )
        return
    from rich.table import Table

    table = Table("preset", "architecture", "parameters")
    table.columns[2].justify = "right"
    for name, config, parameters in rows:
        table.add_row(f"preset:{name}", config.architecture, f"{parameters:,}")
    console().print(table)
