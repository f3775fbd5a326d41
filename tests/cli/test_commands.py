"""The commands that look at, sign and run an artifact: what they print, and the status they end with."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from llmc.cli import COMMANDS, main
from llmc.errors import ConfigError
from tests.runtime.conftest import toy_folder, toy_weights  # noqa: F401
from tests.runtime.toy_artifact import EOS, WORDS, toy_greedy, write_toy_artifact

SMALL = ["--threads", "1", "--num-gpu-blocks-override", "40"]


@pytest.fixture(scope="module")
def artifact(toy_folder: Path, toy_weights: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    return write_toy_artifact(tmp_path_factory.mktemp("commands") / "toy", toy_folder / "toy.so", toy_weights, text=True)


@pytest.fixture
def own(artifact: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(artifact, tmp_path / "toy"))


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Path]:
    """Private and public keys of alice and bob."""
    found = {}
    for name in ("alice", "bob"):
        private = ec.generate_private_key(ec.SECP256R1())
        pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
        found[name], found[name + ".pub"] = tmp_path / f"{name}.key", tmp_path / f"{name}.pem"
        found[name].write_bytes(private.private_bytes(pem, serialization.PrivateFormat.PKCS8, none))
        found[name + ".pub"].write_bytes(private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return found


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence a failing command says."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("llmc: ")
    return line


def test_run_prints_the_continuation(artifact: Path, toy_weights: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    expected, _ = toy_greedy(toy_weights, [3, 4, 5], 6)
    expected = expected[: expected.index(EOS)] if EOS in expected else expected
    assert main(["run", str(artifact), "w3 w4 w5", "--max-tokens", "6", "--temperature", "0", *SMALL]) == 0
    assert capsys.readouterr().out.split() == [WORDS[token] for token in expected]
    assert main(["run", str(artifact), "w3 w4", "--chat", "--max-tokens", "6", *SMALL]) == 0
    chat, _ = toy_greedy(toy_weights, [3, 4, 2], 6)
    chat = chat[: chat.index(EOS)] if EOS in chat else chat
    assert capsys.readouterr().out.split() == [WORDS[token] for token in chat]


def test_run_says_what_is_wrong(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path / "nothing"), "hi"]) == 4
    assert "there is no such artifact" in error_line(capsys)
    assert main(["run", str(artifact), "w3 " * 400, *SMALL]) == 5
    assert "tokens" in error_line(capsys)
    assert main(["run", str(artifact), "hi", "--max-model-len", "1m"]) == 2
    assert "max_model_len=1000000" in error_line(capsys)


def test_inspect(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(artifact)]) == 0
    assert "toy" in capsys.readouterr().out
    assert main(["inspect", str(artifact), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert isinstance(facts, dict) and "toy" in json.dumps(facts)


def test_inspect_writes_sizes_in_bytes_alone_as_bytes(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(artifact)])
    rows = {cells[1].strip(): cells[2].strip() for line in capsys.readouterr().out.splitlines() if len(cells := line.split("│")) == 4}
    assert rows["vocab_size"].isdigit() and rows["hidden_size"].isdigit() and rows["block_size"].isdigit()
    assert re.fullmatch(r"[0-9.]+ [kMG]?B", rows["total_bytes"])


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_output_that_cannot_be_written_is_one_sentence(artifact: Path, command: str) -> None:
    """A full disk behind standard output; no traceback."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "llmc", command, str(artifact)], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "llmc: standard output: No space left on device\n"


def test_a_cache_cannot_shrink_below_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LLMC_CACHE_DIR", str(tmp_path / "cache"))
    assert main(["cache", "gc", "--max-size", "-1"]) == 2
    assert error_line(capsys) == "llmc: --max-size: '-1' is below zero; give what may stay, 0 to empty the cache"


def test_verify_finds_one_changed_byte(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(own)]) == 0
    assert re.search(r"whole; \d+ files, .* checked in", capsys.readouterr().out)
    weights = own / "weights" / "model.safetensors"
    weights.chmod(0o644)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    weights.chmod(0o444)
    assert main(["verify", str(own)]) == 4
    assert "weights/model.safetensors" in error_line(capsys)


def test_sign_and_verify_with_trust(own: Path, keys: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(own), "--trust", str(keys["alice.pub"])]) == 4
    assert "sign" in error_line(capsys)
    assert main(["sign", str(own), "--key", str(keys["alice"])]) == 0
    assert "signature written" in capsys.readouterr().out
    assert main(["verify", str(own), "--trust", str(keys["alice.pub"])]) == 0
    assert f"signed by {keys['alice.pub']}" in capsys.readouterr().out.replace("\n", "")
    assert main(["verify", str(own), "--trust", str(keys["bob.pub"])]) == 4
    assert error_line(capsys)
    assert main(["sign", str(own), "--key", str(keys["alice.pub"])]) == 2
    assert error_line(capsys)


def test_diff(
    artifact: Path,
    toy_folder: Path,  # noqa: F811
    toy_weights: dict[str, np.ndarray],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    same = write_toy_artifact(tmp_path / "same", toy_folder / "toy.so", toy_weights, text=True)
    other = write_toy_artifact(tmp_path / "other", toy_folder / "toy.so", {**toy_weights, "head": -toy_weights["head"]}, text=True)
    assert main(["diff", str(artifact), str(same)]) == 0
    assert "are equal" in capsys.readouterr().out.replace("\n", " ")
    assert main(["diff", str(artifact), str(other), "--json"]) == 1
    differences = json.loads(capsys.readouterr().out)
    assert differences and all(set(one) == {"path", "a", "b"} for one in differences)
    assert any("model.safetensors" in one["path"] for one in differences)
    assert main(["diff", str(artifact), str(other)]) == 1
    assert f"{len(differences)} differences" in capsys.readouterr().out


def test_every_command_has_help_and_none_imports_torch() -> None:
    program = (
        "import sys\nfrom llmc.cli import main\n"
        f"for name in {sorted(COMMANDS)!r}:\n    assert main([name, '--help']) == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage") == len(COMMANDS)


def test_without_what_compiling_takes_a_command_says_what_to_install(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom llmc.cli import main\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers', 'safetensors'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Without())\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    model = str(Path(__file__).parents[2] / "examples" / "demo_model")
    for command in (["compile", model, "-o", str(tmp_path / "out")], ["export", "onnx", model, "-o", str(tmp_path / "out")]):
        done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, check=False)
        assert done.returncode == ConfigError.exit_code and "Traceback" not in done.stderr, done.stderr
        assert "which is not installed; pip install 'llmc[compile]'" in done.stderr
    assert not list(tmp_path.iterdir())


def test_doctor_checks_what_is_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["doctor"]) == 1
    assert "no-such-compiler" in capsys.readouterr().out.replace("\n", "")
    assert main(["doctor", "--for", "compile"]) == 1
    capsys.readouterr()
    assert main(["doctor", "--for", "serve"]) == 0
    assert "transformers" not in capsys.readouterr().out


def test_an_unknown_command_and_option_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["comple"]) == 2
    assert "comple" in capsys.readouterr().err
    assert main(["serve", "somewhere", "--no-such-flag"]) == 2
    assert "--no-such-flag" in capsys.readouterr().err


def test_the_program_itself(artifact: Path) -> None:
    """`python -m llmc`, in a process of its own: streams and status."""
    done = subprocess.run([sys.executable, "-m", "llmc", "verify", str(artifact)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and "whole" in done.stdout
    done = subprocess.run([sys.executable, "-m", "llmc", "verify", str(artifact) + "x"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (4, "") and done.stderr.count("\n") == 1
