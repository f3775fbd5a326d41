"""`llmc serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from llmc.cli.engine_settings import chat_template_text, engine_fields
from llmc.cli.options import SettingsCommand, resolved, with_settings


class ServeCommand(SettingsCommand):
    settings_of = "serve"


@click.command("serve", cls=ServeCommand)
@click.argument("artifact", type=click.Path(path_type=Path))
@with_settings("serve")
def serve_command(artifact: Path, config_file: Path | None, **options: Any) -> int:
    """Serve ARTIFACT with an OpenAI-compatible API.

    `--help=GROUP` shows one group of flags with everything known of them, `--help=all` all of them, `--help-search WORD` those that
    mention a word.
    """
    from llmc.runtime.server.main import serve
    from llmc.runtime.server.settings import ServerSettings

    settings = resolved("serve", options, config_file)
    server = ServerSettings(
        artifact=str(artifact),
        engine=engine_fields(artifact, settings),
        require_signature=settings["require_signature"],
        trust=settings["trust"],
        host=settings["host"] or "127.0.0.1",
        port=settings["port"],
        api_keys=tuple(settings["api_key"] or ()),
        served_model_names=tuple(settings["served_model_name"] or ()),
        chat_template=chat_template_text(settings["chat_template"]),
        reasoning_parser=settings["reasoning_parser"],
        tool_call_parser=settings["tool_call_parser"],
        enable_auto_tool_choice=settings["enable_auto_tool_choice"],
        enable_tokenizer_info_endpoint=settings["enable_tokenizer_info_endpoint"],
        generation_config=settings["generation_config"],
        allow_runtime_lora_updating=tuple(settings["allow_runtime_lora_updating"] or ()),
        max_logprobs=settings["max_logprobs"],
        override_generation_config=settings["override_generation_config"] or {},
        max_queue=settings["max_queue"],
        stream_interval=settings["stream_interval"],
        renderer_num_workers=settings["renderer_num_workers"],
        uds=settings["uds"],
        root_path=settings["root_path"],
        allowed_origins=tuple(settings["allowed_origins"] or ()),
        allowed_methods=tuple(settings["allowed_methods"]),
        allowed_headers=tuple(settings["allowed_headers"]),
        allow_credentials=settings["allow_credentials"],
        ssl_certfile=settings["ssl_certfile"],
        ssl_keyfile=settings["ssl_keyfile"],
        ssl_ca_certs=settings["ssl_ca_certs"],
        ssl_cert_reqs=settings["ssl_cert_reqs"],
        otlp_traces_endpoint=settings["otlp_traces_endpoint"],
        trace_startup=settings["trace_startup"],
        enable_sleep_mode=settings["enable_sleep_mode"],
        allow_weights=tuple(settings["allow_weights"] or ()),
        disable_docs=settings["disable_fastapi_docs"],
        disable_access_log=settings["disable_uvicorn_access_log"],
        shutdown_timeout_s=settings["shutdown_timeout"],
        disable_log_stats=settings["disable_log_stats"],
        log_level=settings["log_level"],
    )
    if settings["replicas"] == 1 and settings["engine"] == "process":
        return serve(server)
    from llmc.runtime.replicas.main import serve_replicas

    return serve_replicas(server, settings["replicas"], settings["engine"])
