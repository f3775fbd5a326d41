"""What `serve` is told. The command line builds it; nothing below reads a flag or the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from llmc.errors import ConfigError
from llmc.runtime.engine_spawn import DEFAULT_COMMAND

LogLevel = Literal["debug", "info", "warning", "error"]


# Sampling defaults an operator may set: name -> least, most. Requests are held to the same.
_SAMPLING: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 1e6),
    "top_p": (1e-9, 1.0),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-9, 1e3),
    "max_new_tokens": (1, 1 << 30),
}


def _check_sampling(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if name not in _SAMPLING:
            raise ConfigError(f"override_generation_config: {name} is no sampling default; accepted: {', '.join(_SAMPLING)}")
        low, high = _SAMPLING[name]
        whole = name in ("top_k", "max_new_tokens")
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not low <= value <= high:
            kind = "an integer" if whole else "a number"
            raise ConfigError(f"override_generation_config: {name} is {value!r}, expected {kind} from {low:g} to {high:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Settings of the front process. `engine` goes to the engine process as it is."""

    artifact: str  # folder of the artifact
    engine: dict[str, Any]  # fields of runtime.engine.EngineConfig, plain JSON values
    override_generation_config: dict[str, Any] = field(default_factory=dict)  # sampling defaults instead of the model's
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
    allow_runtime_lora_updating: tuple[
        str, ...
    ] = ()  # folders from which POST /v1/load_lora_adapter may take an adapter; empty: no such path
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
    renderer_num_workers: int = 2  # threads for tokenizing long texts
    otlp_traces_endpoint: str | None = None  # URL of an OpenTelemetry collector; needs the extra otel
    trace_startup: str | None = None  # file for a trace of the start
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None  # given: HTTPS
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = 0  # as in Python's ssl module: 0 none, 1 optional, 2 required
    allow_weights: tuple[str, ...] = ()  # folders from which POST /v1/weights may take an artifact; needs uds
    enable_sleep_mode: bool = False  # POST /sleep and /wake_up
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
        for name in ("max_body_bytes", "max_queue", "max_sequences_per_request", "stream_interval", "renderer_num_workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("header_timeout_s", "body_timeout_s", "keep_alive_timeout_s", "stall_timeout_s", "hang_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be more than 0")
        if self.allow_weights and self.uds is None:
            raise ConfigError("allow_weights lets a client choose code to run; it needs uds, a Unix socket this user alone may use")
        for folder in self.allow_weights:
            if not os.path.isdir(folder):
                raise ConfigError(f"allow_weights: {folder} is no folder")
        for folder in self.allow_runtime_lora_updating:
            if not os.path.isdir(folder):
                raise ConfigError(f"--allow-runtime-lora-updating: {folder} is no folder")
        if self.allow_runtime_lora_updating and not self.engine.get("enable_lora"):
            raise ConfigError("--allow-runtime-lora-updating is about LoRA adapters; give --enable-lora too, or leave it out")
        _check_sampling(self.override_generation_config)
        if any(not name.strip() for name in self.served_model_names):
            raise ConfigError("a served model name is empty; leave --served-model-name out to use the model's own")
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs or self.ssl_cert_reqs):
            raise ConfigError("ssl_keyfile, ssl_ca_certs and ssl_cert_reqs need ssl_certfile, the server's own certificate")
        if self.ssl_cert_reqs not in (0, 1, 2):
            raise ConfigError(f"ssl_cert_reqs={self.ssl_cert_reqs}; accepted: 0 (none), 1 (optional), 2 (required)")
        if self.ssl_cert_reqs and self.ssl_ca_certs is None:
            raise ConfigError("ssl_cert_reqs asks clients for certificates; name the authority that signed them with ssl_ca_certs")
        if self.trace_startup is not None and not os.access(os.path.dirname(os.path.abspath(self.trace_startup)), os.W_OK):
            raise ConfigError(f"trace_startup={self.trace_startup}: its folder does not exist or cannot be written")
        if self.shutdown_timeout_s < 0:
            raise ConfigError(f"shutdown_timeout_s={self.shutdown_timeout_s} must not be negative")
        if self.max_logprobs < -1:
            raise ConfigError(f"max_logprobs={self.max_logprobs} must be -1 (the whole vocabulary) or more")
