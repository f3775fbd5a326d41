"""CUDA targets are data: complete, consistent, refused by name where a model is compiled."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmc.cli import main
from llmc.errors import ConfigError
from llmc.kernels.cuda_targets import CudaTarget, cuda_target, cuda_target_names
from llmc.kernels.isa import TARGET_NAMES, resolve_target


@pytest.mark.parametrize("name", cuda_target_names())
def test_every_target_is_described_consistently(name: str) -> None:
    target = cuda_target(name)
    assert isinstance(target, CudaTarget) and target.name == name
    major, minor = target.compute_capability
    assert target.architecture == f"sm_{major}{minor}" == f"sm_{target.capability_number}"
    assert target.shared_memory_per_block_bytes == target.shared_memory_per_sm_bytes - 1024  # the system keeps 1 KiB of a block's
    assert target.registers_per_sm == 64 * 1024
    assert 16 <= target.num_sms <= 256
    assert (1 << 20) <= target.l2_bytes < target.memory_bytes
    assert 10**11 < target.bandwidth_bytes_per_s < 10**13 < target.bf16_flops


def test_an_architecture_takes_the_figures_of_its_typical_product() -> None:
    assert cuda_target("cuda:sm_90").num_sms == cuda_target("cuda:h100").num_sms
    assert cuda_target("cuda:h200").architecture == "sm_90"
    assert cuda_target("cuda:h200").shared_memory_per_block_bytes == 232448


@pytest.mark.parametrize("name", ["cuda:sm_70", "cuda:", "h200", "cuda:H200", "cuda:list"])
def test_an_unknown_target_is_named_with_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match="cuda:sm_90") as caught:
        cuda_target(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["cuda:sm_90", "cuda:h200"])
def test_compiling_for_cuda_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*not built.*--target cpu"):
        resolve_target(name)


@pytest.mark.parametrize("extra", [[], ["--dry-run"], ["--estimate"], ["--explain-cache"], ["--compile-sizes", "8"]])
def test_the_command_line_refuses_it_however_it_is_asked(extra: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["compile", "nowhere", "-o", str(tmp_path / "out"), "--target", "cuda:sm_90", *extra])
    assert status == ConfigError.exit_code
    assert "cuda:sm_90" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--target", "list"], ["--target=list"], ["model", "-o", "out", "--target", "list"]])
def test_target_list_shows_all(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["compile", *arguments]) == 0
    shown = capsys.readouterr().out
    for name in (*TARGET_NAMES, *cuda_target_names()):
        assert name in shown
    assert "A cuda: target is refused" in shown
