"""`llmc run`: generate from one prompt in this process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import rich_click as click

from llmc.cli.engine_settings import engine_fields
from llmc.cli.options import SettingsCommand, resolved, with_settings


class RunCommand(SettingsCommand):
    settings_of = "run"


@click.command("run", cls=RunCommand)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, help="Most tokens to generate [default: 128].")
@click.option("--temperature", type=click.FloatRange(min=0.0), default=None, help="0: greedy. Default: the model's own.")
@click.option("--chat", is_flag=True, help="PROMPT is a user's message, put through the chat template.")
@with_settings("run")
def run_command(
    artifact: Path, prompt: str, max_tokens: int, temperature: float | None, chat: bool, config_file: Path | None, **options: Any
) -> None:
    """Print what the model of ARTIFACT says after PROMPT, as it says it."""
    import msgspec

    from llmc.runtime.llm import LLM

    settings = resolved("run", options, config_file)
    fields = engine_fields(artifact, settings)
    with LLM(fields.pop("artifact"), generation_config=settings["generation_config"], **fields) as llm:
        changes: dict[str, Any] = {"max_tokens": max_tokens}
        if temperature is not None:
            changes["temperature"] = temperature
        params = msgspec.structs.replace(llm.get_default_sampling_params(), **changes)
        source = llm.encode_chat([{"role": "user", "content": prompt}]) if chat else prompt
        for piece in llm.stream(source, params):
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")
