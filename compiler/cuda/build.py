"""The program of an artifact for a GPU: its plans and cubins, put into the artifact."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llmc.artifacts.manifest import Entry, PlanRecord
from llmc.artifacts.store import Store
from llmc.artifacts.writer import ArtifactWriter
from llmc.compiler.capture import TracedModel
from llmc.compiler.cuda.lowered import lower_plans
from llmc.compiler.cuda.program import output_specs, with_next_tokens
from llmc.compiler.cuda.sampling import sampling_plans
from llmc.compiler.cuda.sizes import PlanSize, plan_sizes
from llmc.compiler.program import Program
from llmc.compiler.stages import StageLog
from llmc.config.compile import CompileConfig
from llmc.kernels.cuda_targets import CudaTarget
from llmc.passes import graph as G
from llmc.passes.weights import WeightTable


def check_sizes(config: CompileConfig) -> None:
    """Refuse sizes that no step has, before a model is read.

    Raises:
        ConfigError: see `plan_sizes`.
    """
    _sizes(config)


def _sizes(config: CompileConfig) -> list[PlanSize]:
    """The sizes that a configuration asks for.

    Raises:
        ConfigError: see `plan_sizes`.
    """
    return plan_sizes(
        capture_sizes=config.cudagraph_capture_sizes,
        max_capture_size=config.max_cudagraph_capture_size,
        compile_sizes=config.compile_sizes,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )


def cuda_program(
    config: CompileConfig,
    target: CudaTarget,
    traced: TracedModel,
    weights: WeightTable,
    writer: ArtifactWriter,
    scratch: Path,
    log: StageLog,
    store: Store | None,
) -> Program:
    """Compile the graph that the passes left and put its plans and cubins into the artifact. Changes the graph.

    Raises:
        UnsupportedModel, InternalError, ArtifactError: see `lower_plans`.
    """
    with_next_tokens(traced.graph)
    table_blocks = -(-traced.max_model_len // config.block_size)
    with log.stage("lower") as note:
        lowered = lower_plans(
            traced.graph,
            traced.inputs,
            _sizes(config),
            weights,
            target,
            scratch,
            table_blocks=table_blocks,
            store=store,
        )
        sampling = sampling_plans((size.num_logits for size in lowered.plans), traced.outputs[0], target, scratch, store=store)
        note.detail = lowered.detail + sampling.note
    plans = []
    for size, data in lowered.plans.items():
        path = f"plans/{hashlib.sha256(data).hexdigest()}.json"
        writer.add_file(path, data)
        plans.append(
            PlanRecord(
                path=path,
                decode=size.decode,
                num_tokens=size.num_tokens,
                num_seqs=size.num_seqs,
                num_logits=size.num_logits,
                table_blocks=table_blocks,
            )
        )
    for record, data in zip(sampling.records, sampling.plans, strict=True):
        writer.add_file(record.path, data)
    entry = Entry(
        name="step",
        executor="plans",
        program=plans[0].path,
        inputs=list(traced.inputs),
        outputs=output_specs(traced.outputs[0]),
        constants={name: name for name in G.read_constants(traced.graph)},
        plans=plans,
        sampling=list(sampling.records),
    )
    images = [writer.add_image(image, "cubin", "cubin") for image in {**lowered.images, **sampling.images}.values()]
    gpu = {**lowered.facts, **{name: [*lowered.facts[name], *rows] for name, rows in sampling.facts.items()}}
    return Program(entry=entry, images=images, calls={}, gpu=gpu)
