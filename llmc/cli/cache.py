"""`llmc cache` and `llmc why`: what the compile cache holds, and why it missed."""

from __future__ import annotations

import time

import rich_click as click

from llmc.cli.differences import difference_lines
from llmc.config.human import human_bytes, human_int
from llmc.errors import ConfigError


@click.group()
def cache_group() -> None:
    """List or shrink the compile cache (LLMC_CACHE_DIR, or the user's cache folder)."""


@cache_group.command("ls")
def list_entries() -> None:
    """List entries, most recently used first."""
    from rich.console import Console
    from rich.table import Table

    from llmc.artifacts.store import Store

    store = Store()
    entries = store.entries()
    table = Table(title=f"{store.root}: {len(entries)} entries", title_justify="left")
    for column in ("key", "what", "size", "last used"):
        table.add_column(column, overflow="fold")
    for entry in entries:
        what = ", ".join(str(value) for value in entry.record.description.values())
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used_at))
        table.add_row(entry.record.key[:16], what, human_bytes(entry.size_bytes), used)
    Console().print(table)


@cache_group.command("gc")
@click.option("--max-size", default="20g", metavar="BYTES", help="Keep at most this much, least recently used goes first [default: 20g].")
def collect(max_size: str) -> None:
    """Shrink the cache."""
    from llmc.artifacts.store import Store

    limit = human_int(max_size)
    if limit < 0:
        raise ConfigError(f"--max-size: {max_size!r} is below zero; give what may stay, 0 to empty the cache")
    done = Store().collect(limit)
    print(f"removed {done.removed_entries} entries, {human_bytes(done.freed_bytes)}; {human_bytes(done.kept_bytes)} are kept")


@click.command("why")
@click.argument("key")
@click.argument("other", required=False)
def why_command(key: str, other: str | None) -> None:
    """Say which parts of cache entry KEY differ from OTHER, or from the entry that is nearest to it."""
    from llmc.artifacts.keys import Key, explain
    from llmc.artifacts.store import Record, Store

    store = Store()

    def entry(prefix: str) -> Record:
        found = [listed.record for listed in store.entries() if listed.record.key.startswith(prefix)]
        if len(found) != 1:
            raise ConfigError(f"{prefix}: {len(found)} entries of the cache begin so, expected one; `llmc cache ls` lists them")
        return found[0]

    mine = entry(key)
    if other is not None:
        theirs, differences = entry(other), None
    else:
        nearest = store.nearest(Key(kind=mine.kind, digest=mine.key, parts=mine.parts))  # type: ignore[arg-type]
        if nearest is None:
            print(f"{mine.key}: the only entry of its kind")
            return
        theirs, differences = nearest
    print(f"{mine.key}\n{theirs.key} differs in")
    for line in difference_lines(explain(theirs.parts, mine.parts) if differences is None else differences):
        print(f"  {line}")
