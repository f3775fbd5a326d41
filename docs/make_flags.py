"""Write docs/flags.md from the settings table and the table of refused flags: `python docs/make_flags.py`."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path

from llmc.config.settings import SETTINGS, Setting

INTRO = """# Flags

Written by `python docs/make_flags.py` from `llmc/config/settings.py` and `llmc/config/refused_flags.toml`; a test holds it to them.

Every setting can stand in three places, the later winning: a TOML file (`--config FILE`; top level, or a table `[compile]`,
`[serve]`, `[run]`), the environment (`LLMC_` and the name in capitals), the command line. `llmc config show` says where each value
comes from. Integers may be written `4096`, `4k` (4000), `4K` (4096) or `25.6k`.

## Where llmc differs from vLLM on purpose
| flag | here | why |
|---|---|---|
| `--host` | 127.0.0.1 unless given | a server is reachable from outside only when someone says so |
| `--shutdown-timeout` | 30 s | running requests finish when a server is told to stop |
| `--dtype auto` | the checkpoint's own dtype | float32 weights are not rounded unasked |
| `--chat-template` | the operator's, never a request's | a template is a program |
| `--max-model-len`, `--max-num-seqs`, `--max-num-batched-tokens` | compile sets the most, serve may lower it | the program is fixed |
| `--enable-prefix-caching`, `--enable-chunked-prefill` | on unless switched off | neither changes an answer here |
| `--performance-mode` | chosen at compile time alone | it decides sizes, and they are compiled |
| `-cc.mode` | a level, as `-O` | there is one compiler; its keys are llmc's flags |
| flags that load Python code | refused | code does not enter a server at start |
"""


def row(setting: Setting) -> str:
    names = ", ".join(
        f"`{name}`" for name in (setting.flag, *setting.aliases, *(["--no-" + setting.flag[2:]] if setting.negatable else []))
    )
    default = "" if setting.default is None else f"`{str(setting.default).lower() if setting.is_flag else setting.default}`"
    accepted = f" Accepted: {', '.join(setting.choices)}." if setting.choices else ""
    return f"| {names} | {', '.join(sorted(setting.commands))} | {default} | {setting.help}{accepted} |"


def text() -> str:
    """The whole page."""
    lines = [INTRO]
    for group in dict.fromkeys(setting.group for setting in SETTINGS):
        lines += [f"## {group}", "| flag | acts in | default | what it does |", "|---|---|---|---|"]
        lines += [row(setting) for setting in SETTINGS if setting.group == group]
        lines.append("")
    refused = tomllib.loads((files("llmc.config") / "refused_flags.toml").read_text(encoding="utf-8"))["flag"]
    lines += ["## Flags that are refused by name", "| flag | why, and what to do |", "|---|---|"]
    lines += [f"| {', '.join(f'`{n}`' for n in (entry['name'], *entry['aliases']))} | {entry['reason']} |" for entry in refused]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "flags.md").write_text(text(), encoding="utf-8")
