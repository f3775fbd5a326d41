"""The manifest as bytes: canonical JSON, a self-check against damage, and a strict reader.

`manifest_sha256` is the SHA-256 of the file's own bytes with these 64 characters written as zeros. It finds a damaged
manifest; against a forged one there is the signature.
"""

from __future__ import annotations

import msgspec

from llmc.artifacts.chunks import sha256_hex
from llmc.artifacts.manifest import Manifest
from llmc.artifacts.version import FORMAT_VERSION, OLDEST_READABLE
from llmc.errors import ArtifactError

MAX_MANIFEST_BYTES = 64 * 1024 * 1024

_ZEROS = "0" * 64
_FIELD = b'"manifest_sha256":"%s"'


class _VersionOnly(msgspec.Struct):
    """What is read first; everything else of a manifest may change with the version."""

    format_version: int


def encode_manifest(manifest: Manifest) -> bytes:
    """Write a manifest as canonical JSON: sorted keys, no spaces, UTF-8, one newline at the end.

    Returns:
        The bytes of manifest.json, `manifest_sha256` filled in.
    """
    blank = msgspec.json.encode(msgspec.structs.replace(manifest, manifest_sha256=_ZEROS), order="sorted") + b"\n"
    return blank.replace(_FIELD % _ZEROS.encode(), _FIELD % sha256_hex(blank).encode())


def decode_manifest(data: bytes, where: str) -> Manifest:
    """Read manifest.json. The version is looked at before anything else is believed.

    Args:
        data: the file's bytes.
        where: how messages call the file.

    Raises:
        ArtifactError: too large, not JSON, another format version, damaged, unknown or missing fields, wrong types.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise ArtifactError(f"{where}: {len(data)} bytes are more than a manifest may have ({MAX_MANIFEST_BYTES})")
    check_version(data, where)
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except RecursionError:
        raise ArtifactError(f"{where}: nested too deeply to be a manifest; fetch the artifact again or compile again") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{where}: not a manifest of format version {FORMAT_VERSION}: {error}; compile again") from None
    _check_own_digest(data, manifest.manifest_sha256, where)
    return manifest


def check_version(data: bytes, where: str) -> None:
    """Raise ArtifactError unless the bytes are JSON that names a format version this runtime reads."""
    try:
        version = msgspec.json.decode(data, type=_VersionOnly).format_version
    except RecursionError:
        raise ArtifactError(f"{where}: nested too deeply to be a manifest; fetch the artifact again or compile again") from None
    except msgspec.ValidationError as error:
        raise ArtifactError(f"{where}: not an llmc manifest: {error}; expected an object with an integer format_version") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{where}: not valid JSON ({error}); the file is damaged, fetch the artifact again or compile again") from None
    reads = f"this runtime reads ({OLDEST_READABLE} to {FORMAT_VERSION})"
    if version > FORMAT_VERSION:
        raise ArtifactError(f"{where}: format_version {version} is newer than {reads}; upgrade llmc or compile again")
    if version < OLDEST_READABLE:
        raise ArtifactError(f"{where}: format_version {version} is older than {reads}; compile again with this llmc")


def _check_own_digest(data: bytes, stated: str, where: str) -> None:
    field = _FIELD % stated.encode()
    if len(stated) != 64 or data.count(field) != 1:
        raise ArtifactError(f"{where}: manifest_sha256 is not one 64-digit hex value; fetch the artifact again or compile again")
    found = sha256_hex(data.replace(field, _FIELD % _ZEROS.encode()))
    if found != stated:
        raise ArtifactError(
            f"{where}: damaged, manifest_sha256 says {stated} but the bytes hash to {found}; fetch the artifact again or compile again"
        )
