"""One model run by two processes: the tokens of one, and what happens when a rank is lost or a request makes no sense."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from llmc import LLM, SamplingParams
from llmc.artifacts.verify import open_artifact
from llmc.config.compile import CompileConfig
from llmc.errors import ConfigError, InternalError, UnsupportedModel
from tests.end_to_end.served import CHUNKED, Recorder, draw_prompts, generate
from tests.end_to_end.workshop import Workshop
from tests.server.running import alive, children

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.mark.parametrize("name", ["qwen3", pytest.param("llama", marks=pytest.mark.slow)])
def test_two_ranks_give_the_tokens_of_one(workshop: Workshop, name: str) -> None:
    prompts = draw_prompts([3, 17, 40, 61, 9, 30], 512, 1)
    alone = generate(workshop.artifact(name), prompts, GREEDY)
    recorder = Recorder()
    together = generate(workshop.artifact(name, tensor_parallel_size=2), prompts, GREEDY, recorder=recorder)
    assert [output.outputs[0].token_ids for output in together] == [output.outputs[0].token_ids for output in alone]
    assert recorder.mixed > 0  # prompts in chunks beside decoding sequences


def test_an_artifact_holds_each_ranks_own_part(workshop: Workshop) -> None:
    whole, shared = workshop.artifact("qwen3"), workshop.artifact("qwen3", tensor_parallel_size=2)
    with open_artifact(shared) as artifact:
        manifest = artifact.manifest
    assert manifest.tensor_parallel_size == 2 and [entry.name for entry in manifest.entries] == ["step", "step.rank1"]
    assert manifest.kv.num_kv_heads == [1, 1, 1]
    own = [{name for name in entry.constants.values() if name.startswith("rank")} for entry in manifest.entries]
    assert own[0] and {name.replace("rank0/", "rank1/") for name in own[0]} == own[1]
    files = {tensor.file for tensor in manifest.tensors if tensor.name in own[1]}
    assert files == {"weights/rank1.safetensors"}
    with open_artifact(whole) as artifact:
        assert artifact.manifest.tensor_parallel_size == 1
        one = sum(tensor.nbytes for tensor in artifact.manifest.tensors)
    assert sum(tensor.nbytes for tensor in manifest.tensors) == one  # divided, not repeated


def test_a_lost_rank_ends_the_step_with_an_error_and_no_process_stays(workshop: Workshop) -> None:
    with LLM(workshop.artifact("qwen3", tensor_parallel_size=2), **CHUNKED) as llm:
        (rank,) = [pid for pid in children(os.getpid()) if b"llmc.runtime.parallel.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(llm.generate([[5, 6, 7]], GREEDY)[0].outputs[0].token_ids) == 24
        os.kill(rank, signal.SIGKILL)
        with pytest.raises(InternalError, match=r"rank 1 is gone|all_reduce"):
            llm.generate([[5, 6, 7]], GREEDY)
    assert not alive(rank)


def test_what_is_not_built_is_refused_by_name(tmp_path: Path, workshop: Workshop) -> None:
    for other in ({"level": 3}, {"quantization": "int8"}, {"weights": "external"}, {"target": "cuda:h200"}, {"kv_cache_dtype": "fp8"}):
        with pytest.raises(ConfigError, match="--tensor-parallel-size 2"):
            CompileConfig(model=tmp_path, out=tmp_path, tensor_parallel_size=2, **other)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match="--tensor-parallel-size 3: query or KV heads do not divide by the ranks"):
        workshop.artifact("qwen3", tensor_parallel_size=3)


def test_a_manifest_whose_ranks_lack_an_entry_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    import msgspec

    from llmc.artifacts.consistency import check_manifest
    from llmc.artifacts.manifest import Manifest

    manifest = msgspec.json.decode((workshop.artifact("qwen3", tensor_parallel_size=2) / "manifest.json").read_bytes(), type=Manifest)
    check_manifest(manifest, "manifest.json")
    with pytest.raises(Exception, match="2 ranks with the entries step, expected one for each rank"):
        check_manifest(msgspec.structs.replace(manifest, entries=manifest.entries[:1]), "manifest.json")
