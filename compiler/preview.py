"""`llmc compile --dry-run` and `--estimate`: capture and passes, nothing lowered, nothing written."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.artifacts.kv_bytes import token_bytes
from llmc.artifacts.manifest import PassRecord
from llmc.compiler.build import applied_quantization, cache_dtype, compile_limits, pass_record
from llmc.compiler.capture import capture
from llmc.compiler.lora import lora_pass
from llmc.compiler.model import read_model
from llmc.compiler.packing import order_of_use
from llmc.compiler.pipeline import pipeline
from llmc.compiler.targets import find_target
from llmc.compiler.tvm.program import check_convertible
from llmc.config.compile import CompileConfig
from llmc.passes.base import PassContext
from llmc.passes.runner import dump_directory, run_passes


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What a compile would do and need."""

    architecture: str
    dtype: str
    nodes: int
    passes: list[PassRecord]
    weights_bytes: int
    kv_bytes_per_token: int
    max_model_len: int


def preview(config: CompileConfig) -> Preview:
    """Capture the model and run the passes.

    Raises:
        ConfigError, UnsupportedModel, PassError: as a compile would.
    """
    source = read_model(config.model, dtype=config.dtype, embed=config.embed)
    limits = compile_limits(config, source)
    kv_dtype = cache_dtype(config, source)
    traced = capture(source, block_size=config.block_size, kv_dtype=kv_dtype, max_model_len=limits.max_model_len, hidden=config.embed)
    nodes = len(traced.graph.graph.nodes)
    weights = traced.weight_table()
    context = PassContext(weights=weights, max_positions=limits.max_model_len)
    kind = find_target(config.target).kind
    passes = pipeline(
        config.level,
        applied_quantization(config, source, kind),
        group=config.quantization_group_size,
        kind=kind,
        passes=config.passes,
        lora=lora_pass(config, traced, source.dtype),
        backend=config.backend,
    )
    reports = run_passes(traced.graph, passes, context, dump_dir=dump_directory())
    if config.backend == "tvm":
        check_convertible(traced.graph)
    held = [weights[name] for name in order_of_use(traced.graph)]
    return Preview(
        architecture=source.architecture,
        dtype=source.dtype,
        nodes=nodes,
        passes=[pass_record(report) for report in reports],
        weights_bytes=sum(constant.nbytes for constant in held),
        kv_bytes_per_token=token_bytes(traced.kv),
        max_model_len=limits.max_model_len,
    )
