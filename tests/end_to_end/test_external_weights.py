"""`--weights external`: an artifact without weights serves any checkpoint of its shapes, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmc import LLM, ArtifactError, SamplingParams
from llmc.cli import main
from llmc.errors import ConfigError
from tests.architectures import save_tiny_model
from tests.end_to_end.served import CHUNKED, draw_prompts, generate
from tests.end_to_end.workshop import Workshop

GREEDY = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
PROMPTS = draw_prompts((3, 40, 17), 512, 3)


@pytest.fixture(scope="module")
def external(workshop: Workshop) -> Path:
    return workshop.artifact("qwen3", weights="external")


def test_same_tokens_as_with_embedded_weights(external: Path, workshop: Workshop) -> None:
    assert [path.name for path in external.rglob("*.safetensors")] == ["computed.safetensors"]  # rope tables
    embedded = generate(workshop.artifact("qwen3"), PROMPTS, GREEDY)
    bound = generate(external, PROMPTS, GREEDY, checkpoint=str(workshop.folder("qwen3")))
    assert [output.outputs[0].token_ids for output in bound] == [output.outputs[0].token_ids for output in embedded]


def test_another_checkpoint_of_the_same_shapes_answers_for_itself(external: Path, workshop: Workshop, tmp_path: Path) -> None:
    tuned = save_tiny_model("qwen3", tmp_path)
    with torch.no_grad():
        tuned.model.norm.weight.mul_(-1.0)  # type: ignore[union-attr, operator]
    tuned.save_pretrained(tmp_path)  # type: ignore[operator]
    ours = generate(external, PROMPTS[:1], GREEDY, checkpoint=str(tmp_path))[0].outputs[0].token_ids
    theirs = generate(external, PROMPTS[:1], GREEDY, checkpoint=str(workshop.folder("qwen3")))[0].outputs[0].token_ids
    assert ours != theirs
    with torch.no_grad():
        assert int(tuned(input_ids=torch.tensor(PROMPTS[:1])).logits[0, -1].argmax()) == ours[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 2}, "model.layers.2"),
        ({"intermediate_size": 96}, "belongs to another model"),
        ({"vocab_size": 500}, "belongs to another model"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(external: Path, tmp_path: Path, changes: dict[str, int], reason: str) -> None:
    save_tiny_model("qwen3", tmp_path, **changes)
    with pytest.raises(ArtifactError, match=reason):
        LLM(external, **CHUNKED, checkpoint=str(tmp_path))


def test_a_checkpoint_of_another_dtype_is_refused(external: Path, tmp_path: Path) -> None:
    save_tiny_model("qwen3", tmp_path, torch.bfloat16)
    with pytest.raises(ArtifactError, match="dtype|bfloat16|BF16"):
        LLM(external, **CHUNKED, checkpoint=str(tmp_path))


def test_a_checkpoint_must_be_named_and_only_where_it_is_needed(
    external: Path, workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="--checkpoint DIR"):
        LLM(external, **CHUNKED)
    with pytest.raises(ConfigError, match="carries its weights"):
        LLM(workshop.artifact("qwen3"), **CHUNKED, checkpoint=str(workshop.folder("qwen3")))
    assert main(["run", str(external), "hello"]) == 2
    assert "--checkpoint" in capsys.readouterr().err
