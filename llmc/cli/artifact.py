"""`llmc inspect`, `verify`, `diff` and `sign`: looking at artifacts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import rich_click as click

from llmc.config.human import human_bytes

ARTIFACT = click.argument("artifact", type=click.Path(path_type=Path))


@click.command("inspect")
@ARTIFACT
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def inspect_command(artifact: Path, as_json: bool) -> None:
    """Show what ARTIFACT holds, without loading any of it."""
    from llmc.artifacts.inspect import describe

    facts = describe(artifact)
    if as_json:
        print(json.dumps(facts, indent=2, sort_keys=True))
        return
    from rich.console import Console

    console = Console()
    for section, content in facts.items():
        _print_section(console, section, content)


def _print_section(console: Any, title: str, content: Any) -> None:
    from rich.table import Table

    if isinstance(content, dict) and content:
        table = Table(title=title, title_justify="left", show_header=False)
        for key, value in content.items():
            table.add_row(str(key), _cell(key, value))
        console.print(table)
    elif isinstance(content, list) and content and isinstance(content[0], dict):
        table = Table(title=f"{title} ({len(content)})", title_justify="left")
        columns = list(content[0])
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in content[:40]:
            table.add_row(*[_cell(column, row.get(column)) for column in columns])
        console.print(table)
        if len(content) > 40:
            console.print(f"... {len(content) - 40} more; --json shows all")
    else:
        console.print(f"[bold]{title}[/]: {_cell(title, content)}")


def _cell(key: str, value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int) and str(key).endswith("bytes"):
        return human_bytes(value)
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value[:12])) + (f", ... ({len(value)})" if len(value) > 12 else "")
    return str(value)


@click.command("verify")
@ARTIFACT
@click.option("--trust", type=click.Path(path_type=Path), default=None, help="Public key (PEM) that must have signed it.")
def verify_command(artifact: Path, trust: Path | None) -> None:
    """Check every byte of ARTIFACT: manifest, files, weights, and the signature when --trust is given."""
    from llmc.artifacts.verify import verify

    started = time.perf_counter()
    report = verify(artifact, trust=trust)
    signed = f"signed by {trust}" if trust else "signature not asked for"
    size = human_bytes(report.size_bytes)
    print(f"{artifact}: whole; {report.num_files} files, {size} checked in {time.perf_counter() - started:.2f} s; {signed}")


@click.command("diff")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def diff_command(a: Path, b: Path, as_json: bool) -> int:
    """Show how artifacts A and B differ; exit status 1 when they do."""
    from llmc.artifacts.inspect import diff

    differences = diff(a, b)
    if as_json:
        print(json.dumps([{"path": d.path, "a": d.a, "b": d.b} for d in differences], indent=2, default=str))
    elif not differences:
        print(f"{a} and {b} are equal")
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{len(differences)} differences", title_justify="left")
        for column in ("part", str(a), str(b)):
            table.add_column(column, overflow="fold")
        for difference in differences:
            table.add_row(difference.path, _cell("", difference.a), _cell("", difference.b))
        Console().print(table)
    return 1 if differences else 0


@click.command("sign")
@ARTIFACT
@click.option("--key", type=click.Path(path_type=Path), required=True, help="Private key (PEM, elliptic curve).")
def sign_command(artifact: Path, key: Path) -> None:
    """Sign ARTIFACT with a private key; the signature is a file of its own, outside the hashed set."""
    from llmc.artifacts.signing import sign

    signature = sign(artifact, key)
    print(f"{signature}: signature written; check it with `llmc verify {artifact} --trust PUBLIC_KEY`")
