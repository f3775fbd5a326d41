"""Signatures: unsigned, wrong key, altered after signing and mangled each have their own sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from llmc.artifacts import open_artifact
from llmc.artifacts.signing import sign, verify_signature
from llmc.artifacts.verify import verify
from llmc.errors import ArtifactError, ConfigError
from tests.artifacts.small_artifact import replace_bytes, rewrite_manifest, write_small


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder with alice and bob, private and public."""
    for name in ("alice", "bob"):
        private = ec.generate_private_key(ec.SECP256R1())
        no_password = serialization.NoEncryption()
        pem = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, no_password)
        (tmp_path / f"{name}.key").write_bytes(pem)
        public = private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / f"{name}.pem").write_bytes(public)
    return tmp_path


@pytest.fixture
def signed(tmp_path: Path, keys: Path) -> Path:
    out = tmp_path / "out"
    write_small(out)
    assert sign(out, keys / "alice.key") == out / "signature.sig"
    return out


def test_signed_artifact_opens_with_the_key_or_a_folder_of_keys(signed: Path, keys: Path):
    with open_artifact(signed, trust=keys / "alice.pem", require_signature=True) as artifact:
        assert artifact.signed_by == keys / "alice.pem"
    assert verify_signature(signed, keys) == keys / "alice.pem"
    assert verify(signed, trust=keys).signed_by == keys / "alice.pem"
    open_artifact(signed).close()  # no policy: the signature is not asked for


def test_unsigned(tmp_path: Path, keys: Path):
    write_small(tmp_path / "plain")
    with pytest.raises(ArtifactError, match=r"plain: is not signed.*llmc sign"):
        open_artifact(tmp_path / "plain", trust=keys / "alice.pem")


def test_wrong_key(signed: Path, keys: Path):
    with pytest.raises(ArtifactError, match="was not made by a trusted key"):
        open_artifact(signed, trust=keys / "bob.pem")


def test_altered_after_signing(signed: Path, keys: Path):
    rewrite_manifest(signed, level=1)  # consistent in itself: the signature alone can tell
    open_artifact(signed).close()
    with pytest.raises(ArtifactError, match=r"was altered after it was signed with alice\.pem"):
        open_artifact(signed, trust=keys / "alice.pem")


def test_signature_of_another_artifact(signed: Path, keys: Path, tmp_path: Path):
    other = tmp_path / "other"
    write_small(other, seed=5)
    replace_signature(other, (signed / "signature.sig").read_bytes())
    with pytest.raises(ArtifactError, match="was altered after it was signed"):
        open_artifact(other, trust=keys / "alice.pem")


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff\xfe", b'{"verificationMaterial":{}}', b"[" * 100_000])
def test_what_is_no_signature(signed: Path, keys: Path, data: bytes):
    replace_signature(signed, data)
    with pytest.raises(ArtifactError, match="is not a readable signature"):
        open_artifact(signed, trust=keys / "alice.pem")


def test_payload_swapped_under_a_signature(signed: Path, keys: Path, tmp_path: Path):
    other = tmp_path / "other"
    write_small(other, seed=5)
    theirs = json.loads(sign(other, keys / "bob.key").read_text())
    ours = json.loads((signed / "signature.sig").read_text())
    ours["dsseEnvelope"]["payload"] = theirs["dsseEnvelope"]["payload"]
    replace_signature(signed, json.dumps(ours).encode())
    with pytest.raises(ArtifactError, match=r"claims to be made by alice\.pem"):
        open_artifact(signed, trust=keys / "alice.pem")


STANDARD_TOOL = """
import sys, model_signing
config = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=sys.argv[2])
config.verify(sys.argv[1], sys.argv[1] + "/signature.sig")
"""


def test_the_standard_tool_verifies_it_too(signed: Path, keys: Path):
    command = [sys.executable, "-c", STANDARD_TOOL, str(signed), str(keys / "alice.pem")]
    subprocess.run(command, check=True)
    replace_bytes(signed / "weights/model.safetensors", b"x")
    assert subprocess.run(command, capture_output=True).returncode != 0


def test_signing_again_replaces_the_signature(signed: Path, keys: Path):
    sign(signed, keys / "bob.key")
    assert verify_signature(signed, keys / "bob.pem") == keys / "bob.pem"
    assert sorted(p.name for p in signed.parent.iterdir() if p.name.startswith(".")) == []


def test_a_damaged_artifact_is_not_signed(signed: Path, keys: Path):
    replace_bytes(signed / "weights/model.safetensors", b"x" * (signed / "weights/model.safetensors").stat().st_size)
    with pytest.raises(ArtifactError, match="are damaged"):
        sign(signed, keys / "alice.key")


def test_keys_that_are_none(signed: Path, keys: Path, tmp_path: Path):
    (tmp_path / "junk.txt").write_text("no key")
    with pytest.raises(ConfigError, match="not a usable public key"):
        open_artifact(signed, trust=tmp_path / "junk.txt")
    with pytest.raises(ConfigError, match="holds 0 public keys"):
        open_artifact(signed, trust=tmp_path / "missing")
    with pytest.raises(ConfigError, match="not a usable private key"):
        sign(signed, tmp_path / "junk.txt")
    with pytest.raises(ConfigError, match="give --trust"):
        open_artifact(signed, require_signature=True)


def replace_signature(out: Path, data: bytes) -> None:
    path = out / "signature.sig"
    if path.exists():
        path.unlink()
    path.write_bytes(data)
