"""Help in groups and by word; variables of the environment that nothing reads."""

from __future__ import annotations

import pytest

from llmc.cli import main
from llmc.config.environment import unknown_variables
from llmc.config.resolve import resolve
from llmc.config.settings import for_command
from llmc.errors import ConfigError


@pytest.mark.parametrize("command", ["compile", "serve"])
def test_help_lists_every_flag_under_its_group(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    for setting in for_command(command):
        assert setting.group in shown and setting.flag[:20] in shown


def test_help_of_one_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help=kv cache"]) == 0
    shown = capsys.readouterr().out
    assert "--kv-cache-memory-bytes BYTES" in shown and "LLMC_KV_CACHE_MEMORY_BYTES" in shown and "--port" not in shown
    assert main(["serve", "--help=all"]) == 0
    shown = capsys.readouterr().out
    assert all(setting.flag in shown for setting in for_command("serve"))
    assert main(["serve", "--help=port"]) == 0
    assert "--port N" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help-search", "certificate"], ["--help-search=certificate"]])
def test_help_by_word(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "--ssl-certfile" in shown and "--ssl-cert-reqs" in shown and "--port" not in shown


@pytest.mark.parametrize("arguments", [["--help=nothing"], ["--help-search", "zzzz"], ["--help-search"]])
def test_help_that_finds_nothing_says_so(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *arguments]) != 0
    assert "--help" in capsys.readouterr().err


def test_kubernetes_link_variable_is_named() -> None:
    with pytest.raises(ConfigError, match="Kubernetes.*enableServiceLinks"):
        resolve("serve", {}, environ={"LLMC_PORT": "tcp://10.0.0.1:8000"})
    assert resolve("serve", {"port": "1"}, environ={"LLMC_PORT": "tcp://10.0.0.1:8000"})["port"] == 1


def test_unknown_variables_are_told() -> None:
    (sentence,) = unknown_variables({"LLMC_PROT": "1", "LLMC_PORT": "1", "LLMC_CACHE_DIR": "x", "LLMC_PORT_8000_TCP": "x", "PATH": ""})
    assert "LLMC_PROT" in sentence and "LLMC_PORT?" in sentence


def test_unknown_variables_can_be_an_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LLMC_MAX_NUM_SEQ", "3")
    assert main(["serve", "/nonexistent"]) != 0
    assert "warning" in (shown := capfd.readouterr().err) and "no such artifact" in shown
    assert main(["serve", "/nonexistent", "--fail-on-environ-validation"]) != 0
    assert "no such artifact" not in capfd.readouterr().err


def test_an_empty_model_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "/nonexistent", "--served-model-name", ""]) != 0
    assert "empty name" in capsys.readouterr().err
