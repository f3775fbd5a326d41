"""`llmc cache` and `llmc why`: what the compile cache holds, sharing it, and why it missed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import rich_click as click

from llmc.cli.differences import difference_lines
from llmc.config.human import human_bytes, human_int
from llmc.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from llmc.artifacts.store import Store


@click.group()
def cache_group() -> None:
    """List, shrink, check and share the compile cache (LLMC_CACHE_DIR, or the user's cache folder)."""


@cache_group.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, with whole keys.")
def list_entries(as_json: bool) -> None:
    """List entries, most recently used first."""
    from rich.markup import escape
    from rich.table import Table

    from llmc.artifacts.store import Store
    from llmc.cli.console import console

    store = Store()
    entries = store.entries()
    if as_json:
        found = [{"key": e.record.key, **e.record.description, "size_bytes": e.size_bytes, "used_at": round(e.used_at, 3)} for e in entries]
        print(json.dumps(found, indent=2, sort_keys=True))
        return
    table = Table(title=f"{store.root}: {len(entries)} {'entry' if len(entries) == 1 else 'entries'}", title_justify="left")
    table.add_column("key", no_wrap=True)
    for column in ("what", "size", "last used"):
        table.add_column(column, overflow="fold")
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used_at))
        table.add_row(entry.record.key[:16], escape(described(entry.record.description)), human_bytes(entry.size_bytes), used)
    console().print(table)


def described(facts: Mapping[str, str | int | float | bool | None]) -> str:
    """ "artifact: level 2, model demo_model"."""
    rest = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "what")
    return f"{facts.get('what', 'entry')}: {rest}"


@cache_group.command("gc")
@click.option("--max-size", default="20g", metavar="BYTES", help="Keep at most this much, least recently used goes first [default: 20g].")
def collect(max_size: str) -> None:
    """Shrink the cache."""
    from llmc.artifacts.store import Store

    try:
        limit = human_int(max_size)
    except ConfigError as error:
        raise ConfigError(f"--max-size: {error}") from None
    if limit < 0:
        raise ConfigError(f"--max-size: {max_size!r} is below zero; give what may stay, 0 to empty the cache")
    done = Store().collect(limit)
    print(f"removed {done.removed_entries} entries, {human_bytes(done.freed_bytes)}; {human_bytes(done.kept_bytes)} are kept")


REMOTE = click.option("--remote", required=True, metavar="URL", help="https://..., s3://..., file:///... (anything fsspec opens).")
TIMEOUT = click.option("--timeout", type=click.FloatRange(min=0.1), default=30.0, show_default=True, help="Seconds without an answer.")


@cache_group.command("push")
@click.argument("key", required=False)
@click.option("--all", "everything", is_flag=True, help="Every entry.")
@REMOTE
@TIMEOUT
def push(key: str | None, everything: bool, remote: str, timeout: float) -> None:
    """Send entry KEY (or its beginning) of the local cache to a remote one."""
    from llmc.artifacts.remote import RemoteCache
    from llmc.artifacts.store import Store

    store, there = Store(), RemoteCache(remote, timeout_s=timeout)
    for entry in _chosen(store, key, everything):
        done = there.push(entry, store)
        print(f"{entry}: {done.files} files, {human_bytes(done.bytes)} sent; {done.already_there} were there")


@cache_group.command("pull")
@click.argument("key")
@REMOTE
@TIMEOUT
def pull(key: str, remote: str, timeout: float) -> int:
    """Bring entry KEY from a remote cache, each file hashed before it is believed; status 1 if it is not there.

    `llmc compile ... --explain-cache` shows the key of a compile; with the entry here, that compile is a copy.
    """
    from llmc.artifacts.remote import RemoteCache
    from llmc.artifacts.store import Store

    store = Store()
    key = _remote_key(store, key)
    done = RemoteCache(remote, timeout_s=timeout).pull(key, store)
    if done is None:
        print(f"miss: {remote} has no entry {key}")
        return 1
    print(f"{key}: {done.files} files, {human_bytes(done.bytes)} received; {done.already_there} were here")
    return 0


@cache_group.command("verify")
@click.argument("key", required=False)
@click.option("--remote", default=None, metavar="URL", help="Of a remote cache: download KEY and hash it.")
@TIMEOUT
def verify(key: str | None, remote: str | None, timeout: float) -> None:
    """Hash every byte of the local cache's entries, of one that begins with KEY, or of KEY in a remote cache. Keeps nothing damaged."""
    from llmc.artifacts.remote import RemoteCache
    from llmc.artifacts.store import Store

    store = Store()
    if remote is not None:
        if key is None:
            raise ConfigError("which entry? A remote cache cannot be searched: name KEY")
        key = _remote_key(store, key)
        done = RemoteCache(remote, timeout_s=timeout).verify(key, store)
        print(f"{key}: whole at {remote}; {done.files} files, {human_bytes(done.bytes)}")
        return
    damaged = []
    keys = _chosen(store, key, key is None)
    for entry in keys:
        record = store.find(entry)
        wrong = [stored.path for stored in record.files if not store.holds(stored, stamps=False)] if record is not None else ["its record"]
        if wrong:
            store.remove(entry)
            damaged.append(f"{entry[:16]} ({', '.join(wrong[:3])})")
    if damaged:
        raise ArtifactError(f"{len(damaged)} of {len(keys)} entries were damaged and are removed, compile them again: {'; '.join(damaged)}")
    print(f"{len(keys)} entries are whole")


def _remote_key(store: Store, key: str) -> str:
    """A whole key, or the one of the local entry that begins so.

    Raises:
        ConfigError: neither.
    """
    from llmc.artifacts.stored_files import SHA256

    if SHA256.fullmatch(key):
        return key
    here = [listed.record.key for listed in store.entries() if listed.record.key.startswith(key)]
    if len(here) != 1:
        raise ConfigError(
            f"{key!r} is no key: expected 64 hexadecimal digits, or the beginning of one local entry's; a remote cache cannot be searched"
        )
    return here[0]


def _chosen(store: Store, prefix: str | None, everything: bool) -> list[str]:
    """Keys of the entries that a command is about."""
    if (prefix is None) != everything:
        raise ConfigError("name one entry, or take --all; `llmc cache ls` lists them")
    found = [listed.record.key for listed in store.entries() if prefix is None or listed.record.key.startswith(prefix)]
    if prefix is not None and len(found) != 1:
        raise ConfigError(f"{prefix}: {len(found)} entries of the cache begin so, expected one; `llmc cache ls` lists them")
    return found


@click.command("why")
@click.argument("key")
@click.argument("other", required=False)
def why_command(key: str, other: str | None) -> None:
    """Say which parts of cache entry KEY differ from OTHER, or from the entry that is nearest to it."""
    from llmc.artifacts.keys import Key, explain
    from llmc.artifacts.store import Record, Store

    store = Store()

    def entry(prefix: str) -> Record:
        (found,) = _chosen(store, prefix, False)
        return next(listed.record for listed in store.entries() if listed.record.key == found)

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
