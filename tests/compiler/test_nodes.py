"""The node list: the same graph gives the same bytes, and running it gives the graph's answers."""

from __future__ import annotations

import json
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmc.kernels.ops  # noqa: F401  (registers the ops)
from llmc.compiler.capture import capture
from llmc.compiler.model import read_model
from llmc.compiler.nodes import constants_of, to_bytes, to_nodes
from llmc.errors import InternalError
from tests.architectures import save_tiny_model
from tests.compiler.paged_steps import PagedSteps
from tests.compiler.weights import load_constants, with_weights


def _interpret(program: dict[str, Any], constants: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    """The page docs/node_list.md, in 30 lines."""
    values: dict[str, Any] = dict(zip(program["inputs"], inputs, strict=True))
    values.update({local: constants[name] for local, name in program["constants"].items()})

    def value(item: Any) -> Any:
        if isinstance(item, list):
            return [value(part) for part in item]
        if not isinstance(item, dict):
            return item
        ((kind, word),) = item.items()
        if kind == "ref":
            return values[word]
        if kind == "float":
            return float(word)
        return torch.device(word) if kind == "device" else getattr(torch, word)

    for node in program["nodes"]:
        space, *path = node["op"].split(".")
        target: Any = operator if space == "operator" else getattr(torch.ops, space)
        for part in path:
            target = getattr(target, part)
        values[node["name"]] = target(*value(node["args"]), **{key: value(item) for key, item in node["kwargs"].items()})
    return value(program["outputs"][0])


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss"])
def test_running_the_node_list_gives_the_graphs_bits(name: str, tmp_path: Path) -> None:
    save_tiny_model(name, tmp_path, torch.bfloat16)
    source = read_model(tmp_path)
    traced = capture(source)
    constants = load_constants(source, traced.constants)
    program = json.loads(to_bytes(traced.graph))
    graph, steps = with_weights(traced.graph, constants), PagedSteps(traced.kv)
    work = [(0, list(range(3, 40))), (1, [7])]
    expected = steps.run(graph, work)
    found = PagedSteps(traced.kv).run(lambda *inputs: _interpret(program, constants, inputs), work)
    assert torch.equal(found, expected)


def test_two_captures_give_the_same_bytes(tmp_path: Path) -> None:
    save_tiny_model("qwen3", tmp_path, torch.bfloat16)
    first, second = (to_bytes(capture(read_model(tmp_path)).graph) for _ in range(2))
    assert first == second
    assert first.endswith(b"\n")
    assert b"/" not in first  # no path of this machine


def test_constants_are_listed_under_their_model_names(tmp_path: Path) -> None:
    save_tiny_model("qwen3", tmp_path)
    traced = capture(read_model(tmp_path))
    assert set(constants_of(traced.graph).values()) == set(traced.constants)
    assert to_nodes(traced.graph)["constants"] == constants_of(traced.graph)


def test_a_call_outside_the_list_is_refused() -> None:
    graph = torch.fx.Graph()
    graph.output(graph.call_function(print, (graph.placeholder("x"),)))
    with pytest.raises(InternalError, match="print"):
        to_nodes(torch.fx.GraphModule(torch.nn.Module(), graph))
