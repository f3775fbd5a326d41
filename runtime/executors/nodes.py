"""Runs a node list over torch.ops: the executor of -O0, the oracle the others are held to. The only file of the runtime with torch.

docs/node_list.md is the page this follows. The list is checked whole before anything of it runs: names, order, and ops, of which
only pure aten ops on tensors, a few integer functions, and llmc's attention and lora_add are allowed.
"""

from __future__ import annotations

import ctypes
import operator
import os
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import torch

from llmc.artifacts.manifest import Entry, KVFacts
from llmc.errors import ArtifactError, InternalError
from llmc.runtime.executors.kernel_abi import KERNEL_DTYPES, LoraAddArgs, PagedAttentionArgs, bind_lora_add, bind_paged_attention
from llmc.runtime.executors.kv_cache import KVCache, cache_input
from llmc.runtime.executors.logits import Logits
from llmc.runtime.step import DeviceBatch
from llmc.runtime.weights import Weights

FORMAT = 1
_MAX_PROGRAM_BYTES = 256 << 20
_ATTENTION, _LORA_ADD = "llmc.paged_attention.default", "llmc.lora_add.default"
_FUNCTIONS = {f"operator.{name}": getattr(operator, name) for name in ("getitem", "add", "sub", "mul", "floordiv")}
_CREATORS = frozenset({"arange", "empty", "full", "ones", "scalar_tensor", "zeros"})  # ops without a tensor argument that a list may hold
_WORDS = ("dtype", "layout", "memory_format")
_FLOATS = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}


class _Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    op: str
    args: list[Any]
    kwargs: dict[str, Any]


