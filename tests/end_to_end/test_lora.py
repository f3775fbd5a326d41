"""LoRA adapters served beside their model: the tokens of the merged model, the same bits alone and in company, and no leaks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmc import LLM, LoRARequest, SamplingParams
from llmc.artifacts.verify import open_artifact
from llmc.config.compile import CompileConfig
from llmc.errors import ConfigError, RequestRejected, UnsupportedModel
from llmc.runtime.step import StepPlan
from tests.end_to_end.served import CHUNKED, Recorder, continuation, draw_prompts
from tests.end_to_end.workshop import Workshop
from tests.lora_adapters import draw, merged, write_adapter

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = draw_prompts([9, 17, 30], 512, 4)
LORA: dict[str, Any] = {"max_loras": 2, "max_lora_rank": 8}
CASES = [("llama", 2), ("qwen3", 0), ("gemma3_text", 0)]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in (("llama", 0), ("qwen3", 2), ("gemma3_text", 2), ("qwen2", 2))]


def adapter(workshop: Workshop, name: str, which: str, **drawn: Any) -> LoRARequest:
    """Adapter `which` of a tiny model, made once."""
    folder = workshop.root / "adapters" / f"{name}-{which}"
    tensors = draw(workshop.reference(name), seed=ord(which[0]), **drawn)
    if not folder.exists():
        write_adapter(folder, tensors, r=drawn.get("rank", 4))
    return LoRARequest(which, ord(which[0]), str(folder))


def served(llm: LLM, requests: Sequence[LoRARequest | None], prompts: Sequence[list[int]] = PROMPTS) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in llm.generate(list(prompts), GREEDY, lora_request=list(requests))]


@pytest.mark.parametrize("name, level", CASES)
def test_one_batch_gives_the_merged_models_tokens(workshop: Workshop, name: str, level: int) -> None:
    reference = workshop.reference(name)
    requests = [None, adapter(workshop, name, "a"), adapter(workshop, name, "b")]
    models = [reference, *(merged(reference, draw(reference, seed=ord(which))) for which in "ab")]
    expected = [continuation(model, prompt, 12).tokens for model, prompt in zip(models, PROMPTS, strict=True)]
    recorder = Recorder()
    with LLM(workshop.artifact(name, level=level, **LORA), enable_lora=True, **CHUNKED) as llm:
        recorder.watch(llm)
        assert served(llm, requests) == expected
    assert recorder.mixed > 0  # one adapter's prompt beside another's decoding
    assert len({tuple(tokens) for tokens in expected}) == 3 and continuation(reference, PROMPTS[1], 12).tokens != expected[1]


def logits_of(artifact: Path, requests: Sequence[LoRARequest | None], prompts: Sequence[list[int]], **options: Any) -> list[np.ndarray]:
    recorder = Recorder()
    with LLM(artifact, **{"enable_lora": True, **CHUNKED, **options}) as llm:
        recorder.watch(llm)
        served(llm, requests, prompts)
    return [np.stack(recorder.logits[f"{index}.0"]) for index in range(len(prompts))]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_company_changes_no_bit(workshop: Workshop, dtype: torch.dtype) -> None:
    artifact = workshop.artifact("llama", dtype=dtype, **LORA)
    requests = [None, adapter(workshop, "llama", "a"), adapter(workshop, "llama", "b")]
    together = logits_of(artifact, requests, PROMPTS)
    for index, (request, prompt) in enumerate(zip(requests, PROMPTS, strict=True)):
        (alone,) = logits_of(artifact, [request], [prompt], max_num_batched_tokens=64)
        assert np.array_equal(alone, together[index]), f"request {index}"
    with LLM(artifact, **CHUNKED) as llm:  # no adapters at all
        recorder = Recorder()
        recorder.watch(llm)
        llm.generate([PROMPTS[0]], GREEDY)
    assert np.array_equal(np.stack(recorder.logits["0.0"]), together[0])


def test_the_plain_artifact_gives_the_models_own_rows_the_same_bits(workshop: Workshop) -> None:
    def base_rows(artifact: Path, **options: Any) -> np.ndarray:
        recorder = Recorder()
        with LLM(artifact, **{**CHUNKED, **options}) as llm:
            recorder.watch(llm)
            llm.generate([PROMPTS[0]], GREEDY)
        return np.stack(recorder.logits["0.0"])

    assert np.array_equal(base_rows(workshop.artifact("llama")), base_rows(workshop.artifact("llama", **LORA), enable_lora=True))


def most_slots(llm: LLM) -> list[int]:
    """How many adapters each step uses from now on; the scheduler's books are checked with each."""
    scheduler, counts = llm.engine._scheduler, [0]
    plan = scheduler.plan

    def counted() -> StepPlan:
        made = plan()
        scheduler.check()
        counts.append(len({s.lora_slot for s in made.sequences} - {-1}))
        return made

    scheduler.plan = counted  # type: ignore[method-assign]
    return counts


