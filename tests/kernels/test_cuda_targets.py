"""CUDA targets are data: complete, consistent, listed; what they do not get is refused by name."""

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


def test_a_gpu_is_no_level_of_a_cpu() -> None:
    with pytest.raises(ConfigError, match="cuda:sm_90.*is a GPU where one of a CPU is needed"):
        resolve_target("cuda:sm_90")


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["-O0"], "-O0 is the oracle and runs on a CPU"),
        (["--kv-cache-dtype", "int8"], "only CPUs have attention over a cache with a scale per token and head"),
        (["--target", "cuda:sm_70"], "cuda:sm_90"),
    ],
)
def test_the_command_line_refuses_what_a_gpu_does_not_get(
    extra: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["compile", "nowhere", "-o", str(tmp_path / "out"), "--target", "cuda:sm_90", *extra])
    assert status == ConfigError.exit_code
    assert says in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--target", "list"], ["--target=list"], ["model", "-o", "out", "--target", "list"]])
def test_target_list_shows_all(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["compile", *arguments]) == 0
    shown = capsys.readouterr().out
    for name in (*TARGET_NAMES, *cuda_target_names()):
        assert name in shown
    assert "code runs on that architecture alone" in " ".join(shown.split())
