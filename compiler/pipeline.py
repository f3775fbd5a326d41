"""Which passes run at which level for which kind of target, in which order.

Choices are made here, when the list is built, not inside the runner.
"""

from __future__ import annotations

from dataclasses import replace

from llmc.compiler.pass_choice import parse_choice
from llmc.errors import ConfigError
from llmc.passes.add_lora import AddLora
from llmc.passes.base import Pass
from llmc.passes.combine_experts import CombineExperts
from llmc.passes.common_subexpressions import CommonSubexpressions
from llmc.passes.constant_fold_rope import ConstantFoldRope
from llmc.passes.fuse_add_rms_norm import FuseAddRmsNorm
from llmc.passes.fuse_gelu_mul import FuseGeluMul
from llmc.passes.fuse_rms_norm import FuseRmsNorm
from llmc.passes.fuse_rope_kv_write import FuseRopeKVWrite
from llmc.passes.fuse_silu_mul import FuseSiluMul
from llmc.passes.keep_plain_fp8 import KeepPlainFp8
from llmc.passes.keep_quantized import KeepQuantized
from llmc.passes.lower_experts import LowerExperts
from llmc.passes.lower_linear import LowerLinear
from llmc.passes.lower_moe_route import LowerMoeRoute
from llmc.passes.lower_plain_experts import LowerPlainExperts
from llmc.passes.lower_plain_linear import LowerPlainLinear
from llmc.passes.merge_gate_up import MergeGateUp
from llmc.passes.merge_qkv import MergeQKV
from llmc.passes.no_op_elimination import NoOpElimination
from llmc.passes.prune_to_needed_rows import PruneToNeededRows
from llmc.passes.quantize_linear import QuantizeLinear
from llmc.passes.quantize_plain_linear import QuantizePlainLinear
from llmc.passes.shard_tensor_parallel import ShardTensorParallel
from llmc.passes.sort_experts import SortExperts

LEVELS = (0, 1, 2, 3)
KINDS = ("cpu", "cuda")
# The schemes of each kind of target. What a scheme's numbers mean does not depend on the kind; where they lie does.
QUANTIZATIONS: dict[str, dict[str, QuantizeLinear | QuantizePlainLinear]] = {
    "cpu": {"int8": QuantizeLinear(bits=8, group=128), "int4": QuantizeLinear(bits=4)},
    "cuda": {
        "int8": QuantizePlainLinear(bits=8, group=128),
        "int4": QuantizePlainLinear(bits=4),
        "fp8": QuantizePlainLinear(fp8=True),
    },
}
STORED = "stored"  # in place of one of these: as the checkpoint is quantised already


def pipeline(
    level: int,
    quantization: str | None = None,
    *,
    group: int | None = None,
    kind: str = "cpu",
    passes: str = "",
    ranks: int = 1,
    lora: AddLora | None = None,
    backend: str = "inductor",
) -> list[Pass]:
    """The passes of an optimisation level, in order.

    Args:
        level: 0 gives no pass at all: the captured graph is the oracle the other levels are held to. 3 is 2 with the fusions left out
            that did not pay, which `compiler/search.py` measures and hands over in `passes`.
        quantization: a scheme of the kind in QUANTIZATIONS, STORED, or None.
        group: inputs that share a scale, in place of the scheme's own.
        kind: of the target, one of KINDS.
        passes: the value of --passes, "+name,-name".
        ranks: how many share a layer; of a CPU alone.
        lora: adds the terms of adapters; at every level, for the program takes them as inputs.
        backend: what generates code for a CPU, "inductor" or "tvm".

    Raises:
        ConfigError: a level that does not exist, quantised weights without passes or kernels, or a pass that is none of the target's.
    """
    assert kind in KINDS
    if lora is not None:
        assert ranks == 1
        listed = pipeline(level, quantization, group=group, kind=kind, passes=passes, backend=backend)
        return [*listed[:1], lora, *listed[1:]]  # behind no-op-elimination, before the merges; at -O0 alone
    if ranks > 1:
        listed = pipeline(level, quantization, group=group, kind=kind, passes=passes, backend=backend)
        return [*listed[:1], ShardTensorParallel(ranks), *listed[1:]]  # behind no-op-elimination, before the merges
    if passes:
        if level == 0:
            raise ConfigError(f"--passes {passes}: -O0 runs none, it is the oracle; use -O1 or -O2")
        known = [pipeline(each, quantization, group=group, kind=kind, backend=backend) for each in (level, LEVELS[-1])]
        return parse_choice(passes).apply(*known)
    if level not in LEVELS:
        raise ConfigError(f"optimisation level {level}: expected one of {', '.join(map(str, LEVELS))}; choose -O2 if in doubt")
    if level == 0:
        if quantization is not None:
            raise ConfigError(f"--quantization {quantization} is a pass, and -O0 runs none: it is the oracle; use -O1 or -O2")
        return []
    if kind == "cuda":
        return _exact() + (_gpu_fusions() if level >= 2 else []) + _gpu_lowering() + _quantizing(quantization, group, kind)
    return _exact() + (_cpu_fusions(backend) if level >= 2 else []) + _lowering() + _quantizing(quantization, group, kind)