def test_more_adapters_than_slots_take_turns(workshop: Workshop) -> None:
    artifact, names = workshop.artifact("llama", **LORA), "abcde"
    requests = [adapter(workshop, "llama", which) for which in names]
    prompts = [PROMPTS[0]] * len(names)
    with LLM(artifact, enable_lora=True, **CHUNKED) as llm:
        alone = [served(llm, [request], prompts[:1])[0] for request in requests]
    assert len({tuple(tokens) for tokens in alone}) == len(names)
    for options in ({"max_loras": 1}, {}, {"max_loras": 1, "max_cpu_loras": 1}):
        with LLM(artifact, enable_lora=True, **CHUNKED, **options) as llm:
            most = most_slots(llm)
            again = served(llm, [*requests, *requests[::-1], None], [*prompts, *prompts, prompts[0]])
            assert again[:5] == alone and again[5:10] == alone[::-1]
            assert max(most) == options.get("max_loras", 2)


def test_the_prefix_cache_keeps_adapters_apart(workshop: Workshop) -> None:
    artifact = workshop.artifact("llama", **LORA)
    a, b = adapter(workshop, "llama", "a"), adapter(workshop, "llama", "b")
    prompt = draw_prompts([70], 512, 9)[0]
    with LLM(artifact, enable_lora=True, enable_prefix_caching=False, **CHUNKED) as llm:
        expected = [served(llm, [one], [prompt])[0] for one in (None, a, b)]
    with LLM(artifact, enable_lora=True, **CHUNKED) as llm:
        for one, tokens in zip((None, a, b), expected, strict=True):
            first = llm.generate([prompt], GREEDY, lora_request=one)[0]
            assert first.num_cached_tokens == 0 and first.outputs[0].token_ids == tokens
            again = llm.generate([prompt], GREEDY, lora_request=one)[0]
            assert again.num_cached_tokens == 64 and again.outputs[0].token_ids == tokens


def test_guesses_are_checked_with_the_adapter(workshop: Workshop) -> None:
    artifact = workshop.artifact("llama", **LORA)
    requests = [None, adapter(workshop, "llama", "a"), adapter(workshop, "llama", "b")]
    prompts = [prompt * 3 for prompt in PROMPTS]
    with LLM(artifact, enable_lora=True, **CHUNKED) as llm:
        expected = served(llm, requests, prompts)
    for guesses in (
        {"method": "ngram", "num_speculative_tokens": 3},
        {"model": str(workshop.artifact("llama")), "num_speculative_tokens": 2},
    ):
        with LLM(artifact, enable_lora=True, speculative_config=guesses, **CHUNKED) as llm:
            assert served(llm, requests, prompts) == expected


