"""Artifacts that embed, against sentence-transformers' arithmetic on Hugging Face's hidden states: padded batches, masks, pooling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import llmc
from llmc.compiler.pooling import read_pooling
from llmc.config.compile import CompileConfig
from llmc.errors import ConfigError, RequestRejected, UnsupportedModel

if TYPE_CHECKING:
    from tests.end_to_end.workshop import Workshop

PROMPTS = [[5, 9, 300, 17, 42, 8, 101, 77, 3], [7], [11, 12, 13, 14], list(range(20, 75)), [5, 9, 300, 17]]
TIGHT: dict[str, Any] = {"threads": 1, "max_num_seqs": 3, "max_num_batched_tokens": 16, "num_blocks": 12}  # chunks and preemptions


def reference(workshop: Workshop, name: str, pooling: str, normalize: bool) -> np.ndarray:
    """What SentenceTransformer.encode computes: one padded batch, its mask, a pooling over it; float32 [prompts, hidden]."""
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([p + [0] * (longest - len(p)) for p in PROMPTS])
    mask = torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in PROMPTS])
    with torch.no_grad():
        states = workshop.reference(name).base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask.unsqueeze(-1).float()
    if pooling == "mean":
        vectors = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    elif pooling == "cls":
        vectors = states[:, 0]
    else:
        vectors = states[torch.arange(len(PROMPTS)), mask.sum(1) - 1]
    return (torch.nn.functional.normalize(vectors, dim=1) if normalize else vectors).numpy()


@pytest.mark.parametrize(
    ("name", "level", "pooling", "normalize"),
    [
        ("llama", 0, "mean", True),
        ("llama", 0, "last", False),
        ("qwen3", 0, "cls", True),
        ("gpt2", 0, "mean", False),
        pytest.param("qwen3", 2, "mean", True, marks=pytest.mark.slow),  # the lowering takes half a minute
    ],
)
def test_vectors_are_sentence_transformers(workshop: Workshop, name: str, level: int, pooling: str, normalize: bool) -> None:
    artifact = workshop.artifact(name, level=level, pooling=pooling, normalize=normalize)
    expected = reference(workshop, name, pooling, normalize)
    with llmc.LLM(artifact, **TIGHT) as llm:
        found = np.stack(llm.embed(PROMPTS))
        alone = np.stack([llm.embed(prompt)[0] for prompt in PROMPTS])
        assert llm.engine.stats().kv_blocks_used == 0
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    if level:
        assert np.array_equal(found, alone)  # the same bits in any batch, chunked or not
    if normalize:
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)


def test_each_task_refuses_the_other(workshop: Workshop) -> None:
    with llmc.LLM(workshop.artifact("llama", level=0, pooling="mean", normalize=True), **TIGHT) as llm:
        assert llm.engine.manifest.pooling is not None and llm.engine.manifest.canaries
        with pytest.raises(RequestRejected, match="compiled for embeddings"):
            llm.generate([[1, 2, 3]])
    with llmc.LLM(workshop.artifact("llama", level=0), **TIGHT) as llm, pytest.raises(RequestRejected, match="compiled for generating"):
        llm.embed([[1, 2, 3]])


def test_a_bare_decoder_will_do_for_embeddings_alone(workshop: Workshop, tmp_path: Path) -> None:
    """Checkpoints of embedding models often name the decoder and hold its tensors without a prefix."""
    workshop.reference("llama").base_model.save_pretrained(tmp_path / "bare")
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    assert config["architectures"] == ["LlamaModel"]
    from llmc.compiler.driver import compile_model

    out = tmp_path / "out"
    compile_model(CompileConfig(model=tmp_path / "bare", level=0, dtype="float32", pooling="last", out=out), store=workshop.store)
    with llmc.LLM(out, **TIGHT) as llm:
        np.testing.assert_allclose(np.stack(llm.embed(PROMPTS)), reference(workshop, "llama", "last", True), rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedModel, match="not a causal language model"):
        compile_model(CompileConfig(model=tmp_path / "bare", level=0, out=tmp_path / "text"), store=workshop.store)


def test_encoders_are_refused_by_name(workshop: Workshop, tmp_path: Path) -> None:
    from llmc.compiler.model import read_model

    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    with pytest.raises(UnsupportedModel, match="'bert' cannot be compiled: it is an encoder"):
        read_model(folder, embed=True)
    shutil.copytree(workshop.folder("llama"), tmp_path / "both")
    config = json.loads((tmp_path / "both" / "config.json").read_text())
    (tmp_path / "both" / "config.json").write_text(json.dumps({**config, "use_bidirectional_attention": True}))
    with pytest.raises(UnsupportedModel, match="it is an encoder"):
        read_model(tmp_path / "both", embed=True)


def test_what_cannot_be_had_is_refused() -> None:
    for settings in ({"quantization": "int8"}, {"target": "cuda:sm_90"}):
        with pytest.raises(ConfigError, match="leave it out|only CPU"):
            CompileConfig(model=Path("m"), out=Path("o"), pooling="mean", **settings)


def sentence_transformers(folder: Path, pooling: dict[str, Any], *more: str) -> Path:
    (folder / "1_Pooling").mkdir(parents=True)
    names = ["Transformer", "Pooling", *more]
    modules = [
        {"idx": i, "name": str(i), "path": "1_Pooling" if n == "Pooling" else "", "type": f"sentence_transformers.models.{n}"}
        for i, n in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **pooling}))
    return folder


def test_the_folder_says_how(tmp_path: Path) -> None:
    def read(folder: Path, pooling: str = "auto", normalize: str = "auto") -> tuple[str, bool]:
        facts = read_pooling(folder, pooling=pooling, normalize=normalize)
        return facts.kind, facts.normalize

    mean = sentence_transformers(tmp_path / "a", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False})
    last = sentence_transformers(tmp_path / "b", {"pooling_mode_lasttoken": True, "include_prompt": True}, "Normalize")
    newer = sentence_transformers(tmp_path / "c", {"pooling_mode": "cls"}, "Normalize")
    assert [read(f) for f in (mean, last, newer, tmp_path)] == [("mean", False), ("last", True), ("cls", True), ("last", True)]
    assert read(mean, "cls", "yes") == ("cls", True) and read(last, normalize="no") == ("last", False)


@pytest.mark.parametrize(
    ("pooling", "more", "match"),
    [
        ({"pooling_mode_max_tokens": True}, (), "pooling by pooling_mode_max_tokens is not built"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, (), "pooling by cls, mean is not built"),
        ({}, (), "pooling by nothing is not built"),
        ({"pooling_mode_mean_tokens": True}, ("Dense",), "the module Dense is not built"),
    ],
)
def test_what_the_folder_wants_and_llmc_has_not(tmp_path: Path, pooling: dict[str, Any], more: tuple[str, ...], match: str) -> None:
    with pytest.raises(UnsupportedModel, match=match):
        read_pooling(sentence_transformers(tmp_path / "m", pooling, *more), pooling="auto", normalize="auto")


def test_damaged_folders(tmp_path: Path) -> None:
    folder = sentence_transformers(tmp_path / "m", {"pooling_mode_mean_tokens": True})
    modules = (folder / "modules.json").read_text()
    for text, match in (
        ("{", "not valid JSON"),
        ("{}", "expected a list"),
        (modules.replace("1_Pooling", "../x"), "not a folder beside it"),
    ):
        (folder / "modules.json").write_text(text)
        with pytest.raises(UnsupportedModel, match=match):
            read_pooling(folder, pooling="auto", normalize="auto")
    (folder / "modules.json").write_text(modules)
    (folder / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    with pytest.raises(UnsupportedModel, match="do_lower_case"):
        read_pooling(folder, pooling="auto", normalize="auto")
