"""`llmc config show`: every setting, its value and where the value comes from."""

from __future__ import annotations

import json
from pathlib import Path

import rich_click as click

from llmc.config.resolve import resolve
from llmc.config.settings import for_command


@click.group()
def config_group() -> None:
    """Show settings and where each value comes from."""


@config_group.command("show")
@click.argument("command", type=click.Choice(["compile", "serve", "run"]), default="serve")
@click.option("--config", "config_file", type=click.Path(path_type=Path), default=None, help="TOML file with settings.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def show(command: str, config_file: Path | None, as_json: bool) -> None:
    """List the settings of a command; flags on its own command line would win over what is shown."""
    result = resolve(command, {}, config_file=config_file)
    shown = {s.name: "(set)" if s.secret and result[s.name] else result[s.name] for s in for_command(command)}
    if as_json:
        print(json.dumps({name: {"value": value, "origin": result.origins[name]} for name, value in shown.items()}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"llmc {command}", title_justify="left")
    for column in ("setting", "value", "origin"):
        table.add_column(column, overflow="fold")
    group = None
    for setting in for_command(command):
        if setting.group != group:
            group = setting.group
            table.add_section()
        value = shown[setting.name]
        table.add_row(setting.flag, "-" if value is None else str(value), result.origins[setting.name])
    Console().print(table)
