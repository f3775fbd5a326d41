"""Help for commands with many flags: `--help` in groups, `--help=GROUP`, `--help-search WORD`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import rich_click as click

from llmc.config.settings import Setting, for_command
from llmc.errors import ConfigError


def asked_for(command: str, args: list[str]) -> list[Setting] | None:
    """The settings that `--help=GROUP` or `--help-search WORD` among `args` asks for; None: neither is there.

    Raises:
        ConfigError: no such group, no setting with the word, or no word.
    """
    for index, arg in enumerate(args):
        if arg == "--":
            return None
        if arg.startswith("--help="):
            return _group(command, arg.removeprefix("--help="))
        if arg.startswith("--help-search"):
            word = arg.removeprefix("--help-search").removeprefix("=") or (args[index + 1] if index + 1 < len(args) else "")
            return _search(command, word)
    return None


def _group(command: str, wanted: str) -> list[Setting]:
    groups = list(dict.fromkeys(setting.group for setting in for_command(command)))
    key = wanted.strip().lower()
    if key == "all":
        return for_command(command)
    name = next((group for group in groups if key == group.lower()), None)
    if name is not None:
        return [setting for setting in for_command(command) if setting.group == name]
    by_flag = [setting for setting in for_command(command) if key in (setting.name, setting.flag, setting.flag[2:])]
    if by_flag:
        return by_flag
    raise ConfigError(f"--help={wanted}: there is no such group or flag; groups of `llmc {command}`: {', '.join(groups)}, all")


def _search(command: str, word: str) -> list[Setting]:
    key = word.strip().lower()
    if not key:
        raise ConfigError("--help-search needs a word, for example --help-search cache")
    found = [
        setting
        for setting in for_command(command)
        if any(key in text.lower() for text in (setting.flag, setting.name, setting.help, *setting.aliases, *setting.choices))
    ]
    if not found:
        raise ConfigError(f"--help-search {word}: no flag of `llmc {command}` mentions it; `llmc {command} --help` lists all")
    return found


def show(settings: Iterable[Setting]) -> None:
    """Print flags with everything that is known of them."""
    group = None
    for setting in settings:
        if setting.group != group:
            group = setting.group
            click.echo(f"{group}:")
        names = [setting.flag, *setting.aliases, *(["--no-" + setting.flag[2:]] if setting.negatable else [])]
        value = "" if setting.is_flag else " " + (setting.metavar or "|".join(setting.choices) or "TEXT")
        click.echo(f"  {', '.join(names)}{value}")
        click.echo(f"      {setting.help}")
        if setting.default is not None:
            click.echo(f"      default: {str(setting.default).lower() if setting.is_flag else setting.default}")
        click.echo(f"      environment: {setting.env}")


def panels(command: str) -> list[Any]:
    """What rich-click needs to show the options of `command` in groups."""
    groups: dict[str, list[str]] = {}
    for setting in for_command(command):
        groups.setdefault(setting.group, []).append(setting.flag)
    return [{"name": name, "options": flags} for name, flags in groups.items()]
