"""What `serve` is told. The command line builds it; nothing below reads a flag or the environment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from llmc.errors import ConfigError
from llmc.runtime.engine_spawn import DEFAULT_COMMAND

LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Settings of the front process. `engine` goes to the engine process as it is."""

    artifact: str  # folder of the artifact
    engine: dict[str, Any]  # fields of runtime.engine.EngineConfig, plain JSON values
    require_signature: bool = False  # as for the engine: the front reads the template and the tokenizer
    trust: str | None = None  # public key file the artifact must be signed with
    host: str = "127.0.0.1"
    port: int = 8000  # 0: a free one, printed when ready
    uds: str | None = None  # path of a Unix socket, instead of host and port
    root_path: str = ""  # prefix a proxy in front of us adds
    api_keys: tuple[str, ...] = ()  # empty: no key is asked for
    served_model_names: tuple[str, ...] = ()  # empty: the artifact's model name; the first is shown in answers
    chat_template: str | None = None  # Jinja source of the operator, instead of the artifact's
    reasoning_parser: str = ""  # name of a format in reply_formats.toml; "": read off the chat template; "none": replies as they are
    tool_call_parser: str | None = None  # the same for tool calls
    enable_auto_tool_choice: bool = False  # refuse to start without a tool-call format
    enable_tokenizer_info_endpoint: bool = False  # GET /tokenizer_info
    generation_config: Literal["auto", "vllm", "llmc"] = "auto"  # auto: the model's own sampling defaults; else neutral ones
    max_logprobs: int = 20  # -1: the whole vocabulary
    max_body_bytes: int = 8 << 20
    max_queue: int = 1024  # sequences that may wait beside the running ones; one more gets 429
    max_sequences_per_request: int = 256  # n x prompts
    stream_interval: int = 1  # tokens of a sequence that are sent together, after its first
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    keep_alive_timeout_s: float = 75.0
    max_connections: int | None = None  # None: a quarter of the process's file descriptors
    shutdown_timeout_s: float = 30.0
    stall_timeout_s: float = 30.0  # no engine progress for this long: not ready
    hang_timeout_s: float = 300.0  # and for this long with requests open: the engine is restarted
    stats_interval_s: float = 10.0
    disable_log_stats: bool = False
    disable_access_log: bool = False
    disable_docs: bool = False  # no /openapi.json and /docs
    log_level: LogLevel = "info"
    allowed_origins: tuple[str, ...] = ()  # CORS; empty: no cross-origin access
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    engine_command: tuple[str, ...] = field(default=DEFAULT_COMMAND, repr=False)  # tests put a fake engine here

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port} is outside 0 to 65535 (0: a free port)")
        if any(not key or not key.isascii() for key in self.api_keys):
            raise ConfigError("an API key must be ASCII text of at least one character")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(f"root_path={self.root_path!r} must start with / and not end with it, as in /llm")
        for name in ("max_body_bytes", "max_queue", "max_sequences_per_request", "stream_interval"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("header_timeout_s", "body_timeout_s", "keep_alive_timeout_s", "stall_timeout_s", "hang_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be more than 0")
        if self.shutdown_timeout_s < 0:
            raise ConfigError(f"shutdown_timeout_s={self.shutdown_timeout_s} must not be negative")
        if self.max_logprobs < -1:
            raise ConfigError(f"max_logprobs={self.max_logprobs} must be -1 (the whole vocabulary) or more")
