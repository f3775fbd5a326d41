"""Inductor's schedule of a graph for a described GPU, held to what a plan needs.

    GraphModule on fake cuda:0 tensors  ->  Schedule

Inductor's decisions are not trusted but checked in what it made; a broken promise is an error, never a warning.
"""

from __future__ import annotations

import operator
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from llmc.artifacts.cubin import Kernel, read_cubin
from llmc.compiler.cuda.cross import OPTIONS, cross_cuda
from llmc.compiler.inductor import quiet
from llmc.errors import InternalError, UnsupportedModel
from llmc.kernels.cuda_targets import CudaTarget

# Stack bytes per thread that a kernel of Inductor's may use. Spilled registers are stack; a little costs nothing measurable.
SPILL_BUDGET_BYTES = 64

_ALLOCATION = torch.empty_strided
_VIEW = torch.as_strided
_VIEW_OPS = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("view", "reshape", "unsqueeze", "squeeze", "transpose", "permute", "t", "slice", "select", "split", "split_with_sizes",
                 "expand", "alias", "detach", "unflatten", "flatten", "chunk", "unbind")
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CompiledKernel:
    """One Triton kernel as compiled.

    image: the cubin. entry: its kernel's name. kernel: what the image says of it.
    num_warps: block size in warps. shared_bytes: dynamic shared memory of a launch. num_ctas: blocks per cluster.
    source: the text of Inductor's module; "" for kernels of ours.
    scratch_bytes: memory that each program takes for itself, behind the first pointer after the arguments.
    """

    image: bytes
    entry: str
    kernel: Kernel
    num_warps: int
    shared_bytes: int
    num_ctas: int
    source: str
    scratch_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A step as allocations, views, launches of Triton kernels and calls of ops of ours, in order.

    graph: Inductor's; each launch has its tuner in meta["tuner"].
    constants: the schedule's own name of each constant -> the graph's.
    kernels: by the tuner's identity, `kernel_of` looks a launch up.
    calls: ops called outside Triton kernels -> how often.
    """

    graph: GraphModule
    constants: Mapping[str, str]
    kernels: Mapping[int, CompiledKernel]
    calls: Mapping[str, int]

    def kernel_of(self, launch: Node) -> CompiledKernel:
        """The kernel that a launch node runs."""
        return self.kernels[id(launch.meta["tuner"])]

    def images(self) -> list[bytes]:
        """Every image in order of its first launch."""
        return list(dict.fromkeys(kernel.image for kernel in self.kernels.values()))


def schedule(graph: GraphModule, target: CudaTarget, *, allowed_calls: Iterable[str] = ()) -> Schedule:
    """Compile every kernel of a graph and fix the order of their launches.

    Args:
        graph: inputs and constants are fake tensors on cuda:0 (`specialise`); not changed.
        allowed_calls: ops that may stay calls, as "llmc.paged_attention.default".

    Raises:
        ConfigError: triton is not installed.
        UnsupportedModel: an op would be a library call.
        InternalError: Inductor failed, constants were merged or dropped, a kernel spills or does not fit the target.
    """
    inputs = tuple(node.meta["val"] for node in graph.graph.find_nodes(op="placeholder"))
    with cross_cuda(target), torch.no_grad(), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about get_attr nodes without an owner, and deprecations inside torch
        made = _compile(graph, inputs, target)
        if not isinstance(made, GraphModule):
            raise InternalError(f"Inductor gave a {type(made).__name__}, expected a graph of launches; please report this")
        kernels = {id(node.meta["tuner"]): compiled_kernel(node.meta["tuner"]) for node in made.graph.nodes if "tuner" in node.meta}
    calls = called_ops(made)
    check_calls(calls, allowed_calls)
    for kernel in kernels.values():
        check_kernel(kernel, target)
    constants = check_constants(graph, made)
    return Schedule(
        graph=made, constants=MappingProxyType(constants), kernels=MappingProxyType(kernels), calls=MappingProxyType(dict(calls))
    )


def is_view(node: Node) -> bool:
    """Whether a call gives its argument's memory another shape, or takes one of several results."""
    if node.target in (_VIEW, operator.getitem):
        return True
    return isinstance(node.target, OpOverload) and node.target.overloadpacket in _VIEW_OPS


def direct_schedule(graph: GraphModule) -> Schedule | None:
    """The schedule of a graph of ops of ours and views, which needs no Inductor; None if the graph holds something else.

    Args:
        graph: inputs and constants are fake tensors on cuda:0 (`specialise`).
    """
    calls: Counter[str] = Counter()
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        if isinstance(node.target, OpOverload) and node.target.namespace == "llmc":
            calls[str(node.target)] += 1
        elif not is_view(node) or not _shares_memory(node):
            return None
    constants = {str(node.target): str(node.target) for node in graph.graph.find_nodes(op="get_attr")}
    return Schedule(graph=graph, constants=MappingProxyType(constants), kernels=MappingProxyType({}), calls=MappingProxyType(dict(calls)))


def _shares_memory(view: Node) -> bool:
    """Whether a view's result lies in its argument's memory; a reshape may have copied."""
    source: Any = view.args[0]
    results, given = (v if isinstance(v, list | tuple) else [v] for v in (view.meta["val"], source.meta["val"]))
    known = {value.untyped_storage()._cdata for value in given}
    return all(value.untyped_storage()._cdata in known for value in results)


