"""Every setting of `llmc compile`, `llmc serve` and `llmc run`: one table, read by the command line, the TOML file, the
environment and the documentation. Names, aliases, types and defaults follow vLLM's flags, so that a user's command line carries
over; docs/flags.md lists where llmc differs on purpose.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llmc.config.executor import EXECUTORS
from llmc.config.human import human_int, human_int_or_auto
from llmc.config.performance import MODES
from llmc.errors import ConfigError

COMPILE, SERVE, RUN = "compile", "serve", "run"
ENGINE = frozenset({SERVE, RUN})


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One setting.

    `parse` turns the text of a flag, an environment variable or a TOML string into the value and raises ConfigError.
    A `default` of None means unset: what follows from that is resolved once, by the command, and stated in `help`.
    """

    name: str
    parse: Callable[[str], Any]
    default: Any
    commands: frozenset[str]
    group: str
    help: str
    metavar: str = ""
    aliases: tuple[str, ...] = ()
    is_flag: bool = False
    negatable: bool = False  # has a --no- form
    many: bool = False  # takes one or more values
    secret: bool = False  # never shown
    choices: tuple[str, ...] = field(default=())
    refused: dict[str, str] = field(default_factory=dict)  # value -> why it is not accepted here

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        return "LLMC_" + self.name.upper()


def text(value: str) -> str:
    return value


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """A parser of integers in [low, high]."""

    def parse(value: str) -> int:
        number = human_int(value)
        if number < low or (high is not None and number > high):
            raise ConfigError(f"{value!r} is out of range; accepted: {low} to {high if high is not None else 'any'}")
        return number

    return parse


def group_size(value: str) -> int:
    """A parser of multiples of 32."""
    number = integer(32)(value)
    if number % 32:
        raise ConfigError(f"{value!r} is no multiple of 32; {number - number % 32} and {number - number % 32 + 32} are the nearest")
    return number


def length(value: str) -> int:
    """A positive human-readable integer, or -1 / auto."""
    number = human_int_or_auto(value)
    if number < 1 and number != -1:
        raise ConfigError(f"{value!r} is no length; accepted: a positive integer such as 4096 or 25.6k, -1 or auto")
    return number


