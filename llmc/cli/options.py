"""From the settings table to click options, and from a vLLM-style command line to what click understands."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import rich_click as click

from llmc.cli.help import asked_for, panels, show
from llmc.config.compilation_config import arguments
from llmc.config.environment import unknown_variables
from llmc.config.resolve import Resolved, resolve
from llmc.config.settings import BY_NAME, COMPILE, Setting, for_command
from llmc.errors import ConfigError

_COMPILATION_CONFIG = ("--compilation-config", "-cc")


@cache
def refused_flags() -> dict[str, str]:
    """Flag or alias -> why llmc does not take it."""
    table = tomllib.loads((files("llmc.config") / "refused_flags.toml").read_text(encoding="utf-8"))
    return {name: entry["reason"] for entry in table["flag"] for name in (entry["name"], *entry["aliases"])}


class SettingsCommand(click.RichCommand):
    """A command whose options come from the settings table.

    Before click parses: flags of vLLM that llmc refuses end with their reason, flags of another command say where they act, and
    flags that take several values (`--served-model-name a b`) are spread into one flag per value.
    """

    settings_of: str

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        found = asked_for(self.settings_of, args)
        if found is not None:
            show(found)
            ctx.exit()
        return super().parse_args(ctx, rewrite(self.settings_of, args))


def rewrite(command: str, args: list[str]) -> list[str]:
    """See SettingsCommand.

    Raises:
        ConfigError: a refused flag, or one of another command.
    """
    mine = {spelling: s for s in for_command(command) for spelling in _spellings(s)}
    elsewhere = {spelling: s for s in BY_NAME.values() if s.flag not in mine for spelling in _spellings(s)}
    refused = refused_flags()
    out: list[str] = []
    index = 0
    while index < len(args):
        arg = args[index]
        index += 1
        if arg == "--":
            return [*out, arg, *args[index:]]
        name = _flag_name(arg)
        if command == COMPILE and name in _COMPILATION_CONFIG:
            spelling, given, value = arg.partition("=")
            if not given:
                if index >= len(args):
                    raise ConfigError(f"{arg}: its value is missing")
                value, index = args[index], index + 1
            out += arguments(spelling, value)
            continue
        setting = mine.get(name)
        if setting is None and name in elsewhere:
            where = " and ".join(f"`llmc {c}`" for c in sorted(elsewhere[name].commands))
            raise ConfigError(f"{name} acts in {where}, not in `llmc {command}`")
        if setting is None and name in refused:
            raise ConfigError(f"{name}: {refused[name]}")
        out.append(arg)
        if setting is not None and setting.many and "=" not in arg:
            first = True
            while index < len(args) and not args[index].startswith("-"):
                out.extend([args[index]] if first else [arg, args[index]])
                first = False
                index += 1
    return out


def _spellings(setting: Setting) -> list[str]:
    negative = ["--no-" + setting.flag[2:]] if setting.negatable else []
    return [setting.flag, *setting.aliases, *negative]


def _flag_name(arg: str) -> str:
    """`--name` of `--name=value`, `--name.key` and `-cc.key=value`; anything else as it is."""
    if not arg.startswith("-"):
        return arg
    head = arg.split("=", 1)[0]
    if head.startswith("-O") and not head.startswith("--"):
        return "-O"
    return head.split(".", 1)[0].removesuffix("+")


def with_settings(command: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add one click option per setting of `command`, and --config. The function receives them as `flags` keyword arguments."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        click.rich_click.OPTION_GROUPS[f"llmc {command}"] = panels(command)
        for setting in reversed(for_command(command)):
            function = _option(setting)(function)
        return click.option("--config", "config_file", type=click.Path(path_type=Path), default=None, help="TOML file with settings.")(
            function
        )

    return decorate


def _option(setting: Setting) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    help_text = setting.help if setting.default is None or setting.is_flag else f"{setting.help} [default: {setting.default}]"
    if setting.is_flag:
        spelling = f"{setting.flag}/--no-{setting.flag[2:]}" if setting.negatable else setting.flag
        return click.option(spelling, setting.name, is_flag=True, default=None, help=help_text)
    metavar = setting.metavar or "|".join(setting.choices) or None
    return click.option(
        setting.flag, *setting.aliases, setting.name, type=str, default=None, multiple=setting.many, metavar=metavar, help=help_text
    )


def resolved(command: str, options: dict[str, Any], config_file: Path | None) -> Resolved:
    """The settings of `command` from what click parsed (None and () mean not given)."""
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    settings = resolve(command, {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}, config_file=config_file)
    for sentence in unknown_variables(os.environ):
        if settings["fail_on_environ_validation"]:
            raise ConfigError(f"{sentence} (and --fail-on-environ-validation makes that an error)")
        click.echo(f"llmc: warning: {sentence}", err=True)
    return settings