def group_of(scheme: str, asked: int | None) -> int:
    """Inputs that share a scale; 0: a row has one scale however long it is."""
    return 0 if scheme == "fp8" else asked or QUANTIZATIONS["cpu"][scheme].group


def _quantizing(quantization: str | None, group: int | None, kind: str) -> list[Pass]:
    if quantization is None:
        return []
    if quantization == STORED:
        return [KeepQuantized() if kind == "cpu" else KeepPlainFp8()]  # a GPU dequantises the integers of a checkpoint
    known = QUANTIZATIONS[kind][quantization]
    return [replace(known, group=group) if group is not None else known]


def _exact() -> list[Pass]:
    """Same bits, given that a row and a column of a linear do not depend on their neighbours."""
    return [
        NoOpElimination(),  # first: it puts next to each other what the others match
        CommonSubexpressions(),  # before folding: what each layer derives from the rotary values becomes one value
        PruneToNeededRows(),  # before the merges: the last layer's MLP is then merged on few rows as any other
        MergeQKV(),  # the merges need plain aten.linear, so they stand before lower-linear
        MergeGateUp(),
        ConstantFoldRope(),  # anywhere after no-op-elimination; late, since its tables are the only bytes a pass holds
    ]


def _cpu_fusions(backend: str) -> list[Pass]:
    """What pays beside Inductor, which fuses pointwise loops itself: ops on whole rows, which it starts a parallel region each for."""
    return [
        FuseRmsNorm(even_rows=True),
        *([FuseRopeKVWrite()] if backend != "tvm" else []),  # its kernel is none of those that TVM's programs call
        FuseAddRmsNorm(),
        FuseSiluMul(),
        FuseGeluMul(),
    ]


def _gpu_fusions() -> list[Pass]:
    """Ops that have a kernel of their own on a GPU. Inexact: they round once where the captured ops round two or three times."""
    return [
        FuseRmsNorm(),  # before the two that look for its result
        FuseRopeKVWrite(),  # takes the norms of q and k with it
        FuseAddRmsNorm(),  # after fuse-rope-kv-write: what norms are left stand on the residual stream
        FuseSiluMul(),
        FuseGeluMul(),
    ]


def _gpu_lowering() -> list[Pass]:
    """At every level: a row's bits must not depend on its batch."""
    return [LowerPlainLinear(), LowerPlainExperts(), LowerMoeRoute(), CombineExperts()]


def size_pipeline() -> list[Pass]:
    """What runs on a GPU's graph once its sizes are fixed, for each size anew; at every level, as the lowering before it."""
    return [SortExperts()]


def _lowering() -> list[Pass]:
    """Last: what these write, quantising alone reads. They stand at -O1 too, for a row's bits must not depend on its batch."""
    return [LowerLinear(), LowerExperts()]
