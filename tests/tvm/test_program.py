"""A program that TVM compiled: a row's bits, its image, what it imports, and what is refused."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from llmc.artifacts.manifest import Manifest
from llmc.artifacts.requirements import Machine, check_requirements, this_machine
from llmc.artifacts.verify import open_artifact
from llmc.compiler.driver import compile_model
from llmc.compiler.input_key import toolchain
from llmc.compiler.targets import find_target
from llmc.config.compile import CompileConfig
from llmc.errors import ArtifactError, ConfigError, InternalError, UnsupportedModel
from llmc.runtime.batch import BatchBuilder
from llmc.runtime.engine_config import EngineConfig
from llmc.runtime.executors.tvm import TvmExecutor
from llmc.runtime.load import load_model
from llmc.runtime.messages import SamplingParams
from llmc.runtime.step import Executor, ScheduledSequence
from tests.architectures import save_tiny_model
from tests.end_to_end.workshop import Workshop

needs_tvm = pytest.mark.skipif(importlib.util.find_spec("tvm") is None, reason="needs the extra tvm: pip install 'llmc[tvm]'")
PROMPT, OTHER = list(range(5, 26)), list(range(100, 137))


def manifest_of(artifact: Path) -> Manifest:
    with open_artifact(artifact) as opened:
        return opened.manifest


def share(name: str, token_ids: list[int], start: int, end: int, blocks: list[int]) -> ScheduledSequence:
    return ScheduledSequence(
        request_id=name, token_ids=token_ids, num_prompt_tokens=len(token_ids), start=start, end=end, block_ids=(blocks,),
        sampling=SamplingParams(), needs_prompt_logprobs=False,
    )  # fmt: skip


def steps(executor: Executor, builder: BatchBuilder, *batches: list[ScheduledSequence]) -> list[np.ndarray]:
    return [executor.run(builder.build(batch).batch).to_float32().copy() for batch in batches]


@needs_tvm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_company(dtype: torch.dtype, workshop: Workshop) -> None:
    model = load_model(EngineConfig(artifact=str(workshop.artifact("qwen3", dtype=dtype, backend="tvm")), threads=1))
    run = lambda *batches: steps(model.executor, model.builder, *batches)  # noqa: E731
    (alone,) = run([share("a", PROMPT, 0, 21, [1, 2])])
    (company,) = run([share("b", OTHER, 0, 37, [3, 4, 5]), share("a", PROMPT, 0, 21, [6, 7])])
    chunked = run([share("a", PROMPT, 0, 4, [8, 9])], [share("b", OTHER, 0, 9, [10, 11]), share("a", PROMPT, 4, 20, [8, 9])],
                  [share("a", PROMPT, 20, 21, [8, 9]), share("b", OTHER, 9, 17, [10, 11])])  # fmt: skip
    np.testing.assert_array_equal(company[1], alone[0])
    np.testing.assert_array_equal(chunked[-1][0], alone[0])
    model.executor.close()
    with pytest.raises(InternalError, match="before the KV cache was allocated"):
        run([share("a", PROMPT, 0, 21, [1, 2])])


@needs_tvm
def test_the_manifest_names_compiler_runtime_and_kernels(workshop: Workshop) -> None:
    manifest = manifest_of(workshop.artifact("qwen3", backend="tvm"))
    (entry,) = manifest.entries
    assert entry.executor == "tvm" and manifest.settings["backend"] == "tvm"
    assert manifest.toolchain["apache-tvm"].startswith(f"{manifest.requirements.tvm}.")
    assert manifest.requirements.torch is None and sorted(image.role for image in manifest.images) == ["kernels", "model"]
    chosen = manifest.op_implementations
    assert chosen["everything else"].startswith("TVM") and {"llmc.linear", "llmc.embedding", "llmc.paged_attention"} <= set(chosen)


@needs_tvm
def test_serving_imports_neither_tvm_nor_torch(workshop: Workshop) -> None:
    program = """
        import sys
        from llmc.runtime.engine_config import EngineConfig
        from llmc.runtime.load import load_model
        model = load_model(EngineConfig(artifact=sys.argv[1]))
        assert model.num_canary_tokens > 0
        print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "tvm", "tvm_ffi", "sympy", "transformers", "triton"}))
        print(any("libtvm_compiler" in line for line in open("/proc/self/maps")))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(workshop.artifact("qwen3", backend="tvm"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["[]", "False"]


@needs_tvm
def test_an_image_and_a_manifest_that_disagree_are_refused(workshop: Workshop) -> None:
    model = load_model(EngineConfig(artifact=str(workshop.artifact("qwen3", backend="tvm")), threads=1))
    executor = model.executor
    assert isinstance(executor, TvmExecutor)
    entry, image, weights = executor._entry, executor._image, executor._weights
    make = lambda **changes: TvmExecutor(  # noqa: E731
        entry=msgspec.structs.replace(entry, **changes), kv=model.manifest.kv, image=image, weights=weights, num_threads=1
    )
    with pytest.raises(ArtifactError, match="inputs and constants, the manifest names"):
        make(inputs=entry.inputs[:-1])
    with pytest.raises(ArtifactError, match="no input named 'adapters'"):
        make(inputs=[*entry.inputs, msgspec.structs.replace(entry.inputs[0], name="adapters")])
    with pytest.raises(ArtifactError, match="not numbered from 0 without gaps"):
        make(constants={"1": entry.constants["0"]})
    with pytest.raises(ArtifactError, match="no weight is bound"):
        make(constants={**entry.constants, "0": "nothing"})
    swapped = make(constants={**entry.constants, "0": entry.constants["3"], "3": entry.constants["0"]})
    swapped.allocate_kv(8)
    with pytest.raises(InternalError, match="failed in a step of 21 tokens"):
        swapped.run(model.builder.build([share("a", PROMPT, 0, 21, [1, 2])]).batch)
    swapped.close()
    executor.close()


@needs_tvm
def test_a_model_with_an_op_without_a_converter_is_refused_by_its_name(tmp_path: Path) -> None:
    save_tiny_model("mixtral", tmp_path / "model", num_hidden_layers=1)
    with pytest.raises(
        UnsupportedModel, match=r"--backend tvm: no converter to TVM for .*llmc\.grouped_linear\.default.*--backend inductor"
    ):
        compile_model(CompileConfig(model=tmp_path / "model", backend="tvm", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@needs_tvm
def test_two_compiles_in_different_folders_give_the_same_bytes(tmp_path: Path) -> None:
    from llmc.compiler.capture import capture
    from llmc.compiler.model import read_model
    from llmc.compiler.pipeline import pipeline
    from llmc.compiler.tvm.lower import lower_tvm
    from llmc.kernels.isa import resolve_target
    from llmc.passes import PassContext, run_passes

    save_tiny_model("llama", tmp_path / "model", torch.bfloat16, num_hidden_layers=1)
    traced = capture(read_model(tmp_path / "model"))
    run_passes(traced.graph, pipeline(2, backend="tvm"), PassContext(weights=traced.weight_table(), max_positions=traced.max_model_len))
    (tmp_path / "elsewhere").mkdir()
    target = resolve_target("cpu:x86-64-v3")
    first, second = (lower_tvm(traced.graph, target, folder / "image.so") for folder in (tmp_path, tmp_path / "elsewhere"))
    assert first.sha256 == second.sha256
    assert str(tmp_path).encode() not in first.path.read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "cuda:sm_90"}, "compiles for CPUs, not cuda:sm_90"),
        ({"level": 0}, "at -O0 no program of TVM's is built"),
        ({"level": 3}, "at -O3 no program of TVM's is built"),
        ({"quantization": "int8"}, "with --quantization is not built"),
        ({"kv_cache_dtype": "int8"}, "with --kv-cache-dtype of 8 bits is not built"),
        ({"pooling": "mean"}, "with --task embed is not built"),
        ({"tensor_parallel_size": 2}, "with --tensor-parallel-size is not built"),
    ],
)
def test_what_is_not_built_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--backend tvm.*{message}"):
        CompileConfig(model=tmp_path, out=tmp_path / "out", backend="tvm", **changes)  # type: ignore[arg-type]


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.compiler.input_key.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^--backend tvm needs apache-tvm .* not installed; pip install 'llmc\[tvm\]'$"):
        toolchain(find_target("cpu"), "tvm")


@needs_tvm
def test_another_tvm_than_the_compilers_is_refused_before_anything_is_mapped(workshop: Workshop) -> None:
    needs = manifest_of(workshop.artifact("qwen3", backend="tvm")).requirements
    here = this_machine()
    check_requirements(needs, here, "here")
    for version, said in (("0.1", "apache-tvm 0.1 is installed"), (None, "no apache-tvm is installed")):
        machine = Machine(name=here.name, cpu_features=here.cpu_features, torch=here.torch, tvm=version)
        with pytest.raises(ArtifactError, match=rf"{said}; pip install 'apache-tvm=={needs.tvm}"):
            check_requirements(needs, machine, "here")
