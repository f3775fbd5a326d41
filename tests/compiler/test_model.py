"""Reading a model folder: what is taken from it, and what is refused with which sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from llmc.cli.compile import text_side
from llmc.compiler.model import read_model
from llmc.compiler.supported import SUPPORTED
from llmc.compiler.template_reference import reference_texts
from llmc.compiler.tokenizer_files import PROBES, generation_defaults, read_tokenizer, template_parity
from llmc.config.compile import CompileConfig
from llmc.errors import ArtifactError, ConfigError, UnsupportedModel
from tests.architectures import NAMES, save_tiny_model, tiny_config

DEMO_MODEL = Path(__file__).parents[2] / "examples" / "demo_model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_model("qwen3", tmp_path, torch.bfloat16)
    return tmp_path


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_facts_of_a_folder(folder: Path) -> None:
    source = read_model(folder)
    assert (source.model_type, source.architecture, source.dtype) == ("qwen3", "Qwen3ForCausalLM", "bfloat16")
    assert (source.num_layers, source.hidden_size, source.vocab_size, source.max_position_embeddings) == (3, 64, 512, 512)
    assert (source.eos_token_ids, source.bos_token_id, source.pad_token_id, source.tied_embeddings) == ((2,), 1, 0, True)
    embedding = source.tensors["model.embed_tokens.weight"]
    assert (embedding.dtype, embedding.shape, embedding.nbytes) == ("BF16", (512, 64), 512 * 64 * 2)


def test_every_supported_type_has_a_tiny_model() -> None:
    assert {tiny_config(name).model_type for name in NAMES} == SUPPORTED


def test_generation_config_wins_for_the_end_of_text(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9, 7]}')
    assert read_model(folder).eos_token_ids == (7, 9)


def test_dtype_auto_falls_back_to_the_checkpoints_own(folder: Path) -> None:
    _edit(folder, dtype=None)
    assert read_model(folder).dtype == "bfloat16"
    assert read_model(folder, dtype="float32").dtype == "float32"


def test_unknown_dtype_lists_the_known_ones(folder: Path) -> None:
    with pytest.raises(ConfigError, match="accepted: auto, bfloat16, float16, float32"):
        read_model(folder, dtype="fp8")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.FalconConfig, "attends through classes of its own"),
        (transformers.BloomConfig, "ALiBi"),
        (transformers.MptConfig, "ALiBi"),
        (transformers.MambaConfig, "recurrent state"),
        (transformers.JambaConfig, "recurrent state"),
        (transformers.T5Config, "encoder-decoder"),
        (transformers.ViTConfig, "more than text"),
        (transformers.LlavaConfig, "more than text"),
        (transformers.CohereConfig, "has not been taught"),
    ],
)
def test_unsupported_models_are_refused_by_name(config: Callable[[], Any], reason: str, tmp_path: Path) -> None:
    made = config()
    made.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        read_model(tmp_path)
    assert repr(made.model_type) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised .*'bitsandbytes'"),
        ({"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "runs no code from a model folder"),
        ({"model_type": None}, "no model_type"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "not a causal language model"),
        ({"vocab_size": -3}, "vocab_size is -3"),
        ({"num_hidden_layers": "many"}, "does not accept it"),
    ],
)
def test_wrong_configurations_are_refused(changes: dict[str, Any], sentence: str, folder: Path) -> None:
    _edit(folder, **changes)
    with pytest.raises(UnsupportedModel, match=sentence):
        read_model(folder)


def test_pickled_weights_are_refused_with_the_way_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match=r"pytorch_model.bin, a pickle.*save_pretrained"):
        read_model(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(file: str, folder: Path) -> None:
    (folder / file).unlink()
    with pytest.raises(UnsupportedModel, match=file):
        read_model(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        read_model(tmp_path / "absent")


def test_a_cut_checkpoint_is_refused(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ArtifactError, match=r"model.safetensors"):
        read_model(folder)


def test_shards_are_read_through_their_index(folder: Path) -> None:
    _shard(folder, {"a.weight": "one.safetensors", "b.weight": "two.safetensors"})
    assert {name: t.file for name, t in read_model(folder).tensors.items()} == {
        "a.weight": "one.safetensors",
        "b.weight": "two.safetensors",
    }


@pytest.mark.parametrize(
    ("weight_map", "sentence"),
    [
        ({"a.weight": "../one.safetensors"}, "not the plain name"),
        ({"a.weight": "three.safetensors"}, "three.safetensors: no such file"),
        ({"a.weight": "two.safetensors"}, "'a.weight' is not in 'two.safetensors'"),
        ({"a.weight": 7}, "expected an object weight_map"),
    ],
)
def test_a_wrong_index_is_refused(weight_map: dict[str, Any], sentence: str, folder: Path) -> None:
    _shard(folder, weight_map)
    with pytest.raises(UnsupportedModel, match=sentence):
        read_model(folder)


def _shard(folder: Path, weight_map: dict[str, Any]) -> None:
    (folder / "model.safetensors").unlink()
    save_file({"a.weight": torch.zeros(4, dtype=torch.bfloat16)}, folder / "one.safetensors")
    save_file({"b.weight": torch.zeros(4, dtype=torch.bfloat16)}, folder / "two.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("ids", [[2, 512], [-1], "2"])
def test_an_end_of_text_that_the_model_cannot_write_is_refused(ids: Any, folder: Path) -> None:
    """It would be an index past the logits when a request sets min_tokens."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(UnsupportedModel, match="eos_token_id is .* expected a token id from 0 to 511"):
        read_model(folder)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts"])
