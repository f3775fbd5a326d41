"""llmc bisect: a planted wrong pass is found, right ones are not accused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch.fx import GraphModule

from llmc.artifacts.safetensors import Checkpoint
from llmc.compiler.bisect import Bisected, bisect, greedy
from llmc.compiler.capture import TracedModel, capture
from llmc.compiler.model import read_model
from llmc.compiler.packing import fetcher
from llmc.compiler.pipeline import pipeline
from llmc.errors import ConfigError
from llmc.passes import Numerics, Pass, PassContext, PassResult
from llmc.passes import graph as G
from tests.architectures import save_tiny_model

aten = torch.ops.aten
PROMPT = [5, 9, 21, 300, 7, 44, 45]


@dataclass(frozen=True)
class ForgetTheResidual(Pass):
    """A wrong pass: the last sum of the graph loses its first summand."""

    name: ClassVar[str] = "forget-the-residual"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        sums = [n for n in gm.graph.nodes if G.is_op(n, aten.add.Tensor) and isinstance(n.args[1], torch.fx.Node)]
        last = sums[-1]
        G.substitute(gm, last, last.args[1])
        G.erase_dead(gm)
        return PassResult(changed=True, matches=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[TracedModel, Path]:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_model("llama", folder, num_hidden_layers=2)
    return capture(read_model(folder), max_model_len=64), folder


def run(model: tuple[TracedModel, Path], passes: list[Pass]) -> tuple[Bisected, list[tuple[str, bool]]]:
    traced, folder = model
    told: list[tuple[str, bool]] = []
    with Checkpoint([folder / "model.safetensors"]) as checkpoint:
        found = bisect(
            traced, passes, lambda c: fetcher(c, checkpoint), PROMPT, new_tokens=6, observer=lambda name, same: told.append((name, same))
        )
    return found, told


def test_right_passes_are_not_accused(model: tuple[TracedModel, Path]) -> None:
    found, told = run(model, pipeline(2))
    assert (found.changed_by, found.found) == (None, None)
    assert len(found.expected) == 6
    assert told == [(p.name, True) for p in pipeline(2)]


@pytest.mark.parametrize("place", [0, 6])
def test_a_planted_wrong_pass_is_named(model: tuple[TracedModel, Path], place: int) -> None:
    passes = pipeline(2)
    planted = [*passes[:place], ForgetTheResidual(), *passes[place:]]
    found, told = run(model, planted)
    assert found.changed_by == "forget-the-residual"
    assert told == [*((p.name, True) for p in passes[:place]), ("forget-the-residual", False)]
    assert found.found is not None and found.found != found.expected
    assert found.expected[: found.position] == found.found[: found.position]
    assert found.expected[found.position] != found.found[found.position]
    assert found.margin > 0


def test_the_captured_graph_stays_as_it_is(model: tuple[TracedModel, Path]) -> None:
    traced, folder = model
    before = len(traced.graph.graph.nodes)
    run(model, [ForgetTheResidual()])
    assert len(traced.graph.graph.nodes) == before
    weights = load_file(folder / "model.safetensors")
    fetch = {name: c.value if c.value is not None else weights[c.recipe["name"]] for name, c in traced.constants.items()}
    assert greedy(traced, fetch.__getitem__, PROMPT, 6)[0] == run(model, [])[0].expected


def test_a_prompt_that_does_not_fit_is_refused(model: tuple[TracedModel, Path]) -> None:
    traced, _ = model
    for prompt in ([], [1] * 60):
        with pytest.raises(ConfigError, match="1 to 64 are possible"):
            bisect(traced, [], lambda c: lambda name: torch.empty(0), prompt, new_tokens=6, observer=lambda name, same: None)
