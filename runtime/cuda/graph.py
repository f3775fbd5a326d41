"""A plan and addresses -> a CUDA graph that can be launched. Built node by node: nothing is captured and nothing runs."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from llmc.artifacts.plan import Launch, Plan, PlanKernel, Pointer
from llmc.runtime.cuda.api import ATTRIBUTE_CLUSTER_DIMENSION, KernelNodeParams, LaunchAttributeValue
from llmc.runtime.cuda.device import Device, Stream
from llmc.runtime.cuda.modules import Modules

_WARP = 32


def build_graph(device: Device, parts: Sequence[tuple[Plan, Sequence[int]]], modules: Modules, stream: Stream) -> int:
    """Build and instantiate the graph of plans that run one after the other.

    Args:
        parts: each plan, checked, with the address of each of its regions, in its order.
        modules: have their kernels.
        stream: what the graph will be launched in; the graph is uploaded there, so that its first launch is as fast as the next.

    Returns:
        A CUgraphExec, which the caller destroys.
    """
    driver = device.driver
    graph = ctypes.c_void_p(driver.get("cuGraphCreate", ctypes.c_void_p, 0))
    try:
        ends: list[int] = []  # what the next part waits for
        for plan, addresses in parts:
            ends = _add_nodes(device, graph, plan, modules, addresses, ends)
        executable = int(driver.get("cuGraphInstantiateWithFlags", ctypes.c_void_p, graph, 0))
    finally:
        device.release("cuGraphDestroy", graph)
    driver.call("cuGraphUpload", executable, stream.handle)
    return executable


def _add_nodes(
    device: Device, graph: ctypes.c_void_p, plan: Plan, modules: Modules, addresses: Sequence[int], first: Sequence[int]
) -> list[int]:
    """Add a plan's launches behind the nodes `first`. Returns the nodes that no other waits for."""
    driver = device.driver
    before: list[list[int]] = [[] for _ in plan.launches]
    for earlier, later in plan.edges:
        before[later].append(earlier)
    nodes: list[int] = []
    for launch, waits in zip(plan.launches, before, strict=True):
        kernel = plan.kernels[launch.kernel]
        handles = [nodes[index] for index in waits] or first
        dependencies = (ctypes.c_void_p * max(len(handles), 1))(*handles)
        params, keep = _node_params(launch, kernel, modules.function(plan, kernel), addresses)
        node = ctypes.c_void_p()
        driver.call("cuGraphAddKernelNode_v2", ctypes.byref(node), graph, dependencies, len(handles), ctypes.byref(params))
        del keep  # the driver has copied the parameters
        if kernel.cluster > 1:
            value = LaunchAttributeValue(cluster=(kernel.cluster, 1, 1))
            driver.call("cuGraphKernelNodeSetAttribute", node, ATTRIBUTE_CLUSTER_DIMENSION, ctypes.byref(value))
        assert node.value is not None
        nodes.append(node.value)
    waited = {earlier for earlier, _ in plan.edges}
    return [node for index, node in enumerate(nodes) if index not in waited]


def _node_params(launch: Launch, kernel: PlanKernel, function: int, addresses: Sequence[int]) -> tuple[KernelNodeParams, object]:
    """A node's parameters, and what must stay alive until the driver has read them."""
    values, starts = bytearray(), []
    for argument in launch.arguments:
        values.extend(b"\0" * (-len(values) % 16))
        starts.append(len(values))
        if isinstance(argument, Pointer):
            values += (addresses[argument.region] + argument.offset).to_bytes(8, "little")
        else:
            values += bytes.fromhex(argument.data)
    data = ctypes.create_string_buffer(bytes(values), len(values) + 1)
    base = ctypes.addressof(data)
    pointers = (ctypes.c_void_p * max(len(starts), 1))(*[base + start for start in starts])
    params = KernelNodeParams(
        func=function,
        grid_x=launch.grid[0] * kernel.cluster,
        grid_y=launch.grid[1],
        grid_z=launch.grid[2],
        block_x=_WARP * kernel.num_warps,
        block_y=1,
        block_z=1,
        shared_bytes=kernel.shared_bytes,
        kernel_params=ctypes.addressof(pointers),
    )
    return params, (data, pointers)
