"""What `llmc compile` was asked for, with nothing left open that needs no look at the model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.config.executor import check_executor
from llmc.config.human import AUTO
from llmc.config.performance import MODES
from llmc.config.resolve import Resolved
from llmc.errors import ConfigError

DEFAULT_MAX_NUM_SEQS = MODES["balanced"].max_num_seqs
DEFAULT_MAX_NUM_BATCHED_TOKENS = MODES["balanced"].max_num_batched_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileConfig:
    """One compilation. Fields up to `seed` decide the artifact's bytes; the rest says where and how it is made."""

    model: Path
    level: int = 2
    target: str = "cpu"
    backend: str = "inductor"  # or "tvm": what generates code for a CPU
    dtype: str = "auto"  # resolved when the checkpoint is read
    weights: str = "embed"  # "embed" or "external"
    tokenizer: Path | None = None  # None: the model's folder
    max_model_len: int | None = None  # None: the model's own
    max_num_seqs: int = DEFAULT_MAX_NUM_SEQS
    max_num_batched_tokens: int = DEFAULT_MAX_NUM_BATCHED_TOKENS
    block_size: int = 16
    kv_cache_dtype: str = "auto"
    quantization: str | None = None  # "int8", "int4", "fp8"
    quantization_group_size: int | None = None  # inputs that share a scale, a multiple of 32; None: the scheme's own
    calibration: str = "rtn"  # how integers are chosen: "rtn", "awq", "signround"
    calibration_data: Path | None = None  # None: the built-in text
    passes: str = ""  # "+name,-name": added to the level's list, left out of it
    max_kl: float | None = None  # nats per token; more fails the compile
    reasoning_parser: str = ""  # how the model writes reasoning; "": read off the chat template
    tool_call_parser: str | None = None  # and tool calls
    pooling: str | None = None  # "mean", "last", "cls": the artifact embeds; None: it generates
    normalize: bool = True  # an embedding has length 1; says nothing of an artifact that generates
    cudagraph_capture_sizes: tuple[int, ...] | None = None  # sequences of a decode step that gets a plan; CUDA targets
    max_cudagraph_capture_size: int | None = None
    compile_sizes: tuple[int, ...] | None = None  # tokens of the other steps that get one
    tensor_parallel_size: int = 1  # processes of one machine that share each layer
    max_loras: int = 0  # adapters that one step may use; 0: compiled without
    max_lora_rank: int = 16
    lora_dtype: str = "auto"  # of the adapters; "auto" is the model's
    lora_target_modules: tuple[str, ...] | None = None  # ends of module names; None: every linear of the layers
    seed: int = 0
    trial: bool = False  # compiled to be timed and thrown away: no canaries, no cost measured
    out: Path
    report: Path | None = None  # None: OUT.report
    jobs: int = 1
    force: bool = False
    use_cache: bool = True

    def __post_init__(self) -> None:
        if self.level == 0 and self.target.startswith("cuda:"):
            raise ConfigError(
                f"-O0 --target {self.target}: -O0 is the oracle and runs on a CPU; use -O1 or -O2, or --target cpu to compare with"
            )
        if self.passes and self.level == 0:
            raise ConfigError(f"--passes {self.passes}: -O0 runs none, it is the oracle; use -O1 or -O2")
        if self.quantization is not None and self.level == 0:
            raise ConfigError(f"--quantization {self.quantization}: -O0 is the oracle and holds the weights as they are; use -O1 or -O2")
        if self.quantization == "fp8" and self.target.startswith("cpu"):
            raise ConfigError(f"--quantization fp8: only GPUs have kernels over fp8 weights, not {self.target}; int8 has as many bits")
        if self.quantization_group_size is not None and self.quantization not in ("int8", "int4"):
            found = f"--quantization {self.quantization}, with a scale per row" if self.quantization else "no quantisation"
            raise ConfigError(
                f"--quantization-group-size {self.quantization_group_size}: is for --quantization int8 and int4, and this is {found}; "
                "give one of these, or leave it out"
            )
        self._check_calibration()
        if self.max_kl is not None and ((self.quantization is None and self.quantized_kv is None) or self.weights == "external"):
            raise ConfigError(
                "--max-kl bounds what --quantization costs, or --kv-cache-dtype int8 or fp8, measured on embedded weights; "
                "leave it out, or give both"
            )
        if self.quantized_kv == "int8" and not self.target.startswith("cpu"):
            raise ConfigError(
                f"--kv-cache-dtype int8: only CPUs have attention over a cache with a scale per token and head, not {self.target}; "
                "use fp8 or auto"
            )
        if self.quantized_kv is not None and self.embed:
            raise ConfigError(
                f"--kv-cache-dtype {self.kv_cache_dtype}: what it costs an embedding is not measured, so it is not built; use auto"
            )
        if self.embed and (self.reasoning_parser or self.tool_call_parser):
            raise ConfigError(
                "--reasoning-parser and --tool-call-parser say how a model replies, and --task embed has no replies; drop them"
            )
        if self.embed and self.quantization is not None:
            raise ConfigError(
                f"--quantization {self.quantization}: what it costs an embedding is not measured, so it is not built; leave it out"
            )
        if self.embed and not self.target.startswith("cpu"):
            raise ConfigError(f"--task embed: only CPU targets have a program for it, not {self.target}; compile for a CPU")
        if self.max_loras:
            self._check_lora()
        if self.tensor_parallel_size > 1:
            self._check_ranks()
        if self.backend == "tvm":
            self._check_tvm()
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_num_seqs={self.max_num_seqs}: "
                "a step could not give each sequence one token; raise the first or lower the second"
            )

    def _check_calibration(self) -> None:
        """Refuse a calibration of what is not fitted."""
        if self.calibration == "rtn":
            if self.calibration_data is not None:
                raise ConfigError("--calibration-data is what --calibration awq and signround fit to; give one of these, or leave it out")
            return
        if self.quantization != "int4":
            raise ConfigError(
                f"--calibration {self.calibration}: fits integers of 4 bits, for eight lose next to nothing by rounding, and this is "
                f"{f'--quantization {self.quantization}' if self.quantization else 'no quantisation'}; "
                "add --quantization int4, or leave the flag out"
            )
        if self.weights == "external":
            raise ConfigError(
                f"--calibration {self.calibration}: fitted integers belong to one checkpoint, and --weights external binds any; "
                "use --weights embed"
            )

    def _check_ranks(self) -> None:
        """Refuse what is not built for several ranks."""
        named = f"--tensor-parallel-size {self.tensor_parallel_size}"
        if not self.target.startswith("cpu"):
            raise ConfigError(f"{named}: ranks are processes of one machine's CPU, and {self.target} has none; leave it out")
        if self.level not in (1, 2):
            raise ConfigError(f"{named}: is a pass and needs compiled code, and -O3 measures one process alone; use -O1 or -O2")
        for flag, given in (
            ("--quantization", self.quantization is not None),
            ("--kv-cache-dtype of 8 bits", self.quantized_kv is not None),
            ("--task embed", self.embed),
            ("--weights external", self.weights == "external"),
        ):
            if given:
                raise ConfigError(f"{named} with {flag} is not built; leave one of them out")

    def _check_lora(self) -> None:
        """Refuse what is not built together with adapters."""
        if not self.target.startswith("cpu"):
            raise ConfigError(
                f"--enable-lora --target {self.target}: only CPUs have a kernel for the adapters' terms; compile for a CPU, or merge the "
                "adapter into the checkpoint and compile that"
            )
        for flag, given in (
            (f"--tensor-parallel-size {self.tensor_parallel_size}", self.tensor_parallel_size > 1),
            ("--task embed", self.embed),
            ("--backend tvm", self.backend == "tvm"),
        ):
            if given:
                raise ConfigError(
                    f"--enable-lora with {flag} is not built; leave one of them out, or merge the adapter into the checkpoint"
                )

    def _check_tvm(self) -> None:
        """Refuse what is not built for TVM."""
        if not self.target.startswith("cpu"):
            raise ConfigError(f"--backend tvm: compiles for CPUs, not {self.target}; leave one of them out")
        if self.level not in (1, 2):
            raise ConfigError(f"--backend tvm: at -O{self.level} no program of TVM's is built; use -O1 or -O2")
        for flag, given in (
            ("--quantization", self.quantization is not None),
            ("--kv-cache-dtype of 8 bits", self.quantized_kv is not None),
            ("--task embed", self.embed),
            ("--tensor-parallel-size", self.tensor_parallel_size > 1),
        ):
            if given:
                raise ConfigError(f"--backend tvm with {flag} is not built; leave one of them out")

    @property
    def embed(self) -> bool:
        """Whether the artifact embeds; else it generates."""
        return self.pooling is not None

    @property
    def quantized_kv(self) -> str | None:
        """The scheme of a KV cache of eight bits; None where K and V stay in the model's dtype."""
        return self.kv_cache_dtype if self.kv_cache_dtype in ("int8", "fp8") else None

    def key_fields(self) -> dict[str, object]:
        """Every field that decides the artifact's bytes; a new field is included unless it is named here."""
        excluded = {"model", "tokenizer", "out", "report", "jobs", "force", "use_cache", "calibration_data"}  # files enter by content
        if self.calibration != "rtn":
            excluded.remove("jobs")  # the sums that a fit is made of depend on the number of threads
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in excluded}


