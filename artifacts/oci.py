"""Artifacts in an OCI image layout: a folder that any registry tool (oras, skopeo, crane) can copy to and from a registry.

    oci-layout, index.json                what an image layout is made of
    blobs/sha256/<digest>                 each file of an artifact, its manifest.json among them, and the OCI manifest that lists them

Every file is a layer, its path the annotation org.opencontainers.image.title, as oras writes and reads them.
Source: OCI image specification 1.1, image-layout.md and manifest.md.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import msgspec

from llmc.artifacts.manifest_json import decode_manifest
from llmc.artifacts.relative_paths import MANIFEST_NAME, SIGNATURE_NAME, check_relative_path
from llmc.artifacts.stored_files import files_below
from llmc.artifacts.verify import verify
from llmc.artifacts.writer import ArtifactWriter, Published
from llmc.errors import ArtifactError, ConfigError

ARTIFACT_TYPE = "application/vnd.llmc.artifact.v1"
FILE_TYPE = "application/vnd.llmc.file.v1"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
_EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
_TITLE, _TAG = "org.opencontainers.image.title", "org.opencontainers.image.ref.name"
_TAG_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})", re.ASCII)
_MAX_JSON_BYTES = 16 << 20


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Names a blob. Fields of other tools are ignored, as the specification wants."""

    media_type: str
    digest: str
    size: int
    artifact_type: str | None = None
    annotations: dict[str, str] = {}


class ImageManifest(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=False):
    """One artifact."""

    schema_version: int
    config: Descriptor
    layers: list[Descriptor]
    media_type: str = MANIFEST_TYPE
    artifact_type: str | None = None


