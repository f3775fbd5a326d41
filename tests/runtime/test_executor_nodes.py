"""The node-list executor: the page docs/node_list.md run, and what a list may not do."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmc.errors import ArtifactError, InternalError
from llmc.runtime.batch import BatchBuilder
from llmc.runtime.executors.kernel_abi import PagedAttentionArgs
from llmc.runtime.executors.nodes import NodesExecutor, read_program
from llmc.runtime.messages import SamplingParams
from llmc.runtime.step import ScheduledSequence
from llmc.runtime.weights import Weights, WeightView
from tests.runtime.toy_artifact import toy_entry, toy_kv
from tests.runtime.toy_program import INPUTS, VOCAB

NAMES = [name.replace(".", "_") for name, _, _ in INPUTS]


def _ref(name: str) -> dict[str, str]:
    return {"ref": name}


def _node(name: str, op: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return {"name": name, "op": op, "args": list(args), "kwargs": kwargs}


# embed, scale by a float JSON cannot write and back, take the wanted rows, times head^T
PLAIN = [
    _node("rows", "aten.index_select.default", _ref("embed"), 0, _ref("input_ids")),
    _node("wanted", "aten.index_select.default", _ref("rows"), 0, _ref("logits_indices")),
    _node("n", "aten.sym_size.int", _ref("wanted"), 0),
    _node("m", "operator.mul", _ref("n"), 1),
    _node("flat", "aten.reshape.default", _ref("wanted"), [_ref("m"), 16]),
    _node("top", "aten.topk.default", _ref("flat"), 1),
    _node("best", "operator.getitem", _ref("top"), 0),
    _node("zero", "aten.full.default", [_ref("n"), 16], 0.0, dtype={"dtype": "float32"}, device={"device": "cpu"}),
    _node("clamped", "aten.clamp.default", _ref("best"), {"float": "-inf"}, {"float": "inf"}),
    _node("shifted", "aten.sub.Tensor", _ref("flat"), _ref("clamped")),
    _node("sum", "aten.add.Tensor", _ref("shifted"), _ref("zero")),
    _node("turned", "aten.t.default", _ref("head")),
    _node("logits", "aten.mm.default", _ref("sum"), _ref("turned")),
]


def _program(nodes: list[dict[str, Any]], **changes: Any) -> bytes:
    fields = {"format": 1, "inputs": NAMES, "constants": {"embed": "embed", "head": "head"}, "nodes": nodes, "outputs": [_ref("logits")]}
    return json.dumps({**fields, **changes}).encode()


class _Message:
    """Called and typed like a ctypes function."""

    def __call__(self, status: int) -> bytes:
        return b"a block is missing"


class _Kernels:
    """Stands where the kernels image would: records its arguments, answers with zeros or a status."""

    def __init__(self, status: int = 0) -> None:
        self.calls: list[PagedAttentionArgs] = []

        def attend(pointer: Any) -> int:
            args = PagedAttentionArgs.from_buffer_copy(pointer.contents)
            self.calls.append(args)
            return status

        self.llmc_paged_attention = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(PagedAttentionArgs))(attend)
        self.llmc_paged_attention_message = _Message()


def _read(data: bytes, folder: Path) -> Any:
    path = folder / "program.json"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_program(fd, "programs/step.json")
    finally:
        os.close(fd)


def _executor(data: bytes, weights: dict[str, np.ndarray], folder: Path, kernels: Any = None) -> NodesExecutor:
    views = {name: WeightView(dtype="float32", array=array) for name, array in weights.items()}
    executor = NodesExecutor(
        entry=toy_entry(executor="nodes"),
        kv=toy_kv(),
        program=_read(data, folder),
        kernels=kernels or _Kernels(),
        weights=Weights(views=views, num_bytes=0, num_bytes_hashed=0, stage_ms={}),
        num_threads=torch.get_num_threads(),
    )
    executor.allocate_kv(4)
    return executor


def _batch(ids: list[int]) -> Any:
    builder = BatchBuilder(block_size=16, num_groups=1, vocab_size=VOCAB, max_num_batched_tokens=64, max_num_seqs=8, max_model_len=64)
    share = ScheduledSequence(
        request_id="a",
        token_ids=ids,
        num_prompt_tokens=len(ids),
        start=0,
        end=len(ids),
        block_ids=([2],),
        sampling=SamplingParams(),
        needs_prompt_logprobs=False,
    )
    return builder.build([share]).batch


def test_every_kind_of_value(toy_weights, tmp_path):
    executor = _executor(_program(PLAIN), toy_weights, tmp_path)
    row = toy_weights["embed"][7]
    expected = (row - row.max()) @ toy_weights["head"].T
    for _ in range(2):
        np.testing.assert_allclose(executor.run(_batch([3, 7])).to_float32()[0], expected, rtol=1e-5, atol=1e-5)
    executor.close()


ATTENTION = [
    _node("rows", "aten.index_select.default", _ref("embed"), 0, _ref("input_ids")),
    _node("q", "aten.reshape.default", _ref("rows"), [-1, 2, 8]),
    _node("k", "aten.slice.Tensor", _ref("q"), 1, 0, 1),
    _node("out", "llmc.paged_attention.default", _ref("q"), _ref("k"), _ref("k"), _ref("k_cache_0"), _ref("v_cache_0"),
          _ref("slot_mapping"), _ref("block_tables"), _ref("seq_lens"), _ref("query_start_loc"), 0, 0, 0.25, 7, 1.5, None),
    _node("flat", "aten.reshape.default", _ref("out"), [-1, 16]),
    _node("wanted", "aten.index_select.default", _ref("flat"), 0, _ref("logits_indices")),
    _node("turned", "aten.t.default", _ref("head")),
    _node("logits", "aten.mm.default", _ref("wanted"), _ref("turned")),
]  # fmt: skip


def test_attention_hands_the_kernel_what_it_needs(toy_weights, tmp_path):
    kernels = _Kernels()
    executor = _executor(_program(ATTENTION), toy_weights, tmp_path, kernels)
    assert executor.run(_batch([3, 7, 8])).to_float32().shape == (1, VOCAB)
    (args,) = kernels.calls
    assert (args.struct_size, args.dtype, args.kv_dtype) == (ctypes.sizeof(PagedAttentionArgs), 0, 0)
    assert (args.num_tokens, args.num_seqs, args.num_heads, args.num_kv_heads, args.head_dim) == (3, 1, 2, 1, 8)
    assert (args.num_blocks, args.block_size, args.max_blocks, args.window) == (4, 16, 1, 7)
    assert (args.scale, args.softcap, args.sinks) == (0.25, 1.5, None)
    assert (args.q_token_stride, args.q_head_stride, args.k_token_stride) == (16, 8, 16)  # k is a view of q's memory


def test_a_kernels_refusal_is_told(toy_weights, tmp_path):
    executor = _executor(_program(ATTENTION), toy_weights, tmp_path, _Kernels(status=7))
    with pytest.raises(InternalError, match=r"paged attention failed: a block is missing \(status 7\)"):
        executor.run(_batch([3]))


def test_a_failing_node_is_named(toy_weights, tmp_path):
    nodes = [_node("logits", "aten.mm.default", _ref("embed"), _ref("head"))]
    with pytest.raises(InternalError, match=r"node logits \(aten.mm.default\) failed"):
        _executor(_program(nodes), toy_weights, tmp_path).run(_batch([3]))


@pytest.mark.parametrize(
    "op",
    [
        "os.system",
        "builtins.eval",
        "aten.mm",
        "aten.mm.nothing",
        "aten.nothing.default",
        "aten.__class__.default",
        "aten.mm.default.__call__",
        "aten.add_.Tensor",
        "aten.mm.out",
        "aten.from_file.default",
        "aten.manual_seed.default",
        "operator.setitem",
        "operator.attrgetter",
        "llmc.linear.default",
        "prims.add.default",
        "",
    ],
)
def test_ops_outside_the_list_are_refused_before_anything_runs(toy_weights, tmp_path, op):
    with pytest.raises(ArtifactError, match=r"node logits: op"):
        _executor(_program([_node("logits", op, _ref("embed"))]), toy_weights, tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "expected a node list"),
        (_program(PLAIN, format=2), "format 2; this runtime reads 1"),
        (_program(PLAIN, more=1), "unknown field"),
        (_program(PLAIN, inputs=NAMES[::-1]), "inputs are not those of the manifest"),
        (_program(PLAIN, constants={"embed": "nothing"}), "stands for tensor 'nothing'"),
        (_program(PLAIN, constants={"embed": "embed", "input_ids": "head"}), "share a name"),
        (_program(PLAIN[1:]), "refers to 'rows'"),
        (_program([*PLAIN, PLAIN[0]]), "defines 'rows' twice"),
        (_program(PLAIN, outputs=[]), "0 outputs"),
        (_program(PLAIN, outputs=[_ref("nothing")]), "the output 'nothing'"),
        (_program([_node("logits", "aten.mm.default", {"dtype": "load"})]), "is no value of a node list"),
        (_program([_node("logits", "aten.mm.default", {"device": "cuda"})]), "is no value of a node list"),
        (_program([_node("logits", "aten.mm.default", {"ref": "embed", "dtype": "float32"})]), "is no value of a node list"),
        (_program([_node("logits", "aten.mm.default", {})]), "is no value of a node list"),
        (_program([_node("logits", "aten.mm.default", {"ref": ["embed"]})]), "is no value of a node list"),
    ],
)
def test_broken_lists_are_refused(toy_weights, tmp_path, data, message):
    with pytest.raises(ArtifactError, match=message):
        _executor(data, toy_weights, tmp_path)


def test_the_struct_mirrors_the_header():
    """Field names and order, read from the header the kernels are built from."""
    header = (Path(__file__).parents[2] / "kernels/paged_attention/cpu/paged_attention.h").read_text()
    body = header.split("typedef struct llmc_paged_attention_args {")[1].split("}")[0]
    names = []
    for line in body.splitlines():
        declaration = line.split("//")[0].strip().rstrip(";")
        if declaration:
            kind, first, *rest = declaration.replace("const ", "").replace("*", "").replace(",", " ").split()
            names += [(name, kind) for name in (first, *rest)]
    sizes = {"uint32_t": 4, "int32_t": 4, "float": 4, "int64_t": 8, "void": 8}
    pointers = {"slot_mapping", "block_tables", "seq_lens", "query_start_loc"}
    mirrored = [(name, ctypes.sizeof(kind)) for name, kind in PagedAttentionArgs._fields_]
    assert mirrored == [(name, 8 if name in pointers else sizes[kind]) for name, kind in names]
