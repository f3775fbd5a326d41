"""`llmc compile` when things go wrong, twice, at once, or are only asked about."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from llmc.artifacts.stamps import cache_root
from llmc.artifacts.store import Store
from llmc.artifacts.verify import open_artifact, verify
from llmc.artifacts.writer import artifact_digest
from llmc.cli import main
from llmc.compiler.driver import compile_model
from llmc.config.compile import CompileConfig
from llmc.kernels.build import build_kernels
from llmc.kernels.isa import resolve_target
from tests.architectures import save_tiny_model
from tests.end_to_end.workshop import Workshop

LLMC = [sys.executable, "-m", "llmc"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that compiles fast: one layer."""
    folder = tmp_path_factory.mktemp("small") / "small"
    save_tiny_model("llama", folder, num_hidden_layers=1)
    return folder


@pytest.fixture
def fresh_cache(tmp_path: Path) -> Path:
    """A cache without artifacts and without lowered code; kernels, which tests/kernels builds from nothing, are in it."""
    build_kernels(resolve_target("cpu").isa, cache_root() / "kernels", 2)
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    shutil.copytree(cache_root() / "kernels", folder / "kernels", copy_function=os.link, ignore=shutil.ignore_patterns(".build-*"))
    return folder


def _environment(cache: Path) -> dict[str, str]:
    return os.environ | {"LLMC_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_two_compiles_are_byte_identical(small: Path, fresh_cache: Path, tmp_path: Path) -> None:
    """Another working folder, home, temporary folder, cache, hash seed, output name and number of jobs."""
    for name in ("elsewhere", "home", "scratch"):
        (tmp_path / name).mkdir()
    shutil.copytree(fresh_cache / "kernels", tmp_path / "other" / "kernels", copy_function=os.link)
    first = [*LLMC, "compile", str(small), "-o", str(tmp_path / "here")]
    subprocess.run(first, check=True, env=_environment(tmp_path / "other"), capture_output=True)
    environment = _environment(fresh_cache) | {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "scratch"), "PYTHONHASHSEED": "7"}
    command = [*LLMC, "compile", str(small), "--jobs", "2", "-o", "deep/er/there"]
    subprocess.run(command, check=True, cwd=tmp_path / "elsewhere", env=environment, capture_output=True)
    here, there = _tree(tmp_path / "here"), _tree(tmp_path / "elsewhere/deep/er/there")
    assert list(here) == list(there)
    assert [name for name in here if here[name] != there[name]] == []
    for name, content in there.items():
        assert str(tmp_path).encode() not in content, f"{name} names the builder's folders"