def compile_config(
    model: Path, out: Path, settings: Resolved, *, force: bool, use_cache: bool, pooling: tuple[str, bool] | None = None
) -> CompileConfig:
    """Build the configuration from resolved settings. `pooling`: for the task embed, its kind and whether vectors are normalised.

    Raises:
        ConfigError: settings that disagree, or one that the target does not take.
    """
    if str(settings["target"]).startswith("cpu"):
        for name in ("cudagraph_capture_sizes", "max_cudagraph_capture_size", "compile_sizes"):
            if settings[name] is not None:
                raise ConfigError(
                    f"--{name.replace('_', '-')}: a {settings['target']} artifact has one program for all sizes and captures nothing; "
                    "leave it out, or compile for a CUDA target"
                )
    check_executor(settings["executor"], target=str(settings["target"]), level=settings["optimization_level"], backend=settings["backend"])
    max_model_len, mode = settings["max_model_len"], MODES[settings["performance_mode"]]
    captured, largest = _sizes(settings["cudagraph_capture_sizes"]), settings["max_cudagraph_capture_size"]
    if captured is None and largest is None and str(settings["target"]).startswith("cuda"):
        max_num_seqs = settings["max_num_seqs"] or mode.max_num_seqs
        captured = tuple(s for s in mode.capture_sizes if s <= max_num_seqs) if mode.capture_sizes else None
        largest = mode.max_capture_size
    return CompileConfig(
        model=model,
        level=settings["optimization_level"],
        target=settings["target"],
        backend=settings["backend"],
        dtype=settings["dtype"],
        weights=settings["weights"],
        tokenizer=Path(settings["tokenizer"]) if settings["tokenizer"] else None,
        max_model_len=None if max_model_len in (None, AUTO) else max_model_len,
        max_num_seqs=settings["max_num_seqs"] or mode.max_num_seqs,
        max_num_batched_tokens=settings["max_num_batched_tokens"] or mode.max_num_batched_tokens,
        block_size=settings["block_size"],
        kv_cache_dtype=settings["kv_cache_dtype"],
        quantization=settings["quantization"],
        quantization_group_size=settings["quantization_group_size"],
        calibration=settings["calibration"],
        calibration_data=Path(settings["calibration_data"]) if settings["calibration_data"] else None,
        passes=settings["passes"],
        max_kl=settings["max_kl"],
        cudagraph_capture_sizes=captured,
        max_cudagraph_capture_size=largest,
        compile_sizes=_sizes(settings["compile_sizes"]),
        tensor_parallel_size=settings["tensor_parallel_size"],
        **_lora(settings),
        reasoning_parser=settings["reasoning_parser"],
        tool_call_parser=settings["tool_call_parser"],
        seed=settings["seed"],
        pooling=pooling[0] if pooling is not None else None,
        normalize=pooling[1] if pooling is not None else True,
        out=out,
        report=Path(settings["report"]) if settings["report"] else None,
        jobs=settings["jobs"] or len(os.sched_getaffinity(0)),
        force=force,
        use_cache=use_cache,
    )


def _lora(settings: Resolved) -> dict[str, Any]:
    """The fields about adapters.

    Raises:
        ConfigError: flags about adapters without --enable-lora.
    """
    given = {name: settings[name] for name in ("max_loras", "max_lora_rank", "lora_dtype", "lora_target_modules")}
    if not settings["enable_lora"]:
        named = [name for name, value in given.items() if value is not None]
        if named:
            raise ConfigError(f"--{named[0].replace('_', '-')} is about LoRA adapters; give --enable-lora too, or leave it out")
        return {}
    targets = given["lora_target_modules"]
    return {
        "max_loras": given["max_loras"] or 1,
        "max_lora_rank": given["max_lora_rank"] or 16,
        "lora_dtype": given["lora_dtype"] or "auto",
        "lora_target_modules": tuple(sorted(set(targets))) if targets else None,
    }


def _sizes(given: list[int] | None) -> tuple[int, ...] | None:
    return None if given is None else tuple(sorted(set(given)))