def _compile(graph: GraphModule, inputs: tuple[Any, ...], target: CudaTarget) -> Any:
    from torch._inductor.exc import InductorError

    try:
        return torch._inductor.aot_compile(graph, inputs, options=OPTIONS)
    except InductorError as error:
        reason = str(error).splitlines()[0]
        raise InternalError(f"Inductor cannot compile this graph for {target.name}: {reason}; please report this model") from error


def compiled_kernel(tuner: Any) -> CompiledKernel:
    """What Triton made for a kernel of Inductor's; `tuner` holds exactly one configuration."""
    (result,) = tuner.compile_results
    metadata, image = result.kernel.metadata, result.kernel.asm["cubin"]
    found = read_cubin(image, metadata.name).kernels
    if metadata.name not in found:
        raise InternalError(f"the image of {metadata.name} holds {', '.join(found)}; please report this")
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise InternalError(f"kernel {metadata.name} wants scratch memory of its own, which a plan does not give; please report this")
    return CompiledKernel(
        image=image,
        entry=metadata.name,
        kernel=found[metadata.name],
        num_warps=metadata.num_warps,
        shared_bytes=metadata.shared,
        num_ctas=metadata.num_ctas,
        source=Path(tuner.fn.fn.__code__.co_filename).read_text(encoding="utf-8"),
    )


def called_ops(made: GraphModule) -> Counter[str]:
    """Ops that a schedule calls outside Triton kernels, with how often."""
    nodes = (node for node in made.graph.nodes if node.op == "call_function" and "tuner" not in node.meta)
    return Counter(str(node.target) for node in nodes if node.target not in (_ALLOCATION, _VIEW, operator.getitem))


def check_calls(calls: Mapping[str, int], allowed: Iterable[str]) -> None:
    """Check that nothing but `allowed` is called.

    Raises:
        UnsupportedModel: names the op; a library product, attention or fallback has no place where neither torch nor cuBLAS is.
    """
    permitted = frozenset(allowed)
    for name in calls:
        if name not in permitted:
            raise UnsupportedModel(
                f"compiled for CUDA, the model would call {name} ({calls[name]} times), for which there is no Triton kernel; "
                "compile for a CPU with --target cpu"
            )


def check_kernel(kernel: CompiledKernel, target: CudaTarget, *, spill_budget_bytes: int = SPILL_BUDGET_BYTES) -> None:
    """Check one kernel against the target.

    Raises:
        InternalError: wrong architecture or block size, too much shared memory, or more stack than the budget.
    """
    where = f"kernel {kernel.entry}"
    if read_cubin(kernel.image, where).architecture != target.capability_number:
        raise InternalError(f"{where} was compiled for another architecture than {target.architecture}; please report this")
    if kernel.kernel.threads not in (None, (32 * kernel.num_warps, 1, 1)):
        raise InternalError(
            f"{where} must be launched with {kernel.kernel.threads} threads, not {kernel.num_warps} warps; please report this"
        )
    shared = kernel.shared_bytes + kernel.kernel.shared_bytes
    if shared > target.shared_memory_per_block_bytes:
        raise InternalError(
            f"{where} needs {shared} bytes of shared memory, {target.name} has {target.shared_memory_per_block_bytes}; please report this"
        )
    if kernel.kernel.frame_bytes > spill_budget_bytes:
        raise InternalError(
            f"{where} spills: {kernel.kernel.frame_bytes} bytes of stack per thread, the budget is {spill_budget_bytes}; please report this"
        )


def check_constants(graph: GraphModule, made: GraphModule) -> dict[str, str]:
    """Match a schedule's constants with the graph's, one to one.

    Returns:
        The schedule's name of each constant -> the graph's.

    Raises:
        InternalError: a constant was merged with another, dropped or added.
    """
    wanted = list(dict.fromkeys(str(node.target) for node in graph.graph.find_nodes(op="get_attr")))
    mangled = {"".join(c if c.isalnum() else "_" for c in name): name for name in wanted}
    found = [str(node.target) for node in made.graph.find_nodes(op="get_attr") if node.users]
    if len(mangled) != len(wanted) or sorted(found) != sorted(mangled):
        difference = sorted(set(mangled) ^ set(found)) or ["two names that differ in punctuation only"]
        raise InternalError(
            f"the schedule has {len(found)} constants, the graph {len(wanted)} (first difference: {difference[0]}); please report this"
        )
    return {name: mangled[name] for name in found}


def check_same_images(first: Iterable[bytes], second: Iterable[bytes]) -> None:
    """Check that two builds of one input gave the same images.

    Raises:
        InternalError: they did not; names a kernel.
    """
    one, two = list(first), list(second)
    different = [image for image in one if image not in two] + [image for image in two if image not in one]
    if different or len(one) != len(two):
        name = next(iter(read_cubin(different[0], "an image").kernels)) if different else "their number"
        raise InternalError(
            f"two builds of the same input differ: {len(one)} and {len(two)} images, first difference {name}; please report this"
        )