@pytest.mark.slow
def test_quantised_weights_keep_their_terms(workshop: Workshop) -> None:
    artifact = workshop.artifact("llama", quantization="int8", **LORA)
    request = adapter(workshop, "llama", "a")
    with LLM(artifact, enable_lora=True, **CHUNKED) as llm:
        plain, adapted = served(llm, [None, request], PROMPTS[:1] * 2)
    assert plain != adapted
    together = logits_of(artifact, [None, request], PROMPTS[:2])
    (alone,) = logits_of(artifact, [request], PROMPTS[1:2])
    assert np.array_equal(alone, together[1])


def test_some_targets_alone(workshop: Workshop) -> None:
    targets = ("q_proj", "v_proj", "down_proj")
    artifact = workshop.artifact("llama", level=0, lora_target_modules=targets, lora_dtype="float32", **LORA)
    reference = workshop.reference("llama")
    request = adapter(workshop, "llama", "small", targets=targets, rank=8)
    expected = continuation(merged(reference, draw(reference, seed=ord("s"), targets=targets, rank=8), 1.0), PROMPTS[2], 12).tokens
    with LLM(artifact, enable_lora=True, **CHUNKED) as llm:
        assert served(llm, [request], PROMPTS[2:]) == [expected]
        with pytest.raises(ConfigError, match=r"for which this artifact has no room; it has down_proj, q_proj, v_proj: compile with"):
            served(llm, [adapter(workshop, "llama", "a")], PROMPTS[:1])
    with open_artifact(artifact) as opened:
        facts = opened.manifest.lora
    assert facts is not None and facts.max_loras == 2 and facts.max_rank == 8
    assert [module.name for module in facts.modules][:3] == [
        f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    ]


def test_an_adapter_that_is_removed_ends_with_its_requests(workshop: Workshop) -> None:
    request = adapter(workshop, "llama", "a")
    with LLM(workshop.artifact("llama", **LORA), enable_lora=True, **CHUNKED) as llm:
        before = served(llm, [request], PROMPTS[:1])
        llm.engine.remove_adapter("a")
        with pytest.raises(RequestRejected, match="no adapter 'a'"):
            served(llm, [request], PROMPTS[:1])
        other = LoRARequest("a2", 7, request.lora_path)
        assert served(llm, [other], PROMPTS[:1]) == before


def test_what_does_not_fit_is_refused_by_name(workshop: Workshop, tmp_path: Path) -> None:
    request = adapter(workshop, "llama", "a")
    with pytest.raises(ConfigError, match=r"--enable-lora: .* was compiled without room for adapters; compile it with"):
        LLM(workshop.artifact("llama"), enable_lora=True, **CHUNKED)
    lora = workshop.artifact("llama", **LORA)
    with pytest.raises(ConfigError, match=r"max_loras=3 is above the 2 this artifact was compiled for; .*--max-loras 3"):
        LLM(lora, enable_lora=True, max_loras=3, **CHUNKED)
    with pytest.raises(ConfigError, match="--max-cpu-loras 1 is below the 2 adapters"):
        LLM(lora, enable_lora=True, max_cpu_loras=1, **CHUNKED)
    with LLM(lora, **CHUNKED) as llm, pytest.raises(RequestRejected, match="started without --enable-lora"):
        served(llm, [request], PROMPTS[:1])
    with LLM(lora, enable_lora=True, **CHUNKED) as llm:
        served(llm, [request], PROMPTS[:1])
        with pytest.raises(RequestRejected, match="give the one of another folder another name"):
            served(llm, [LoRARequest("a", 1, "elsewhere")], PROMPTS[:1])
    for other in ({"tensor_parallel_size": 2}, {"pooling": "mean"}, {"target": "cuda:h200"}):
        with pytest.raises(ConfigError, match="--enable-lora"):
            CompileConfig(model=tmp_path, out=tmp_path, max_loras=1, **other)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"--lora-target-modules w_proj: the model has no such linear; it has down_proj, gate_proj"):
        workshop.artifact("llama", max_loras=1, lora_target_modules=("w_proj",))
    with pytest.raises(UnsupportedModel, match="no layer of this model has a linear"):
        workshop.artifact("gpt2", max_loras=1)