class Index(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What a layout holds."""

    schema_version: int
    manifests: list[Descriptor]
    media_type: str = INDEX_TYPE


def push(artifact: Path, layout: Path, tag: str) -> str:
    """Put an artifact into a layout, which is made if it is not there, under a tag, which moves if it is. A signature goes along not.

    Returns:
        The digest of the OCI manifest, "sha256:...".

    Raises:
        ArtifactError: the artifact is damaged.
        ConfigError: the folder is something else than a layout, or the tag is none.
    """
    if not _TAG_PATTERN.fullmatch(tag):
        raise ConfigError(f"{tag!r} is no tag; letters, digits and '_.-', at most 128")
    verify(artifact)
    index = _prepared(layout)
    layers = [_add_file(layout, artifact / name, name) for name in files_below(artifact)]
    manifest = ImageManifest(schema_version=2, config=_add(layout, b"{}", _EMPTY_TYPE), layers=layers, artifact_type=ARTIFACT_TYPE)
    found = _add(layout, msgspec.json.encode(manifest), MANIFEST_TYPE)
    named = msgspec.structs.replace(found, artifact_type=ARTIFACT_TYPE, annotations={_TAG: tag})
    others = [one for one in index.manifests if one.annotations.get(_TAG) != tag]
    _write(layout / "index.json", msgspec.json.encode(Index(schema_version=2, manifests=[*others, named])))
    return found.digest


def pull(layout: Path, tag: str, out: Path, *, force: bool = False) -> Published:
    """Publish an artifact from a layout as `out`, every byte verified before it gets its name.

    Raises:
        ArtifactError: the layout is damaged or holds something else.
        ConfigError: there is no such tag, or something is in the way of `out`.
    """
    index = _index(layout)
    tagged = [one for one in index.manifests if one.annotations.get(_TAG) == tag]
    if len(tagged) != 1:
        known = ", ".join(sorted(one.annotations.get(_TAG, "?") for one in index.manifests)) or "none"
        raise ConfigError(f"{layout}: has no one artifact tagged {tag!r}; tags here: {known[:200]}")
    manifest = _decoded(_blob(layout, tagged[0], _MAX_JSON_BYTES).read_bytes(), ImageManifest, f"{layout}: {tag}")
    blobs: dict[str, Path] = {}
    for layer in manifest.layers:
        name = layer.annotations.get(_TITLE, "")
        if name == SIGNATURE_NAME:
            continue
        if name != MANIFEST_NAME:
            check_relative_path(name, str(layout))
        if name in blobs:
            raise ArtifactError(f"{layout}: {tag} names {name} twice")
        blobs[name] = _blob(layout, layer, None)
    if MANIFEST_NAME not in blobs:
        raise ArtifactError(f"{layout}: {tag} is no llmc artifact: it has no {MANIFEST_NAME}")
    manifest_bytes = blobs.pop(MANIFEST_NAME).read_bytes()
    records = {record.path: record for record in decode_manifest(manifest_bytes, f"{layout}: {tag}").files}
    if records.keys() != blobs.keys():
        odd = sorted(records.keys() ^ blobs.keys())
        raise ArtifactError(f"{layout}: {tag} and the artifact's manifest do not name the same files, such as {odd[0]}")
    with ArtifactWriter(out, force=force) as writer:
        for name, blob in blobs.items():
            writer.adopt_file(records[name], blob, link=False)
        return writer.publish(manifest_bytes, before_naming=lambda folder: _verified(folder))


def _verified(folder: Path) -> None:
    verify(folder)


def _prepared(layout: Path) -> Index:
    """The index of a layout, made empty where there is none."""
    if (layout / "oci-layout").exists():
        return _index(layout)
    if layout.exists() and any(layout.iterdir()):
        raise ConfigError(f"{layout}: is not empty and no OCI image layout (it has no oci-layout file); name another folder")
    (layout / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
    _write(layout / "index.json", msgspec.json.encode(Index(schema_version=2, manifests=[])))
    _write(layout / "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
    return Index(schema_version=2, manifests=[])


def _index(layout: Path) -> Index:
    try:
        version: dict[str, Any] = _decoded((layout / "oci-layout").read_bytes()[:_MAX_JSON_BYTES], dict, f"{layout}/oci-layout")
        data = (layout / "index.json").read_bytes()
    except OSError as error:
        raise ConfigError(f"{layout}: is no OCI image layout: {error.strerror} ({error.filename})") from error
    if version.get("imageLayoutVersion") != "1.0.0":
        raise ArtifactError(f"{layout}/oci-layout: version {str(version.get('imageLayoutVersion'))[:40]!r}, expected 1.0.0")
    return _decoded(data, Index, f"{layout}/index.json")


def _decoded(data: bytes, kind: type[Any], where: str) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{where}: cannot be read: {error}") from error


def _blob(layout: Path, descriptor: Descriptor, most_bytes: int | None) -> Path:
    """The file a descriptor names, whole and hashed."""
    match = _DIGEST.fullmatch(descriptor.digest)
    if match is None:
        raise ArtifactError(f"{layout}: {descriptor.digest[:80]!r} is no SHA-256 digest")
    path = layout / "blobs" / "sha256" / match[1]
    try:
        size = path.stat(follow_symlinks=False).st_size
        if size != descriptor.size or (most_bytes is not None and size > most_bytes):
            raise ArtifactError(f"{path}: has {size} bytes, its descriptor says {descriptor.size}")
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
    if found != match[1]:
        raise ArtifactError(f"{path}: hashes to {found[:16]}..., not to its name; copy the layout again")
    return path


def _add(layout: Path, data: bytes, media_type: str) -> Descriptor:
    digest = hashlib.sha256(data).hexdigest()
    _write(layout / "blobs" / "sha256" / digest, data)
    return Descriptor(media_type=media_type, digest=f"sha256:{digest}", size=len(data))


def _add_file(layout: Path, source: Path, name: str) -> Descriptor:
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = layout / "blobs" / "sha256" / digest
    size = source.stat().st_size
    if not (target.exists() and target.stat().st_size == size):
        temporary = target.with_name(f".{secrets.token_hex(8)}")
        shutil.copyfile(source, temporary)
        temporary.replace(target)
    return Descriptor(media_type=FILE_TYPE, digest=f"sha256:{digest}", size=size, annotations={_TITLE: name})


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{secrets.token_hex(8)}")
    temporary.write_bytes(data)
    temporary.replace(path)
