"""Where each setting's value comes from: built-in default, TOML file, environment, command line; the later wins."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.config.settings import BY_NAME, Setting, for_command
from llmc.errors import ConfigError

MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """Values of one command's settings and, per name, where the value came from."""

    values: dict[str, Any]
    origins: dict[str, str]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def given(self, name: str) -> bool:
        """Whether a person set it, rather than llmc's default."""
        return self.origins[name] != "default"


def resolve(
    command: str,
    flags: Mapping[str, Any],
    *,
    config_file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Resolved:
    """Resolve the settings of `command`.

    Args:
        command: "compile", "serve" or "run".
        flags: name -> text, truth value or list of texts; only what was given.
        config_file: TOML with top-level keys and tables named after commands; a command's table wins over the top level.
        environ: the environment; default os.environ. LLMC_<NAME>.

    Raises:
        ConfigError: an unknown key, or a value its setting does not accept; names the place.
    """
    environ = os.environ if environ is None else environ
    file_values = _read_file(config_file, command) if config_file is not None else {}
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for setting in for_command(command):
        name = setting.name
        if name in flags:
            values[name], origins[name] = _parse(setting, flags[name], setting.flag), "command line"
        elif setting.env in environ:
            raw = environ[setting.env]
            if name == "port" and raw.startswith(("tcp://", "udp://")):
                raise ConfigError(
                    f"{setting.env}={raw} is what Kubernetes sets beside a service named llmc, and no port number; "
                    "set enableServiceLinks: false in the pod, rename the service, or give --port"
                )
            values[name] = _parse(setting, raw.split(",") if setting.many else raw, setting.env)
            origins[name] = f"environment ({setting.env})"
        elif name in file_values:
            values[name], origins[name] = _parse(setting, file_values[name], f"{config_file}: {name}"), f"file ({config_file})"
        else:
            values[name], origins[name] = setting.default, "default"
    return Resolved(values=values, origins=origins)


def _parse(setting: Setting, raw: Any, place: str) -> Any:
    try:
        if setting.many:
            items = raw if isinstance(raw, list | tuple) else [raw]
            parsed = [setting.parse(_as_text(item)) for item in items]
            # `1,2 4` is one list: a parser of lists gives several values per text
            return [value for part in parsed for value in (part if isinstance(part, list) else [part])]
        if setting.is_flag and isinstance(raw, bool):
            return raw
        return setting.parse(_as_text(raw))
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None


def _as_text(raw: Any) -> str:
    if isinstance(raw, bool):
        return "true" if raw else "false"
    if isinstance(raw, str | int | float):
        return str(raw)
    if isinstance(raw, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in raw):
        return ",".join(map(str, raw))
    raise ConfigError(f"a {type(raw).__name__} was found, a string, number or truth value is needed")


def _read_file(path: Path, command: str) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: the configuration file cannot be read ({error.strerror}); check --config") from None
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: {len(data)} bytes, a configuration file has at most {MAX_CONFIG_BYTES}")
    try:
        table = tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    values: dict[str, Any] = {}
    sections = {"compile", "serve", "run"}
    for key, value in table.items():
        if key in sections and isinstance(value, dict):
            continue
        _known(key, path)
        values[key.replace("-", "_")] = value
    for section in sections:
        if section not in table:
            continue
        for key, value in table[section].items():
            _known(key, path, section)
            if section == command:
                values[key.replace("-", "_")] = value
    return values


def _known(key: str, path: Path, section: str | None = None) -> None:
    setting = BY_NAME.get(key.replace("-", "_"))
    place = f"{path}: [{section}] {key}" if section else f"{path}: {key}"
    if setting is None:
        raise ConfigError(f"{place} is no setting of llmc; `llmc config show` lists them")
    if section is not None and section not in setting.commands:
        raise ConfigError(f"{place} acts in {', '.join(sorted(setting.commands))}, not in {section}; move it there")