def test_a_hit_imports_no_torch_and_says_why(small: Path, workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compile_model(CompileConfig(model=small, out=tmp_path / "first"), store=workshop.store)
    program = (
        "import json, sys\nfrom llmc.cli import main\n"
        f"status = main(['compile', {str(small)!r}, '-o', {str(tmp_path / 'second')!r}])\n"
        "print(json.dumps([status, sorted(sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    status, modules = json.loads(done.stdout.splitlines()[-1])
    assert status == 0 and "from the compile cache" in done.stdout
    assert "llmc.artifacts.store" in modules
    assert not {"torch", "transformers", "sympy", "triton"} & set(modules)
    assert _tree(tmp_path / "first") == _tree(tmp_path / "second")

    asked = ["compile", str(small), "-o", str(tmp_path / "third"), "--explain-cache"]
    assert main(asked) == 0
    assert capsys.readouterr().out.startswith("hit: ")
    assert main([*asked, "--seed", "77"]) == 0
    explained = capsys.readouterr().out
    assert explained.startswith("miss: ") and "nearest: " in explained
    assert re.findall(r"^  (\S+?)[:.]", explained, re.MULTILINE) == ["settings"]
    assert not (tmp_path / "third").exists()


def _compile_seed(model: Path, out: Path, seed: int, cache: Path) -> None:
    """A compile whose lowered code is in the cache: the seed is in the artifact, not in its code."""
    compile_model(CompileConfig(model=model, out=out, seed=seed, force=True), store=Store(cache))


def kill_at_random(model: Path, cache: Path, folder: Path, times: int) -> None:
    out = folder / "out"
    _compile_seed(model, out, 0, cache)
    old, remembered = artifact_digest(out), _artifact_records(cache)
    assert len(remembered) == 1
    context = multiprocessing.get_context("fork")
    started = time.monotonic()
    whole = context.Process(target=_compile_seed, args=(model, out, 1, cache))
    whole.start()
    whole.join()
    length = time.monotonic() - started
    assert whole.exitcode == 0
    new = artifact_digest(out)
    assert new not in (old, None) and len(_artifact_records(cache)) == 2
    rng = np.random.default_rng(0)
    outcomes = []
    for _ in range(times):
        for record in _artifact_records(cache) - remembered:
            record.unlink()  # the new artifact leaves the cache, its code stays
        _compile_seed(model, out, 0, cache)
        assert artifact_digest(out) == old
        process = context.Process(target=_compile_seed, args=(model, out, 1, cache))
        process.start()
        time.sleep(float(rng.uniform(0.0, 1.1 * length)))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        verify(out)
        outcomes.append(artifact_digest(out))
        assert outcomes[-1] in (old, new)
    _compile_seed(model, out, 1, cache)
    assert artifact_digest(out) == new
    verify(out)
    assert old in outcomes, "every kill came too late to tell"
    assert [path.name for path in folder.iterdir() if path.name not in ("out", "out.report")] == []


def _artifact_records(cache: Path) -> set[Path]:
    """The cache's entries for whole artifacts; those of lowered code are others."""
    return {path for path in (cache / "ac").rglob("*.json") if b'"what":"artifact"' in path.read_bytes().replace(b": ", b":")}


def test_sigkill_at_random_moments(small: Path, fresh_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    kill_at_random(small, fresh_cache, tmp_path / "work", 20)


@pytest.mark.slow
def test_sigkill_at_random_moments_200_times(small: Path, fresh_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    kill_at_random(small, fresh_cache, tmp_path / "work", 200)


def _eight_at_once(model: Path, cache: Path, folder: Path, *options: str) -> None:
    command = [*LLMC, "compile", str(model), "-O0", "--force", *options, "-o", str(folder / "out")]
    environment = _environment(cache)
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(8)]
    for process in processes:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
    verify(folder / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["out", "out.report"]


def test_eight_processes_compile_the_same_input_at_once(small: Path, fresh_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    _eight_at_once(small, fresh_cache, tmp_path / "work")
    assert len([entry for entry in Store(fresh_cache).entries() if entry.record.description["what"] == "artifact"]) == 1


@pytest.mark.slow
def test_eight_processes_without_a_cache(small: Path, fresh_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    _eight_at_once(small, fresh_cache, tmp_path / "work", "--no-cache")


def test_an_artifact_for_v3_holds_no_avx512_instruction(workshop: Workshop, small: Path, tmp_path: Path) -> None:
    if shutil.which("objdump") is None:
        pytest.skip("objdump (binutils) is not installed")
    compile_model(CompileConfig(model=small, target="cpu:x86-64-v3", out=tmp_path / "out"), store=workshop.store)
    with open_artifact(tmp_path / "out") as artifact:
        manifest = artifact.manifest
    assert {image.role for image in manifest.images} == {"kernels", "tensor_runtime", "model"}
    assert manifest.requirements.torch is None
    assert "avx2" in manifest.requirements.cpu_features
    assert not [feature for feature in manifest.requirements.cpu_features if feature.startswith(("avx512", "amx"))]
    for image in manifest.images:
        done = subprocess.run(["objdump", "-d", str(tmp_path / "out" / image.path)], check=True, capture_output=True, text=True)
        lines = done.stdout.splitlines()
        assert len(lines) > 100
        # in 64-bit code an instruction whose first byte is 62 is one of AVX-512, whatever its registers
        assert [line for line in lines if re.match(r"\s+[0-9a-f]+:\t62 ", line)] == []
        assert "%zmm" not in done.stdout and "%tmm" not in done.stdout


@pytest.mark.parametrize("question", ["--dry-run", "--estimate"])
def test_questions_write_nothing(question: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    before = _tree(small)
    assert main(["compile", str(small), question, "-o", "out"]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [] and _tree(small) == before


def test_level_3_is_refused_where_nothing_can_be_timed(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", str(small), "-O3", "--weights", "external", "-o", str(tmp_path / "out")]) == 2
    assert re.fullmatch(r"llmc: key .*\nllmc: -O3 --weights external: .*use -O2, or --weights embed\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


UNSUPPORTED = {
    "falcon": (transformers.FalconConfig, "attends through classes of its own"),
    "bloom": (transformers.BloomConfig, "ALiBi"),
    "mamba": (transformers.MambaConfig, "recurrent state"),
    "llava": (transformers.LlavaConfig, "more than text"),
    "vit": (transformers.ViTConfig, "more than text"),
}


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_unsupported_models_are_refused_by_name(model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, reason = UNSUPPORTED[model_type]
    config().save_pretrained(tmp_path / "model")
    assert main(["compile", str(tmp_path / "model"), "-o", str(tmp_path / "out")]) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("llmc: ") and f"model type {model_type!r} cannot be compiled" in error and reason in error
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
