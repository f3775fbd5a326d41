"""Make an artifact's parts: everything of a compile that needs torch.

ModelSource -> TracedModel -> (passes) -> LoweredModel -> files and manifest
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from llmc.artifacts.manifest import (
    Canary,
    Entry,
    Limits,
    Manifest,
    ModelFacts,
    PassRecord,
    PoolingFacts,
    TensorRecord,
    WeightFile,
)
from llmc.artifacts.stamps import cache_root
from llmc.artifacts.store import Store
from llmc.artifacts.version import FORMAT_VERSION
from llmc.artifacts.writer import ArtifactWriter
from llmc.compiler import canary, packing, report
from llmc.compiler.calibration import fitted
from llmc.compiler.canary import FetchConstant
from llmc.compiler.capture import TracedModel, capture
from llmc.compiler.cuda.build import check_sizes, cuda_program
from llmc.compiler.image import only_libtorch_has
from llmc.compiler.input_key import toolchain
from llmc.compiler.lora import lora_facts, lora_pass, with_adapters
from llmc.compiler.lowered_cache import lower
from llmc.compiler.model import ModelSource, open_checkpoint, read_model
from llmc.compiler.nodes import constants_of, to_bytes
from llmc.compiler.pipeline import STORED, pipeline
from llmc.compiler.program import Program, built_kernels
from llmc.compiler.quantized_weights import Quantized, quantized_weights
from llmc.compiler.ranks import divided, rank_entries
from llmc.compiler.stages import Stage, StageLog
from llmc.compiler.target_facts import implementations, requirements, target_record
from llmc.compiler.targets import Target
from llmc.compiler.tokenizer_files import TextSide, TokenizerBundle, generation_defaults, read_tokenizer
from llmc.compiler.tvm.program import check_convertible, tvm_program
from llmc.config.compile import CompileConfig
from llmc.config.human import human_bytes
from llmc.errors import ConfigError
from llmc.kernels.build import BuiltKernels, build_kernels
from llmc.kernels.cuda_targets import CudaTarget
from llmc.kernels.isa import TargetSpec
from llmc.passes.base import PassContext
from llmc.passes.runner import PassReport, dump_directory, run_passes
from llmc.passes.weights import WeightTable

NODES_PATH = "programs/step.json"
_QUANTIZED_KV = {"int8": "int8", "fp8": "uint8"}  # the scheme -> KVFacts.dtype


@dataclass(frozen=True, kw_only=True)
class BuiltArtifact:
    """Everything but the artifact's name."""

    manifest: Manifest
    report: dict[str, Any]
    measured_folder: Path

    def write_measured(self, stages: list[Stage], out: Path, startup_ms: Mapping[str, float]) -> None:
        """Write the report with this compile's times beside the artifact published at `out`.

        Args:
            startup_ms: of the canary run, by stage; empty where there was none.
        """
        files = {path.relative_to(out).as_posix(): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
        measured = report.measured_facts(stages, files=files, toolchain=self.manifest.toolchain, startup_ms=startup_ms)
        report.write_measured(self.measured_folder, self.report, measured)


def build_artifact(
    config: CompileConfig,
    target: Target,
    writer: ArtifactWriter,
    scratch: Path,
    *,
    log: StageLog,
    text: TextSide | None,
    store: Store | None,
) -> BuiltArtifact:
    """Put every file of the artifact into `writer` and make its manifest.

    Args:
        scratch: an empty folder for intermediate files.

    Raises:
        ConfigError, UnsupportedModel: the request or the model.
        PassError, InternalError: a fault of llmc.
    """
    torch.set_num_threads(config.jobs)
    if isinstance(target, CudaTarget):
        check_sizes(config)
    with ThreadPoolExecutor(1) as background:
        kernels = _start_kernels(background, target, config)
        with log.stage("read") as note:
            source = read_model(config.model, dtype=config.dtype, embed=config.embed)
            kv_dtype = cache_dtype(config, source)
            note.detail = f"{source.architecture}, {source.dtype}, {len(source.tensors)} tensors"
        limits = compile_limits(config, source)
        tokenizer = read_tokenizer(
            config.tokenizer or config.model,
            eos_token_ids=source.eos_token_ids,
            bos_token_id=source.bos_token_id,
            pad_token_id=source.pad_token_id,
            text=text,
        )
        calibrated = fitted(config, source, tokenizer.encode, limits.max_model_len, scratch, log)
        given, source = source, source if calibrated is None else calibrated.source
        with log.stage("capture") as note:
            traced = capture(
                source, block_size=config.block_size, kv_dtype=kv_dtype, max_model_len=limits.max_model_len, hidden=config.embed
            )
            note.detail = f"{len(traced.graph.graph.nodes)} nodes"
        with open_checkpoint(source) as checkpoint:
            captured = traced.untouched()  # the passes change the graph in place, and the reference runs it as it was
            graph, weights, ranks = traced.graph, traced.weight_table(), config.tensor_parallel_size
            if ranks > 1 and source.stored is not None:
                raise ConfigError(f"--tensor-parallel-size {ranks}: {source.name} is quantised already, which is not built; leave it out")
            with log.stage("passes") as note:
                context = PassContext(weights=weights, max_positions=limits.max_model_len)
                quantized = applied_quantization(config, given, target.kind)
                lora = lora_pass(config, traced, source.dtype)
                group = config.quantization_group_size
                passes = pipeline(
                    config.level, quantized, group=group, kind=target.kind, passes=config.passes, ranks=ranks, lora=lora,
                    backend=config.backend,
                )  # fmt: skip
                reports = run_passes(graph, passes, context, dump_dir=dump_directory())
                if config.backend == "tvm":
                    check_convertible(graph)
                traced = divided(traced, ranks, reports) if ranks > 1 else traced
                traced = with_adapters(traced, lora) if lora is not None else traced
                matches = sum(r.result.matches for r in reports)
                note.detail = f"{len(graph.graph.nodes)} nodes, {matches} rewrites by {sum(r.result.changed for r in reports)} passes"
            held = quantized_weights(config, given, captured, weights, checkpoint, tokenizer, scratch, log, calibrated)
            canaries = _canaries(config, source, captured, held.fetch, tokenizer, log)
            if isinstance(target, CudaTarget):
                program = cuda_program(config, target, traced, weights, writer, scratch, log, store)
            else:
                assert kernels is not None
                program = _program(config, target, traced, weights, kernels, writer, scratch, log, store)
            with log.stage("pack") as note:
                if ranks > 1:
                    files, tensors, called = packing.pack_ranks(writer, packing.order_of_use(graph), weights, checkpoint, ranks)
                    entries = rank_entries(program.entry, called)
                else:
                    files, tensors = packing.pack(writer, packing.order_of_use(graph), weights, checkpoint, embed=config.weights == "embed")
                    entries = [program.entry]
                note.detail = human_bytes(sum(f.size_bytes for f in files))
    for path, data in tokenizer.files.items():
        writer.add_file(path, data)
    manifest = _manifest(config, target, source, traced, limits, program, files, tensors, reports, tokenizer, canaries, held)
    manifest = msgspec.structs.replace(
        manifest, entries=entries, tensor_parallel_size=ranks, lora=lora_facts(lora) if lora is not None else None
    )
    facts = report.facts(manifest, ops=_ops(graph), extern_calls=sorted(program.calls), captured=captured.graph, lowered=graph)
    facts["predicted"] = {r.applied.name: {"launches_saved": r.result.launches_saved, "bytes_saved": r.result.bytes_saved} for r in reports}
    if program.gpu is not None:
        facts["gpu"] = program.gpu
    for path, data in report.report_files(facts).items():
        writer.add_file(path, data)
    folder = config.report or config.out.with_name(config.out.name + ".report")
    return BuiltArtifact(manifest=manifest, report=facts, measured_folder=folder)


def _start_kernels(background: ThreadPoolExecutor, target: Target, config: CompileConfig) -> Future[BuiltKernels] | None:
    """The C++ kernels, compiled while the model is read and captured; a GPU has none."""
    if isinstance(target, CudaTarget):
        return None
    return background.submit(build_kernels, target.isa, cache_root() / "kernels", config.jobs)


def applied_quantization(config: CompileConfig, source: ModelSource, kind: str) -> str | None:
    """What `pipeline` is asked for: the checkpoint's own quantisation where it has one and the kind of target has kernels for it.

    -O0 takes its dequantised weights, so do GPUs but for fp8, and CPUs of fp8.

    Raises:
        ConfigError: --quantization of a quantised checkpoint.
    """
    if source.stored is None:
        return config.quantization
    if config.quantization is not None:
        raise ConfigError(
            f"--quantization {config.quantization}: {source.name} is quantised already, by {source.stored.method}; leave the flag out, "
            "or compile the unquantised checkpoint"
        )
    return STORED if config.level > 0 and (kind == "cuda") is (source.stored.form == "fp8_rows") else None


def cache_dtype(config: CompileConfig, source: ModelSource) -> str:
    """The KV cache's type, as `KVFacts.dtype`.

    Raises:
        ConfigError: a float type that is not the model's.
    """
    if config.quantized_kv is not None:
        return _QUANTIZED_KV[config.quantized_kv]
    if config.kv_cache_dtype not in ("auto", source.dtype):
        raise ConfigError(
            f"--kv-cache-dtype {config.kv_cache_dtype}: K and V are kept in the model's dtype, {source.dtype}, or in 8 bits; "
            "use auto, int8 or fp8"
        )
    return source.dtype


def compile_limits(config: CompileConfig, source: ModelSource) -> Limits:
    """What the artifact is compiled for.

    Raises:
        ConfigError: longer sequences than the model has positions.
    """
    longest = source.max_position_embeddings
    wanted = config.max_model_len or longest
    if wanted > longest:
        raise ConfigError(f"--max-model-len {wanted} is above the {longest} positions that {source.name} knows; lower it")
    return Limits(max_model_len=wanted, max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens)


def _program(
    config: CompileConfig,
    target: TargetSpec,
    traced: TracedModel,
    weights: WeightTable,
    kernels: Future[BuiltKernels],
    writer: ArtifactWriter,
    scratch: Path,
    log: StageLog,
    store: Store | None,
) -> Program:
    graph, inputs, outputs = traced.graph, list(traced.inputs), list(traced.outputs)
    if config.backend == "tvm":
        return tvm_program(target, traced, weights, kernels, writer, scratch, log, store)
    if config.level == 0:
        built = built_kernels(kernels, target, log)
        writer.add_file(NODES_PATH, to_bytes(graph))
        entry = Entry(name="step", executor="nodes", program=NODES_PATH, inputs=inputs, outputs=outputs, constants=constants_of(graph))
        return Program(entry=entry, images=[writer.add_image(built.kernels_so, "kernels")], calls={})
    with log.stage("lower") as note:
        lowered = lower(graph, weights, target, scratch, jobs=config.jobs, store=store)
        note.detail = lowered.detail
    built = built_kernels(kernels, target, log)
    model = writer.add_image(lowered.path, "model")
    from_torch = only_libtorch_has(lowered.path)
    tensors = writer.add_image(built.shim_so, "aoti_shim") if from_torch else writer.add_image(built.tensor_runtime_so, "tensor_runtime")
    images = [writer.add_image(built.kernels_so, "kernels"), tensors, model]
    entry = Entry(name="step", executor="aoti", program=model.path, inputs=inputs, outputs=outputs, constants=dict(lowered.constants))
    return Program(entry=entry, images=images, calls=dict(lowered.calls), from_torch=tuple(from_torch))


def _canaries(
    config: CompileConfig, source: ModelSource, captured: TracedModel, fetch: FetchConstant, tokenizer: TokenizerBundle, log: StageLog
) -> list[Canary]:
    if config.embed and source.hidden_size > source.vocab_size:
        return []  # the largest hidden state stands for a token below, and is not always one
    if config.trial:
        return []
    if config.weights == "external":
        return []  # whatever checkpoint is bound later answers differently
    with log.stage("reference") as note:
        prompts = canary.prompts(source.vocab_size, tokenizer.encode)
        made = canary.make_canaries(captured, fetch, prompts, canary.TOLERANCE[source.dtype])
        counts = canary.checked_positions(made)
        among = f" ({counts['among_close']} among others as close)" if counts["among_close"] else ""
        note.detail = f"{len(made)} prompts, {counts['compared']} tokens to compare{among}, {counts['too_close']} too close to call"
    return made


def _ops(graph: torch.fx.GraphModule) -> Counter[str]:
    calls = (node.target for node in graph.graph.nodes if node.op == "call_function")
    return Counter(str(target) if isinstance(target, torch._ops.OpOverload) else target.__name__ for target in calls)


def _manifest(
    config: CompileConfig,
    target: Target,
    source: ModelSource,
    traced: TracedModel,
    limits: Limits,
    program: Program,
    files: list[WeightFile],
    tensors: list[TensorRecord],
    reports: list[PassReport],
    tokenizer: TokenizerBundle,
    canaries: list[Canary],
    held: Quantized,
) -> Manifest:
    versions = dict(toolchain(target, config.backend))
    return Manifest(
        format_version=FORMAT_VERSION,
        manifest_sha256="",
        llmc_version=versions["llmc"],
        model=ModelFacts(
            name=source.name,
            architecture=source.architecture,
            model_type=source.model_type,
            dtype=source.dtype,  # type: ignore[arg-type]
            num_layers=source.num_layers,
            hidden_size=source.hidden_size,
            vocab_size=source.vocab_size,
            max_position_embeddings=source.max_position_embeddings,
            num_parameters=traced.num_parameters,
        ),
        target=target_record(target),
        requirements=requirements(
            target, uses_torch=bool(program.from_torch), tvm=versions.get("apache-tvm"), shared_bytes=_shared_bytes(program)
        ),
        level=config.level,
        limits=limits,
        kv=traced.kv,
        entries=[program.entry],
        images=program.images,
        weights=files,
        tensors=tensors,
        passes=[pass_record(r) for r in reports],
        op_implementations=implementations(target, _ops(traced.graph), program.entry.executor, program.from_torch, program.calls),
        tokenizer=tokenizer.facts,
        generation_defaults=generation_defaults(source.generation_config),
        canaries=canaries,
        canary_tolerance=canary.TOLERANCE[source.dtype],
        toolchain=versions,
        settings={name: value for name, value in config.key_fields().items() if isinstance(value, str | int | float | bool | None)},
        files=[],
        quantization=held.facts,
        kv_quantization=held.kv_facts,
        pooling=PoolingFacts(kind=config.pooling, normalize=config.normalize) if config.pooling is not None else None,  # type: ignore[arg-type]
    )


def _shared_bytes(program: Program) -> int:
    """The most shared memory that a block of any of a GPU's kernels takes; 0 for other programs."""
    return max((kernel["shared_bytes"] for kernel in (program.gpu or {}).get("kernels", [])), default=0)


def pass_record(done: PassReport) -> PassRecord:
    """A pass's report as the manifest holds it."""
    result = done.result
    return PassRecord(
        name=done.applied.name,
        numerics=done.applied.numerics.value,
        matches=result.matches,
        refusals=dict(sorted(result.refusals.items())),
        nodes_before=result.nodes_before,
        nodes_after=result.nodes_after,
    )
