"""`llmc compile --explain PASS`."""

from __future__ import annotations


def show_explanation(name: str) -> None:
    """Print what a pass does, where it applies, why, and what it promises; `all` lists every pass in a line each.

    Raises:
        ConfigError: no pass of that name.
    """
    from rich.markup import escape
    from rich.table import Table

    from llmc.cli.console import console as tables
    from llmc.compiler.explain_pass import all_passes, explain

    console = tables()
    if name == "all":
        table = Table(show_header=False, box=None)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(ratio=3)
        table.add_column(ratio=2)
        for each in all_passes():
            found = explain(each)
            kinds: dict[str, list[str]] = {}
            for kind, where in found.runs.items():
                kinds.setdefault(" ".join(where), []).append(kind)
            table.add_row(each, escape(found.what), "\n".join(f"{', '.join(names)}: {where}" for where, names in kinds.items()))
        console.print(table)
        return
    found = explain(name)
    console.print(f"[bold]{found.name}[/]  {escape(found.what)}", soft_wrap=True)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in found.parts.items():
        table.add_row(label.lower(), escape(text))
    table.add_row("numbers", found.numerics)
    for kind, where in found.runs.items():
        table.add_row(f"runs on {kind}", ", ".join(where))
    for setting, value in found.settings.items():
        table.add_row(setting, str(value))
    console.print(table)
    if found.optional:
        console.print(f"[dim]leave it out with --passes -{found.name}; --dry-run shows what it matches in a model[/]", soft_wrap=True)
    else:
        console.print("[dim]the flag, the checkpoint or the kernels need it: --passes cannot leave it out[/]", soft_wrap=True)
