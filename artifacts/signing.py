"""Signing artifacts with a key, in OpenSSF Model Signing's format (a Sigstore bundle over an in-toto statement).

The signature lies in the artifact as signature.sig, outside the hashed set. It lists the SHA-256 of every file, so the
`model_signing` command line verifies it too. At a start weights are not hashed whole for it: the signed manifest.json holds the
digests of their chunks, and these are checked while weights are copied.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.artifacts.filesystem import OS, explain_os_error, sync_folder, write_all
from llmc.artifacts.relative_paths import MANIFEST_NAME, SIGNATURE_NAME
from llmc.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from llmc.artifacts.verify import OpenArtifact

_MAX_SIGNATURE_BYTES = 64 * 1024 * 1024
_MAX_KEYS = 100
_READ_BYTES = 1 << 20


def sign(path: str | Path, private_key: Path) -> Path:
    """Verify an artifact whole, weights included, then sign it. An older signature is replaced in one step.

    Args:
        path: the artifact's folder.
        private_key: PEM, an elliptic-curve key (P-256, P-384 or P-521) without password.

    Returns:
        The signature file.

    Raises:
        ArtifactError: the artifact is damaged, or the signature cannot be written.
        ConfigError: the key cannot be used.
    """
    from llmc.artifacts.verify import open_artifact, verify

    path = Path(os.path.realpath(path))
    verify(path)
    config = _library("signing").Config()
    try:
        config.use_elliptic_key_signer(private_key=private_key)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{private_key}: not a usable private key ({error}); expected PEM with an elliptic-curve key, no password"
        ) from error
    temporary = f"{path.parent}/.{path.name[:180]}.llmc-sig-{os.getpid()}-{secrets.token_hex(6)}"
    with open_artifact(path, check_machine=False) as artifact:
        config.set_hashing_config(_WholeFiles(artifact))
        try:
            config.sign(path, temporary)
            _publish(temporary, f"{path}/{SIGNATURE_NAME}")
        except OSError as error:
            raise explain_os_error(error, "writing the signature", str(path)) from error
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)
    return path / SIGNATURE_NAME


def verify_signature(path: str | Path, trust: Path) -> Path:
    """Check an artifact's signature, and every file it covers but weights (as `open_artifact` does).

    Args:
        path: the artifact's folder.
        trust: a public key (PEM), or a folder of them.

    Returns:
        The key that signed it.

    Raises:
        ArtifactError: unsigned, signed by another key, or altered after it was signed; each says so.
        ConfigError: `trust` holds no usable key.
    """
    from llmc.artifacts.verify import open_artifact

    with open_artifact(path, trust=trust, check_machine=False) as artifact:
        assert artifact.signed_by is not None
        return artifact.signed_by


def verify_open(artifact: OpenArtifact, trust: Path) -> Path:
    """Check the signature of an artifact whose files are open. Returns the key that signed it; errors as `verify_signature`."""
    keys = trusted_keys(trust)
    where = f"{artifact.path}/{SIGNATURE_NAME}"
    fd = artifact.signature_fd
    if fd is None:
        raise ArtifactError(f"{artifact.path}: is not signed, and a trusted signature is required; sign it with llmc sign")
    if os.fstat(fd).st_size > _MAX_SIGNATURE_BYTES:
        raise ArtifactError(f"{where}: too large for a signature; sign the artifact again")
    for key in keys:
        signed = _signed_manifest(key, fd, where)
        if signed is None:
            continue
        if not _vouches_for(signed, artifact):
            raise ArtifactError(
                f"{artifact.path}: was altered after it was signed with {key.name}; fetch it again, or sign it if you made the change"
            )
        return key
    raise ArtifactError(f"{where}: was not made by a trusted key ({len(keys)} in {trust}); check where the artifact comes from")


def trusted_keys(trust: Path) -> list[Path]:
    """The public keys of a trust policy: one PEM file, or every *.pem and *.pub of a folder.

    Raises:
        ConfigError: there is none, or too many.
    """
    if trust.is_file():
        return [trust]
    keys = sorted(entry for entry in trust.glob("*") if entry.suffix in (".pem", ".pub") and entry.is_file()) if trust.is_dir() else []
    if not keys or len(keys) > _MAX_KEYS:
        raise ConfigError(
            f"{trust}: holds {len(keys)} public keys, expected a PEM file or a folder with 1 to {_MAX_KEYS} *.pem or *.pub files"
        )
    return keys


def _signed_manifest(key: Path, fd: int, where: str) -> Any:
    """What a signature vouches for, or None if this key did not make it.

    Raises:
        ArtifactError: the file is not a signature.
        ConfigError: the key cannot be used.
    """
    verifying = _library("verifying")
    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=key)._verifier
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{key}: not a usable public key ({error}); expected PEM with an elliptic-curve key") from error
    from cryptography.exceptions import InvalidSignature

    try:
        signature = verifying.sigstore_pb.Signature.read(Path(f"/proc/self/fd/{fd}"))
        hint = signature.bundle.verification_material.public_key.hint
    except Exception as error:  # the library raises whatever its JSON, protobuf and base64 layers raise
        raise ArtifactError(f"{where}: is not a readable signature ({type(error).__name__}); sign the artifact again") from error
    if not hint:
        raise ArtifactError(f"{where}: does not name the key that made it; sign the artifact again with a current llmc")
    try:
        return verifier.verify(signature)
    except InvalidSignature:
        if _names_key(hint, key):
            raise ArtifactError(
                f"{where}: claims to be made by {key.name} but the key does not confirm it; the signature was altered"
            ) from None
        return None
    except ValueError as error:
        if not _names_key(hint, key):
            return None
        raise ArtifactError(f"{where}: is signed by {key.name} but cannot be used: {error}") from error
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ArtifactError(f"{where}: is not a readable signature ({type(error).__name__}); sign the artifact again") from error


def _names_key(hint: str, key: Path) -> bool:
    """Whether the signature's hint is this key's: SHA-256 of its PEM form."""
    from cryptography.hazmat.primitives import serialization

    public = serialization.load_pem_public_key(key.read_bytes())
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest() == hint


class _WholeFiles:
    """Stands where model-signing expects its hashing configuration: digests come from the open, checked artifact."""

    def __init__(self, artifact: OpenArtifact) -> None:
        self._artifact = artifact

    def hash(self, model_path: object, *, files_to_hash: object = None) -> Any:
        """A model_signing manifest of the artifact: SHA-256 of each whole file, weights hashed now."""
        manifest = _library("manifest")
        from model_signing._hashing.hashing import Digest

        kind = manifest.SerializationType.from_args(
            {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [SIGNATURE_NAME]}
        )
        digests = _digests(self._artifact)
        for weight in self._artifact.manifest.weights:
            digests[weight.path] = _sha256_of_fd(self._artifact.fd(weight.path), weight.size_bytes)
        items = [kind.new_item(path, Digest("sha256", bytes.fromhex(digest))) for path, digest in digests.items()]
        return manifest.Manifest(self._artifact.path.name, items, kind)


def _digests(artifact: OpenArtifact) -> dict[str, str]:
    """SHA-256 of every file but weights, as checked when the artifact was opened."""
    weights = {weight.path for weight in artifact.manifest.weights}
    digests = {record.path: record.sha256 for record in artifact.manifest.files if record.path not in weights}
    return {MANIFEST_NAME: artifact.digest, **digests}


def _vouches_for(signed: Any, artifact: OpenArtifact) -> bool:
    """Whether the signed list of files is this artifact's. Weights: the name is compared; their digests are in the manifest."""
    listed = {item.identifier: (item.digest.algorithm, item.digest.digest_hex) for item in signed.resource_descriptors()}
    weights = {weight.path for weight in artifact.manifest.weights}
    expected = {path: ("sha256", digest) for path, digest in _digests(artifact).items()}
    return set(listed) == set(expected) | weights and all(listed[path] == expected[path] for path in expected)


def _sha256_of_fd(fd: int, size: int) -> str:
    hasher = hashlib.sha256()
    for start in range(0, size, _READ_BYTES):
        hasher.update(os.pread(fd, _READ_BYTES, start))
    return hasher.hexdigest()


def _publish(temporary: str, target: str) -> None:
    """Make the signature durable, readable by all and writable by none, and give it its name."""
    with open(temporary, "rb") as file:
        data = file.read()
    final = f"{temporary}.done"
    fd = OS.create(final)
    try:
        write_all(OS, fd, data)
        OS.fsync(fd)
        OS.rename(final, target)
    except BaseException:
        OS.unlink(final)
        raise
    finally:
        os.close(fd)
    sync_folder(OS, os.path.dirname(target))


def _library(module: str) -> Any:
    """model_signing.<module>, imported when first needed: it brings sigstore and takes half a second."""
    import importlib

    try:
        return importlib.import_module(f"model_signing.{module}")
    except ImportError as error:
        raise ConfigError(f"signatures need the packages model-signing and pyopenssl ({error}); install them") from error