def test_a_thousand_million_layers_are_refused_at_once(key: str, folder: Path) -> None:
    _edit(folder, **{key: 10**9, "layer_types": None})
    with pytest.raises(UnsupportedModel, match=f"{key} is 1000000000, more than the 10000"):
        read_model(folder)


def test_a_pipe_is_no_checkpoint(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"no \*\.safetensors file"):
        read_model(folder)


@pytest.mark.parametrize("template", ["{{ range(10**9) }}", "{{ 'a' * 10**11 }}", "{{ messages.a.b }}"])
def test_a_template_may_fail_in_any_way(template: str) -> None:
    """Jinja2 lets Python's errors through. The compile goes on, and the manifest says how the engines compare."""

    def refuses(*_: Any) -> str:
        raise ValueError("refused")

    assert template_parity(template, {}, refuses) == "same"
    assert template_parity(template, {}, lambda *_: "text") == "differs"


def test_a_template_that_never_ends_is_refused() -> None:
    """Jinja2 counts no steps; whichever engine reads it, the compile comes to an end."""
    loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
    with pytest.raises(UnsupportedModel, match="within 3 s of processor time"):
        reference_texts(loops, {}, PROBES, cpu_s=3)


def test_formats_of_replies_are_chosen_for_the_artifact(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes((DEMO_MODEL / "tokenizer.json").read_bytes())
    (folder / "chat_template.jinja").write_text("{# [INST] [TOOL_CALLS] #}")

    def names(**settings: str) -> list[str | None]:
        side = text_side(CompileConfig(model=folder, out=folder / "out", **settings))  # type: ignore[arg-type]
        bundle = read_tokenizer(folder, eos_token_ids=(2,), bos_token_id=None, pad_token_id=None, text=side)
        assert bundle.facts.reply_formats == "tokenizer/reply_formats.json"
        found = json.loads(bundle.files[bundle.facts.reply_formats])
        return [found[part] and found[part]["name"] for part in ("reasoning", "tools")]

    assert names() == [None, "mistral"]
    assert names(reasoning_parser="qwen3", tool_call_parser="none") == ["qwen3", None]
    with pytest.raises(ConfigError, match="--task embed has no replies"):
        CompileConfig(model=folder, out=folder / "out", tool_call_parser="hermes", pooling="mean")


def test_sampling_defaults_that_a_request_could_not_ask_for_are_refused() -> None:
    assert generation_defaults({"temperature": 0.6, "top_k": 20, "do_sample": True, "eos_token_id": 2}) == {"temperature": 0.6, "top_k": 20}
    assert generation_defaults({"top_p": 0.9, "do_sample": False}) == {"temperature": 0.0}
    for wrong in ({"top_k": -99}, {"temperature": "warm"}, {"top_p": 0}, {"max_new_tokens": 0}, {"min_p": True}):
        with pytest.raises(UnsupportedModel, match=f"generation_config.json: {next(iter(wrong))} is"):
            generation_defaults(wrong)