class NodeProgram(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A node list as it lies on disk."""

    format: int
    inputs: list[str]
    constants: dict[str, str]
    nodes: list[_Node]
    outputs: list[dict[str, str]]


def read_program(fd: int, path: str) -> NodeProgram:
    """Parse a node list from a verified descriptor.

    Raises:
        ArtifactError: it is no node list this runtime reads.
    """
    size = os.fstat(fd).st_size
    if size > _MAX_PROGRAM_BYTES:
        raise ArtifactError(f"{path}: {size} bytes are more than a node list may have ({_MAX_PROGRAM_BYTES})")
    with open(os.dup(fd), "rb") as file:
        file.seek(0)
        data = file.read(size)
    try:
        program = msgspec.json.decode(data, type=NodeProgram)
    except msgspec.DecodeError as error:
        raise ArtifactError(f"{path}: expected a node list as in docs/node_list.md, found {error}; compile again") from error
    if program.format != FORMAT:
        raise ArtifactError(f"{path}: node list format {program.format}; this runtime reads {FORMAT}, upgrade llmc or compile again")
    return program


class NodesExecutor:
    """An `Executor` that interprets a node list.

    Args:
        entry: the program's inputs, outputs and constants.
        kv: how the KV cache is cut.
        program: the node list.
        kernels: the loaded kernels image.
        weights: used in place.
        num_threads: of torch and of the kernels.

    Raises:
        ArtifactError: the list refers to what is not there, or to an op that is not allowed.
    """

    def __init__(
        self, *, entry: Entry, kv: KVFacts, program: NodeProgram, kernels: ctypes.CDLL, weights: Weights, num_threads: int
    ) -> None:
        if [spec.name.replace(".", "_") for spec in entry.inputs] != program.inputs:
            raise ArtifactError(f"entry {entry.name}: the node list's inputs are not those of the manifest; compile again")
        if len(program.outputs) != 1:
            raise ArtifactError(f"entry {entry.name}: {len(program.outputs)} outputs where the logits alone are expected; compile again")
        self._entry = entry
        self._kv_facts = kv
        self._num_threads = num_threads
        self._thread: int | None = None
        self._attention = bind_paged_attention(kernels)
        self._fixed: dict[str, Any] = {}  # constants, and after allocate_kv the cache
        for local, name in program.constants.items():
            if name not in weights.views:
                raise ArtifactError(f"entry {entry.name}: constant {local} stands for tensor {name!r}, which is not there; compile again")
            view = weights.views[name]
            self._fixed[local] = _as_torch(view.array, view.dtype)
        ours: dict[str, Callable[..., Any]] = {_ATTENTION: self._run_attention}
        if any(node.op == _LORA_ADD for node in program.nodes):
            self._lora_add = bind_lora_add(kernels)
            ours[_LORA_ADD] = self._run_lora_add
        self._steps = _link(program, ours, entry.name)
        self._output = program.outputs[0].get("ref", "")
        if self._output not in {*program.inputs, *program.constants, *(node.name for node in program.nodes)}:
            raise ArtifactError(f"entry {entry.name}: the output {self._output!r} is no value of the node list; compile again")
        self._has_cache = False

    def bind_lora(self, pool: np.ndarray) -> None:
        """Use this pool of adapters, bfloat16 as uint16, at every step."""
        spec = next(spec for spec in self._entry.inputs if spec.name == "lora_pool")
        self._fixed[spec.name] = _as_torch(pool, spec.dtype)

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocate K and V of every layer, zeroed."""
        cache = KVCache(self._kv_facts, num_blocks)
        for spec in self._entry.inputs:
            owner = cache_input(spec.name)
            if owner is not None:
                self._fixed[spec.name.replace(".", "_")] = _as_torch(cache.tensor(*owner), spec.dtype)
        self._has_cache = True

    def run(self, batch: DeviceBatch) -> Logits:
        """One step. Returns logits [N, vocab_size], valid until the next call."""
        if not self._has_cache:
            raise InternalError("a step ran before the KV cache was allocated; please report this")
        if threading.get_ident() != self._thread:
            torch.set_num_threads(self._num_threads)  # OpenMP keeps the number of threads per starting thread
            self._thread = threading.get_ident()
        values = dict(self._fixed)
        for spec in self._entry.inputs:
            if cache_input(spec.name) is None and spec.name not in self._fixed:
                values[spec.name] = torch.from_numpy(getattr(batch, spec.name))
        with torch.inference_mode():
            for step in self._steps:
                try:
                    step(values)
                except InternalError:
                    raise
                except Exception as error:
                    raise InternalError(f"{step.where} failed: {str(error).splitlines()[0] if str(error) else error!r}") from error
            logits: np.ndarray = values[self._output].float().contiguous().numpy()
        return Logits(logits)

    def close(self) -> None:
        """Drop weights and KV cache."""
        self._fixed, self._steps, self._has_cache = {}, [], False

    def _run_attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        layer: int,
        group: int,
        scale: float,
        window: int,
        softcap: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """llmc.paged_attention by the kernels image; see docs/architecture.md, "Ops"."""
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        sinks = None if sinks is None else sinks.contiguous()
        out = torch.empty(q.shape, dtype=q.dtype)
        slots, table = slot_mapping[group], block_tables[group]
        self._attention(
            PagedAttentionArgs(
                num_threads=self._num_threads,
                dtype=_kernel_dtype(q),
                kv_dtype=_kernel_dtype(k_cache),
                sinks_dtype=0 if sinks is None else _kernel_dtype(sinks),
                scale=scale,
                softcap=softcap,
                window=window,
                num_tokens=q.shape[0],
                num_seqs=len(seq_lens),
                num_heads=q.shape[1],
                num_kv_heads=k.shape[1],
                head_dim=q.shape[2],
                num_blocks=k_cache.shape[0],
                block_size=k_cache.shape[2],
                max_blocks=table.shape[1],
                q=q.data_ptr(),
                k=k.data_ptr(),
                v=v.data_ptr(),
                k_cache=k_cache.data_ptr(),
                v_cache=v_cache.data_ptr(),
                slot_mapping=slots.data_ptr(),
                block_tables=table.data_ptr(),
                seq_lens=seq_lens.data_ptr(),
                query_start_loc=query_start_loc.data_ptr(),
                sinks=None if sinks is None else sinks.data_ptr(),
                out=out.data_ptr(),
                q_token_stride=q.stride(0),
                q_head_stride=q.stride(1),
                k_token_stride=k.stride(0),
                k_head_stride=k.stride(1),
                v_token_stride=v.stride(0),
                v_head_stride=v.stride(1),
                k_cache_block_stride=k_cache.stride(0),
                k_cache_head_stride=k_cache.stride(1),
                v_cache_block_stride=v_cache.stride(0),
                v_cache_head_stride=v_cache.stride(1),
                block_table_stride=table.stride(0),
            )
        )
        return out

    def _run_lora_add(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        slots: torch.Tensor,
        pool: torch.Tensor,
        rank: int,
        sizes: list[int],
        offsets: list[int],
    ) -> torch.Tensor:
        """llmc.lora_add by the kernels image; see docs/architecture.md, "Ops"."""
        y, x, slots = y.contiguous(), x.contiguous(), slots.contiguous()
        out = torch.empty_like(y)
        n, k = y.shape[-1], x.shape[-1]
        if slots.numel() != y.numel() // n or x.numel() // k != slots.numel():
            raise InternalError(f"lora_add got {slots.numel()} slots for {y.numel() // n} rows; please report this")
        parts = (ctypes.c_int64 * len(sizes))(*sizes), (ctypes.c_int64 * len(offsets))(*offsets)
        self._lora_add(
            LoraAddArgs(
                y=y.data_ptr(),
                x=x.data_ptr(),
                slots=slots.data_ptr(),
                pool=pool.data_ptr(),
                out=out.data_ptr(),
                sizes=ctypes.addressof(parts[0]),
                offsets=ctypes.addressof(parts[1]),
                m=slots.numel(),
                n=n,
                k=k,
                y_stride=n,
                x_stride=k,
                num_slots=pool.shape[0],
                slot_elements=pool.shape[1],
                num_parts=len(sizes),
                rank=rank,
                dtype=_kernel_dtype(y),
                pool_dtype=_kernel_dtype(pool),
                num_threads=self._num_threads,
            )
        )
        return out


class _Step:
    """One node, linked: what to call, with which values, and which values end here."""

    def __init__(self, node: _Node, function: Callable[..., Any], known: set[str]) -> None:
        self.where = f"node {node.name} ({node.op})"
        self.refs: set[str] = set()
        self.last_used: list[str] = []
        self._name = node.name
        self._function = function
        self._known = known
        self._args = [self._linked(value) for value in node.args]
        self._kwargs = {key: self._linked(value) for key, value in node.kwargs.items()}

    def __call__(self, values: dict[str, Any]) -> None:
        """Compute the node. Changes `values`."""
        args = [get(values) for get in self._args]
        values[self._name] = self._function(*args, **{key: get(values) for key, get in self._kwargs.items()})
        for name in self.last_used:
            del values[name]

    def _linked(self, value: Any) -> Callable[[dict[str, Any]], Any]:
        """A function that gives an argument's value in a step."""
        if isinstance(value, list):
            items = [self._linked(item) for item in value]
            return lambda values: [get(values) for get in items]
        if isinstance(value, dict):
            return self._linked_tagged(value)
        return lambda values: value

    def _linked_tagged(self, value: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
        (kind, word), *more = value.items() or [("nothing", None)]
        if not more and isinstance(word, str):
            if kind == "ref":
                if word not in self._known:
                    raise ArtifactError(f"{self.where}: refers to {word!r}, which does not stand above it; compile again")
                self.refs.add(word)
                return lambda values: values[word]
            if kind == "float" and word in _FLOATS:
                return lambda values: _FLOATS[word]
            if kind == "device" and word == "cpu":
                device = torch.device("cpu")
                return lambda values: device
            if kind in _WORDS and isinstance(getattr(torch, word, None), getattr(torch, kind)):
                constant = getattr(torch, word)
                return lambda values: constant
        raise ArtifactError(f"{self.where}: {str(value)[:100]} is no value of a node list; compile again")


def _link(program: NodeProgram, ours: dict[str, Callable[..., Any]], entry: str) -> list[_Step]:
    """Resolve every node, in order, and find where each value is used last."""
    known = {*program.inputs, *program.constants}
    if len(known) != len(program.inputs) + len(program.constants):
        raise ArtifactError(f"entry {entry}: an input and a constant of the node list share a name; compile again")
    kept = set(known) | {output.get("ref", "") for output in program.outputs}
    steps: list[_Step] = []
    for node in program.nodes:
        if node.name in known:
            raise ArtifactError(f"entry {entry}: the node list defines {node.name!r} twice; compile again")
        steps.append(_Step(node, _function(node, ours), known))
        known.add(node.name)
    for step in reversed(steps):
        step.last_used = sorted(step.refs - kept)
        kept |= step.refs
    return steps


def _function(node: _Node, ours: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """What a node calls.

    Raises:
        ArtifactError: the op is not allowed, or this torch does not have it.
    """
    if node.op in ours:
        return ours[node.op]
    if node.op in _FUNCTIONS:
        return _FUNCTIONS[node.op]
    namespace, _, rest = node.op.partition(".")
    name, _, overload = rest.partition(".")
    packet = getattr(torch.ops.aten, name, None) if namespace == "aten" and name.isidentifier() else None
    op = getattr(packet, overload, None) if overload.isidentifier() else None
    if not isinstance(op, torch._ops.OpOverload):
        raise ArtifactError(f"node {node.name}: op {node.op[:100]!r} is not one a node list may call here; compile again")
    takes_tensor = any("Tensor" in str(argument.type) for argument in op._schema.arguments)
    if op._schema.is_mutable or not (takes_tensor or name in _CREATORS):
        raise ArtifactError(f"node {node.name}: op {node.op} writes in place or reaches outside the program, which no node list may")
    return op


def _as_torch(array: np.ndarray, dtype: str) -> torch.Tensor:
    """A tensor over an array's memory; bfloat16 is carried as uint16."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def _kernel_dtype(tensor: torch.Tensor) -> int:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in KERNEL_DTYPES:
        raise InternalError(f"attention got a tensor of {name}; {', '.join(KERNEL_DTYPES)} are expected; please report this")
    return KERNEL_DTYPES[name]