def fraction(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ConfigError(f"{value!r} is no number between 0 and 1") from None
    if not 0.0 < number <= 1.0:
        raise ConfigError(f"{value!r} is out of range; accepted: above 0, up to 1")
    return number


def seconds(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ConfigError(f"{value!r} is no number of seconds") from None
    if not 0.0 <= number <= 86400.0:
        raise ConfigError(f"{value!r} is out of range; accepted: 0 to 86400 seconds")
    return number


def divergence(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ConfigError(f"{value!r} is no number of nats") from None
    if not 0.0 <= number < float("inf"):
        raise ConfigError(f"{value!r} is out of range; accepted: 0 or more nats per token")
    return number


def boolean(value: str) -> bool:
    """Environment and TOML strings; flags carry their value in their name."""
    lowered = value.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off"):
        return False
    raise ConfigError(f"{value!r} is no truth value; write true or false")


def int_list(value: str) -> list[int]:
    """Comma-separated integers; kept sorted and unique by who uses them."""
    parts = [part for part in value.replace(" ", ",").split(",") if part]
    if not parts:
        raise ConfigError(f"{value!r} names no size; write for example 1,2,4,8")
    numbers = [human_int(part) for part in parts]
    if min(numbers) < 1:
        raise ConfigError(f"{value!r}: sizes are positive")
    return numbers


def choice(*accepted: str, refused: dict[str, str] | None = None, synonyms: dict[str, str] | None = None) -> Callable[[str], str]:
    """A parser of one word out of `accepted`; words of `refused` are turned away with their reason."""
    reasons, same = refused or {}, synonyms or {}

    def parse(value: str) -> str:
        word = same.get(value, value)
        if word in accepted:
            return word
        if value in reasons:
            raise ConfigError(f"{value!r} is not built: {reasons[value]}; accepted: {', '.join(accepted)}")
        raise ConfigError(f"{value!r} is not known; accepted: {', '.join(accepted)}")

    return parse


def name(value: str) -> str:
    if not value.strip():
        raise ConfigError("an empty name; leave the flag out to use the model's own")
    return value


def word_list(value: str) -> list[str]:
    """A JSON list of texts as vLLM's flags have it, or words with commas between."""
    try:
        words = json.loads(value) if value.lstrip().startswith("[") else [word.strip() for word in value.split(",")]
    except ValueError:
        raise ConfigError(f'{value!r} is no JSON list; write for example ["https://page.example"]') from None
    if not words or not all(isinstance(word, str) and word for word in words):
        raise ConfigError(f'{value!r} names nothing; write for example ["https://page.example"]')
    return list(words)


def json_object(value: str) -> dict[str, Any]:
    try:
        found = json.loads(value)
    except ValueError as error:
        raise ConfigError(f"{value!r} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f'{value!r} is no JSON object; write for example {{"temperature": 0.5}}')
    return found


def block_size(value: str) -> int:
    number = human_int(value)
    if number not in (8, 16, 32, 64, 128):
        raise ConfigError(f"{value!r} is no block size; accepted: 8, 16, 32, 64, 128")
    return number


def _flag(name: str, commands: frozenset[str], group: str, help: str, *, default: bool | None = False, negatable: bool = True) -> Setting:
    return Setting(name=name, parse=boolean, default=default, commands=commands, group=group, help=help, is_flag=True, negatable=negatable)


_COMPILE = frozenset({COMPILE})
_SERVE = frozenset({SERVE})
_BOTH = frozenset({COMPILE, SERVE, RUN})
_AFTER = "log-probabilities are those of the model's own logits, before penalties and masks"
_OTHER_LOGPROBS = {"raw_logits": "logits are not given out", "processed_logits": "logits are not given out", "processed_logprobs": _AFTER}
_OTHER_FORMATS = dict.fromkeys(
    ("pt", "npcache", "dummy", "tensorizer", "gguf", "instanttensor", "runai_streamer", "runai_streamer_sharded", "bitsandbytes",
     "sharded_state", "mistral"),
    "only safetensors are read, since other formats run code or lack checks when they are loaded",
)  # fmt: skip
_QUANTISED_KV = dict.fromkeys(
    ("fp8_e4m3", "fp8_e5m2", "fp8_inc", "fp8_ds_mla", "fp8_per_token_head", "int8_per_token_head"),
    "the quantised KV caches are int8, with a scale per token and head, and fp8, which is e4m3 with scale 1",
)


def pass_choice(value: str) -> str:
    """The value of --passes, its form checked; names are known when the pipeline is built."""
    for entry in value.split(",") if value else ():
        if entry.strip()[:1] not in ("+", "-") or not entry.strip()[1:]:
            raise ConfigError(f"{entry!r} is neither +name nor -name; for example -fuse-silu-mul,+merge-qkv")
    return value


_LORA_RANKS = ("1", "8", "16", "32", "64", "128", "256", "320", "512")


def lora_rank(value: str) -> int:
    """One of the ranks vLLM takes."""
    if value not in _LORA_RANKS:
        raise ConfigError(f"{value!r} is no rank to compile for; accepted: {', '.join(_LORA_RANKS)}, and adapters of any rank up to it")
    return int(value)


def on_command_line_only(value: str) -> str:
    """For a flag that the command line spreads into others before anything is parsed."""
    raise ConfigError("it is read on the command line alone; give the keys' own settings here: optimization_level, compile_sizes, ...")


_CALIBRATED = dict.fromkeys(
    ("awq", "gptq", "gptq_marlin", "gptq_marlin_24", "awq_marlin", "compressed-tensors", "quark", "auto_round", "hqq", "aqlm", "qqq"),
    "GPTQ, AWQ and compressed-tensors checkpoints are taken as they are, without this flag; the others are not read",
)
_OTHER_QUANTIZATIONS = {
    **_CALIBRATED,
    "marlin": "checkpoints in that layout are not read; GPTQ's own is, without this flag",
    **dict.fromkeys(
        ("ptpc_fp8", "fbgemm_fp8", "modelopt", "deepspeedfp"),
        "fp8 weights have a scale per row here, and activations keep 16 bits: say fp8, which GPUs run",
    ),
    **dict.fromkeys(("experts_int8", "moe_wna16"), "experts have no quantised kernel yet"),
    **dict.fromkeys(("gguf", "bitsandbytes"), "only safetensors of unquantised weights are read"),
    **dict.fromkeys(("tpu_int8", "neuron_quant", "ipex"), "it belongs to a device or library that llmc does not use"),
}

_OTHER_CALIBRATIONS = {
    "gptq": "auto-round, which does the fitting, has no GPTQ; signround serves the same end, and GPTQ checkpoints are read as they are",
    "autoround": "say signround",
    "auto-round": "say signround",
    "none": "say rtn",
}

_OTHER_TASKS = {
    "auto": "an artifact's task is part of what is compiled; name it",
    "embedding": "say embed",
    "score": "cross-encoders are not built; an artifact of --task embed answers /v1/score by the cosine of two vectors",
    **dict.fromkeys(("classify", "reward"), "classification and reward heads are not built"),
    "transcription": "this is for text",
}

SETTINGS: tuple[Setting, ...] = (
    # --- what is compiled -------------------------------------------------------------------------------------------------
    Setting(name="optimization_level", aliases=("-O",), parse=integer(0, 3), default=2, commands=_COMPILE, group="Compilation",
            metavar="0..3",
            help="0: the captured graph, the oracle. 1: exact passes, packed weights, compiled. "
                 "2: also inexact fusions: norms with their sums, gated activations. "
                 "3: those that pay, measured on this machine; compiles each fusion with and without."),
    Setting(name="passes", parse=pass_choice, default="", commands=_COMPILE, group="Compilation", metavar="+NAME,-NAME",
            help="Passes to add to the level's list or to leave out; `--explain all` lists them, `--dry-run` shows what they match."),
    Setting(name="compilation_config", aliases=("-cc",), parse=on_command_line_only, default=None, commands=_COMPILE, group="Compilation",
            metavar="JSON",
            help="vLLM's spelling: mode, cudagraph_capture_sizes, max_cudagraph_capture_size and compile_sizes, as JSON or -cc.key=value, "
                 "stand for the flags of that name; every other key is refused by name."),
    Setting(name="target", parse=text, default="cpu", commands=_COMPILE, group="Compilation", metavar="NAME",
            help="cpu (this machine), cpu:x86-64-v3, cpu:x86-64-v4 or cpu:native; `list` shows all targets."),
    Setting(name="backend", parse=choice("inductor", "tvm"), default="inductor", commands=_COMPILE, group="Compilation",
            choices=("inductor", "tvm"), help="What generates code for a CPU; tvm needs the extra of that name, to serve as well."),
    Setting(name="executor", parse=choice(*EXECUTORS), default="auto", commands=_COMPILE, group="Compilation", choices=EXECUTORS,
            help="What runs the program. auto: nodes at -O0, aoti (AOTInductor's code) on a CPU, plan (stored CUDA graphs) on a GPU; "
                 "one that the target does not have is refused with the reason."),
    Setting(name="dtype", parse=choice("auto", "bfloat16", "float16", "float32", synonyms={"half": "float16", "float": "float32"}),
            default="auto", commands=_COMPILE, group="Compilation", choices=("auto", "bfloat16", "float", "float16", "float32", "half"),
            help="Type of weights and activations; auto: the checkpoint's own."),
    Setting(name="weights", parse=choice("embed", "external"), default="embed", commands=_COMPILE, group="Compilation",
            choices=("embed", "external"), help="embed: packed into the artifact. external: bound to a checkpoint when served."),
    Setting(name="load_format",
            parse=choice("auto", "safetensors", refused=_OTHER_FORMATS),
            default="auto", commands=_COMPILE, group="Compilation", choices=("auto", "safetensors"), help="Format of the checkpoint."),
    Setting(name="attention_backend", parse=choice("auto", "llmc"), default=None, commands=_COMPILE, group="Compilation",
            choices=("auto", "llmc"), help="llmc's paged attention is the only one; auto names it."),
    Setting(name="tensor_parallel_size", parse=integer(1, 16), default=1, commands=_COMPILE, group="Compilation", metavar="N",
            aliases=("-tp",), help="Processes of one machine that share every layer: each holds its part of weights and KV cache. CPUs."),
    Setting(name="quantization", aliases=("-q",), parse=choice("int8", "int4", "fp8", refused=_OTHER_QUANTIZATIONS), default=None,
            commands=_COMPILE, group="Compilation", choices=("int8", "int4", "fp8"), refused=_OTHER_QUANTIZATIONS,
            help="Hold the weights of linears as integers with a scale per group of inputs, rounded to nearest; int4 keeps 8 bits in the "
                 "head. fp8: e4m3 with a scale per row, int8 in the head; GPUs alone."),
    Setting(name="quantization_group_size", parse=group_size, default=None, commands=_COMPILE, group="Compilation", metavar="N",
            help="Inputs that share a scale under --quantization int8 and int4, a multiple of 32; as many as a weight has or more: one "
                 "scale per output. Default 128 for int8, 32 for int4."),
    Setting(name="calibration", parse=choice("rtn", "awq", "signround", refused=_OTHER_CALIBRATIONS), default="rtn", commands=_COMPILE,
            group="Compilation", choices=("rtn", "awq", "signround"), refused=_OTHER_CALIBRATIONS,
            help="How --quantization int4 chooses its integers. rtn: rounded to nearest. awq, signround: fitted to a text by auto-round "
                 "(extra calibrate), minutes to hours for a smaller loss."),
    Setting(name="calibration_data", parse=text, default=None, commands=_COMPILE, group="Compilation", metavar="FILE",
            help="Text that --calibration fits to: .jsonl with a \"text\" per line, or plain text; default a built-in one."),
    Setting(name="max_kl", parse=divergence, default=None, commands=_COMPILE, group="Compilation", metavar="NATS",
            help="Fail the compile if quantisation moves the model's distribution by more: mean KL divergence on a calibration text."),
    Setting(name="task", parse=choice("generate", "embed", refused=_OTHER_TASKS), default="generate", commands=_COMPILE,
            group="Compilation", choices=("generate", "embed"), refused=_OTHER_TASKS,
            help="What the artifact is for: text, or a vector per text, which serve gives under /v1/embeddings, /v1/score, /v1/rerank."),
    Setting(name="pooling", parse=choice("auto", "mean", "last", "cls"), default="auto", commands=_COMPILE, group="Compilation",
            choices=("auto", "mean", "last", "cls"),
            help="With --task embed, which hidden states make the vector; auto: as the folder's modules.json says, else last."),
    Setting(name="normalize", parse=choice("auto", "yes", "no"), default="auto", commands=_COMPILE, group="Compilation",
            choices=("auto", "yes", "no"),
            help="With --task embed, vectors of length 1; auto: as the folder's modules.json says, else yes."),
    Setting(name="tokenizer", parse=text, default=None, commands=_COMPILE, group="Compilation", metavar="DIR",
            help="Folder with tokenizer.json, when it is not the model's."),
    Setting(name="jobs", parse=integer(1, 256), default=None, commands=_COMPILE, group="Compilation", metavar="N",
            help="C++ compilations at once; default: the processors this process may use."),
    Setting(name="report", parse=text, default=None, commands=_COMPILE, group="Compilation", metavar="DIR",
            help="Where measured times go; default: OUT.report beside the artifact."),
    # --- limits -----------------------------------------------------------------------------------------------------------
    Setting(name="max_model_len", parse=length, default=None, commands=_BOTH, group="Limits", metavar="N|25.6k|auto",
            help="Prompt and output tokens of one sequence. Compile: default the model's own. Serve: not above the artifact's."),
    Setting(name="max_num_seqs", parse=integer(1, 65536), default=None, commands=_BOTH, group="Limits", metavar="N",
            help="Sequences in one step; default 256 at compile, the artifact's at serve."),
    Setting(name="max_num_batched_tokens", parse=integer(1), default=None, commands=_BOTH, group="Limits", metavar="N",
            help="Tokens in one step; default 2048 at compile, the artifact's at serve."),
    # --- sizes ------------------------------------------------------------------------------------------------------------
    Setting(name="cudagraph_capture_sizes", parse=int_list, default=None, commands=_COMPILE, group="Sizes", metavar="N,N,...", many=True,
            help="Decode batches that a CUDA artifact gets a graph for. A CPU artifact has one program for all sizes and refuses it."),
    Setting(name="max_cudagraph_capture_size", parse=integer(1), default=None, commands=_COMPILE, group="Sizes", metavar="N",
            help="Largest of the inferred capture sizes; CUDA targets only."),
    Setting(name="compile_sizes", parse=int_list, default=None, commands=_COMPILE, group="Sizes", metavar="N,N,...", many=True,
            help="Prefill token buckets of a CUDA artifact; CUDA targets only."),
    Setting(name="performance_mode",
            parse=choice(*MODES), default="balanced", commands=_COMPILE, group="Sizes", choices=tuple(MODES),
            help="Limits and sizes taken where none are given. balanced: 256 sequences, steps of 2048 tokens. interactivity: 32 and 512, "
                 "on a GPU a plan for every batch. throughput: 512 and 8192."),
    # --- KV cache ---------------------------------------------------------------------------------------------------------
    Setting(name="block_size", parse=block_size, default=16, commands=_COMPILE, group="KV cache", metavar="N",
            help="Tokens per KV block: 8, 16, 32, 64 or 128."),
    Setting(name="kv_cache_dtype",
            parse=choice("auto", "bfloat16", "float16", "int8", "fp8", refused=_QUANTISED_KV),
            default="auto", commands=_COMPILE, group="KV cache", choices=("auto", "bfloat16", "float16", "int8", "fp8"),
            help="Type of the stored KV cache; auto: the model's. int8 (a scale per token and head, CPUs alone) and fp8 (e4m3), their cost "
                 "measured as --quantization's; other types than the model's are refused."),
    Setting(name="kv_cache_memory_bytes", parse=integer(1), default=None, commands=ENGINE, group="KV cache", metavar="BYTES",
            help="Size of the KV cache; default: what max-num-seqs sequences can use, within the free memory."),
    Setting(name="num_gpu_blocks_override", parse=integer(2), default=None, commands=ENGINE, group="KV cache", metavar="N",
            help="Number of KV blocks, whatever the memory; for tests of preemption."),
    Setting(name="gpu_memory_utilization", parse=fraction, default=0.9, commands=ENGINE, group="KV cache", metavar="0..1",
            help="Share of the free memory that weights and KV cache may take (on a CPU: of the machine's memory)."),
    _flag("enable_prefix_caching", ENGINE, "KV cache", "Reuse KV blocks of shared prefixes; on by default.", default=True),
    # --- scheduler --------------------------------------------------------------------------------------------------------
    Setting(name="scheduling_policy", parse=choice("fcfs", "priority"), default="fcfs", commands=ENGINE, group="Scheduler",
            choices=("fcfs", "priority"), help="fcfs: by arrival. priority: lower values first, ties by arrival."),
    _flag("enable_chunked_prefill", ENGINE, "Scheduler", "Split prompts over steps; on by default.", default=True),
    Setting(name="max_num_partial_prefills", parse=integer(1, 65536), default=1, commands=ENGINE, group="Scheduler", metavar="N",
            help="Prompts that may stand half computed at the same time."),
    Setting(name="long_prefill_token_threshold", parse=integer(0), default=0, commands=ENGINE, group="Scheduler", metavar="N",
            help="Most tokens of one prompt computed in one step, so that short prompts get past long ones; 0: the whole budget."),
    Setting(name="stream_interval", parse=integer(1, 65536), default=1, commands=_SERVE, group="Scheduler", metavar="N",
            help="Tokens sent together after a sequence's first, which costs the host less; with stop strings, one by one as always."),
    Setting(name="max_queue", parse=integer(1), default=1024, commands=_SERVE, group="Scheduler", metavar="N",
            help="Sequences that may wait; one more is answered with 429."),
    # --- engine -----------------------------------------------------------------------------------------------------------
    Setting(name="seed", parse=integer(0), default=0, commands=_BOTH, group="Engine", metavar="N",
            help="Seed of compile-time choices; requests without a seed draw their own."),
    Setting(name="threads", parse=integer(1, 1024), default=None, commands=ENGINE, group="Engine", metavar="N",
            help="Threads of a step; default: the processors this process may use."),
    Setting(name="speculative_config", aliases=("-sc",), parse=json_object, default=None, commands=ENGINE, group="Engine", metavar="JSON",
            help='Speculative decoding: {"method": "ngram", "num_speculative_tokens": N} by prompt lookup; {"method": "draft_model", '
                 '"model": DIR, "num_speculative_tokens": N} by a smaller artifact.'),
    Setting(name="max_logprobs", parse=integer(-1), default=20, commands=ENGINE, group="Engine", metavar="N",
            help="Most log-probabilities a request may ask for per token; -1: as many as the vocabulary has."),
    Setting(name="generation_config", parse=choice("auto", "vllm", "llmc"), default="auto", commands=ENGINE, group="Engine",
            choices=("auto", "vllm", "llmc"), help="Default sampling: auto: the model's, from the artifact. vllm, llmc: none."),
    Setting(name="override_generation_config", parse=json_object, default=None, commands=_SERVE, group="Engine", metavar="JSON",
            help='Sampling defaults beside or instead of the model\'s own, as in {"temperature": 0.5}; checked like a request.'),
    Setting(name="logprobs_mode", parse=choice("raw_logprobs", refused=_OTHER_LOGPROBS), default="raw_logprobs", commands=_SERVE,
            group="Engine", choices=("raw_logprobs",), refused=_OTHER_LOGPROBS, help="What logprobs are: of the model's logits."),
    Setting(name="verify_weights", parse=choice("always", "once", "never"), default="always", commands=ENGINE, group="Engine",
            choices=("always", "once", "never"), help="Hash the weights at each start, once per file, or not."),
    _flag("early_start", ENGINE, "Engine",
          "On a CPU, answer from the files' pages, verified, while weights of 256 MiB and more are copied into huge pages; on by default.",
          default=True),
    _flag("weights_mmap", ENGINE, "Engine", "Map the weights instead of copying them into huge pages: less memory, slower."),
    _flag("canary", ENGINE, "Engine", "Run the stored prompts before the engine says that it is ready; on by default.", default=True),
    _flag("require_signature", ENGINE, "Engine", "Refuse an artifact that is not signed by a key of --trust."),
    Setting(name="trust", parse=text, default=None, commands=ENGINE, group="Engine", metavar="PUBLIC_KEY",
            help="Public key (PEM) that must have signed the artifact."),
    Setting(name="checkpoint", parse=text, default=None, commands=ENGINE, group="Engine", metavar="DIR",
            help="Checkpoint to bind, for an artifact compiled with --weights external."),
    # --- LoRA -------------------------------------------------------------------------------------------------------------
    _flag("enable_lora", frozenset({COMPILE, SERVE}), "LoRA",
          "Compile with room for LoRA adapters; serve them. CPUs; docs/lora.md."),
    Setting(name="max_loras", parse=integer(1, 256), default=None, commands=frozenset({COMPILE, SERVE}), group="LoRA", metavar="N",
            help="Adapters that one step may use; default: 1 to compile, the compiled number to serve. Requests of others wait."),
    Setting(name="max_lora_rank", parse=lora_rank, default=None, commands=_COMPILE, group="LoRA", metavar="N", choices=_LORA_RANKS,
            help="Largest rank of an adapter, default 16; smaller ones take as much room."),
    Setting(name="lora_dtype", parse=choice("auto", "bfloat16", "float16", "float32"), default=None, commands=_COMPILE, group="LoRA",
            choices=("auto", "bfloat16", "float16", "float32"), help="Type that adapters are kept in; default auto, the model's."),
    Setting(name="lora_target_modules", parse=text, default=None, commands=_COMPILE, group="LoRA", metavar="NAME", many=True,
            help="Ends of the names of modules that adapters may change; default: every linear of the layers."),
    Setting(name="lora_modules", parse=text, default=None, commands=_SERVE, group="LoRA", metavar="NAME=DIR|JSON", many=True,
            help="PEFT adapters to serve: clients choose one by its name in `model`."),
    Setting(name="max_cpu_loras", parse=integer(1, 1024), default=None, commands=_SERVE, group="LoRA", metavar="N",
            help="Adapters kept in memory, the others are read again when needed; default: all."),
    Setting(name="allow_runtime_lora_updating", parse=text, default=None, commands=_SERVE, group="LoRA", metavar="DIR", many=True,
            help="Folders from which POST /v1/load_lora_adapter may take adapters; default: the path does not exist."),
    # --- front ------------------------------------------------------------------------------------------------------------
    Setting(name="host", parse=text, default=None, commands=_SERVE, group="Server", metavar="NAME",
            help="Address to listen on; default 127.0.0.1, loopback only."),
    Setting(name="port", parse=integer(0, 65535), default=8000, commands=_SERVE, group="Server", metavar="N",
            help="Port to listen on; 0: a free one, printed."),
    Setting(name="replicas", parse=integer(1, 64), default=1, commands=_SERVE, group="Server", metavar="N",
            help="Servers of the same artifact behind this address, each with its share of processors and memory; see --engine."),
    Setting(name="engine", parse=choice("process", "ray"), default="process", commands=_SERVE, group="Server",
            choices=("process", "ray"), help="Where --replicas run: processes of this machine, or Ray Serve (extra ray)."),
    Setting(name="uds", parse=text, default=None, commands=_SERVE, group="Server", metavar="PATH",
            help="Listen on a Unix socket that this user alone may use, instead of --host and --port."),
    Setting(name="root_path", parse=text, default="", commands=_SERVE, group="Server", metavar="/PREFIX",
            help="Path that a proxy in front adds to every request."),
    Setting(name="api_key", parse=text, default=None, commands=_SERVE, group="Server", metavar="KEY", many=True, secret=True,
            help="Key that clients must send as a bearer token; several may be given."),
    Setting(name="served_model_name", parse=name, default=None, commands=_SERVE, group="Server", metavar="NAME", many=True,
            help="Names the API answers to, the first in responses; default: the model's name."),
    Setting(name="chat_template", parse=text, default=None, commands=_SERVE, group="Server", metavar="FILE|TEMPLATE",
            help="The operator's own chat template; default: the artifact's. A request cannot bring one."),
    Setting(name="reasoning_parser",
            parse=choice("", "deepseek_r1", "glm45", "mistral", "none", "openai_gptoss", "qwen3"),
            default="", commands=_COMPILE | _SERVE, group="Server", metavar="NAME",
            choices=("deepseek_r1", "glm45", "mistral", "none", "openai_gptoss", "qwen3"),
            help="How the model writes its reasoning, which answers then give apart; default: as the artifact was compiled with, and there "
                 "read off the chat template, where certain."),
    Setting(name="tool_call_parser",
            parse=choice("hermes", "llama3_json", "mistral", "none", "openai"),
            default=None, commands=_COMPILE | _SERVE, group="Server", metavar="NAME",
            choices=("hermes", "llama3_json", "mistral", "none", "openai"),
            help="How the model writes tool calls; default: as the artifact was compiled with, and there read off the chat template, "
                 "where certain."),
    _flag("enable_auto_tool_choice", _SERVE, "Server",
          "Refuse to start when it is not known how the model writes tool calls; tools are taken whenever it is.", negatable=False),
    _flag("enable_tokenizer_info_endpoint", _SERVE, "Server", "GET /tokenizer_info: special tokens, added tokens and the chat template.",
          negatable=False),
    _flag("enable_sleep_mode", _SERVE, "Server",
          "POST /sleep ends the engine and frees its memory, POST /wake_up starts it again, GET /is_sleeping tells."),
    Setting(name="allow_weights", parse=text, default=None, commands=_SERVE, group="Server", metavar="DIR", many=True,
            help="Folders from which POST /v1/weights may take another artifact of the same model; with --uds alone."),
    Setting(name="shutdown_timeout", parse=seconds, default=30.0, commands=_SERVE, group="Server", metavar="SECONDS",
            help="How long running requests may finish after SIGTERM."),
    Setting(name="renderer_num_workers", parse=integer(1, 64), default=2, commands=_SERVE, group="Server", metavar="N",
            help="Threads that tokenize long prompts; short ones need none."),
    Setting(name="allowed_origins", parse=word_list, default=None, commands=_SERVE, group="Cross-origin", metavar="JSON",
            help='Origins of web pages that may use this server, as ["https://page.example"] or ["*"]; default: none.'),
    Setting(name="allowed_methods", parse=word_list, default=["*"], commands=_SERVE, group="Cross-origin", metavar="JSON",
            help="Methods such a page may use."),
    Setting(name="allowed_headers", parse=word_list, default=["*"], commands=_SERVE, group="Cross-origin", metavar="JSON",
            help="Headers such a page may send."),
    _flag("allow_credentials", _SERVE, "Cross-origin", "Let such a page send cookies and the like.", negatable=False),
    Setting(name="ssl_certfile", parse=text, default=None, commands=_SERVE, group="TLS", metavar="FILE",
            help="Certificate (PEM) of the server; with it, it speaks HTTPS alone."),
    Setting(name="ssl_keyfile", parse=text, default=None, commands=_SERVE, group="TLS", metavar="FILE",
            help="Private key (PEM), when it is not in the certificate's file."),
    Setting(name="ssl_ca_certs", parse=text, default=None, commands=_SERVE, group="TLS", metavar="FILE",
            help="Authorities (PEM) that sign the clients' certificates."),
    Setting(name="ssl_cert_reqs", parse=integer(0, 2), default=0, commands=_SERVE, group="TLS", metavar="0|1|2",
            help="Certificates of clients: 0 not asked for, 1 checked if sent, 2 required."),
    Setting(name="otlp_traces_endpoint", parse=text, default=None, commands=_SERVE, group="Observability", metavar="URL",
            help="Send a span per request to an OpenTelemetry collector by OTLP over HTTP; needs the extra otel."),
    Setting(name="trace_startup", parse=text, default=None, commands=_SERVE, group="Observability", metavar="FILE",
            help="Write the stages of both processes' start as a trace for Perfetto."),
    _flag("disable_fastapi_docs", _SERVE, "Observability", "No /openapi.json, and no page at /.", negatable=False),
    _flag("disable_uvicorn_access_log", _SERVE, "Observability", "No log line per request.", negatable=False),
    _flag("fail_on_environ_validation", _BOTH, "Observability",
          "Refuse to start when an LLMC_ variable of the environment is no setting, instead of saying so."),
    _flag("disable_log_stats", _SERVE, "Server", "No periodic line of engine statistics.", negatable=False),
    Setting(name="log_level", parse=choice("debug", "info", "warning", "error"), default="info", commands=_SERVE, group="Server",
            choices=("debug", "info", "warning", "error"), help="Least severe messages that are logged."),
)  # fmt: skip

BY_NAME = {setting.name: setting for setting in SETTINGS}


def for_command(command: str) -> list[Setting]:
    """The settings of one command, in the table's order."""
    return [setting for setting in SETTINGS if command in setting.commands]
