"""Opening an artifact: every check that stands between a foreign folder and running what is in it.

Order: the folder itself, the manifest's size, its format version, its fields, its own digest, its parts against each other;
the exact set of files, none of them a link or writable by others; their sizes; the signature, when a policy asks for it;
SHA-256 of every open file but weights; what the machine must have. Only then may a caller map anything. Weights are hashed
while they are copied (weight_source.py).

All files are opened relative to one descriptor of the folder, hashed through their descriptors, and used through them:
a folder that is replaced meanwhile is read whole, old or new.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from llmc.artifacts.chunks import sha256_hex
from llmc.artifacts.consistency import check_manifest
from llmc.artifacts.filesystem import is_private
from llmc.artifacts.manifest import FileRecord, Image, Manifest
from llmc.artifacts.manifest_json import MAX_MANIFEST_BYTES, decode_manifest
from llmc.artifacts.relative_paths import MANIFEST_NAME, SIGNATURE_NAME
from llmc.artifacts.requirements import check_requirements, this_machine
from llmc.artifacts.stamps import StampFolder
from llmc.artifacts.weight_source import VerifyMode, WeightSource
from llmc.errors import ArtifactError, ConfigError, InternalError

_MAX_ENTRIES = 20_000  # names in the folder, before looking at any of them
_READ_BYTES = 1 << 20


class OpenArtifact:
    """A verified artifact. Its files stay open until `close`; use it as a context manager.

    Attributes:
        path: where it was opened.
        manifest: checked.
        manifest_bytes: manifest.json as read.
        digest: SHA-256 of it, the artifact's name.
        signed_by: the public key file whose signature was verified, or None if no policy asked.
    """

    def __init__(self, path: Path, manifest: Manifest, manifest_bytes: bytes, fds: dict[str, int]) -> None:
        self.path = path
        self.manifest = manifest
        self.manifest_bytes = manifest_bytes
        self.digest = sha256_hex(manifest_bytes)
        self.signed_by: Path | None = None
        self._fds = fds
        self._records = {record.path: record for record in manifest.files}
        self._weights = {weight.path: weight for weight in manifest.weights}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def fd(self, path: str) -> int:
        """The open, verified descriptor of a file, e.g. to map /proc/self/fd/<fd> as code. It belongs to this object."""
        if path not in self._fds:
            raise InternalError(f"{self.path}: {path} is not an open file of this artifact; please report this")
        return self._fds[path]

    @property
    def signature_fd(self) -> int | None:
        """The open signature file; None if the artifact is unsigned."""
        return self._fds.get(SIGNATURE_NAME)

    def read(self, path: str) -> bytes:
        """A file's bytes, hashed once more as they are read, so that they are what the manifest says whatever happened since.

        Raises:
            ArtifactError: the file changed after it was verified.
        """
        record = self._records.get(path)
        if record is None or path in self._weights:
            raise InternalError(f"{self.path}: {path} is not a file that is read whole; please report this")
        data = _read_exactly(self.fd(path), record.size_bytes, f"{self.path}/{path}")
        if sha256_hex(data) != record.sha256:
            raise ArtifactError(f"{self.path}/{path}: changed while the artifact was open; restart with an artifact nobody writes to")
        return data

    def image(self, role: Literal["kernels", "aoti_shim", "model"]) -> Image | None:
        """The first image of a role, if there is one."""
        return next((image for image in self.manifest.images if image.role == role), None)

    def weights(self, *, verify: VerifyMode = "always", stamps: StampFolder | None = None) -> list[WeightSource]:
        """The weight files, to be copied chunk by chunk.

        Args:
            verify: "always" hashes every chunk; "once" trusts a stamp left by an earlier start; "never" trusts the disk.
            stamps: where stamps lie; by default in the cache folder.
        """
        kept = (stamps or StampFolder()) if verify == "once" else None
        return [WeightSource(w, self._fds[w.path], f"{self.path}/{w.path}", verify, kept) for w in self.manifest.weights]

    def close(self) -> None:
        """Close every file. Doing it twice is fine."""
        fds, self._fds = self._fds, {}
        for fd in fds.values():
            os.close(fd)


def open_artifact(
    path: str | Path, *, require_signature: bool = False, trust: Path | None = None, check_machine: bool = True
) -> OpenArtifact:
    """Check an artifact and open it. Nothing of it has been mapped or run when this returns.

    Args:
        path: the artifact's folder.
        require_signature: refuse it unless signed; needs `trust`.
        trust: a public key (PEM), or a folder of them (*.pem, *.pub); given, the artifact must be signed by one.
        check_machine: hold its requirements against this machine; off for looking at artifacts of other machines.

    Returns:
        The open artifact; close it.

    Raises:
        ArtifactError: one sentence about the first check that failed.
        ConfigError: `require_signature` without `trust`, or `trust` holds no key.
    """
    if require_signature and trust is None:
        raise ConfigError("a required signature needs a key to check it with; give --trust PUBLIC_KEY.pem")
    path = Path(path)
    for _ in range(16):
        folder = _open_folder(path)
        try:
            artifact = _open_once(path, folder)
        except ArtifactError:
            if _replaced(path, folder):
                continue  # a writer swapped the folder's name and is deleting the one we look at
            raise
        finally:
            os.close(folder)
        break
    else:
        raise ArtifactError(f"{path}: was replaced 16 times while being opened; try again when it stands still")
    try:
        if trust is not None:
            from llmc.artifacts.signing import verify_open

            artifact.signed_by = verify_open(artifact, trust)
        _check_hashes(artifact)
        if check_machine:
            check_requirements(artifact.manifest.requirements, this_machine(), f"{path}/{MANIFEST_NAME}")
    except BaseException:
        artifact.close()
        raise
    return artifact


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What `verify` looked at."""

    num_files: int  # the manifest included
    size_bytes: int
    num_tensors: int
    digest: str  # SHA-256 of manifest.json
    signed_by: Path | None


def verify(path: str | Path, *, trust: Path | None = None) -> VerifyReport:
    """Check every byte of an artifact, weights included, on any machine; nothing of it is run.

    Args:
        path: the artifact's folder.
        trust: a public key, or a folder of them; given, the artifact must be signed by one.

    Raises:
        ArtifactError: one sentence about the first thing that is wrong.
    """
    from llmc.artifacts.plan_files import check_plan_files
    from llmc.artifacts.weight_header import check_weight_header

    with open_artifact(path, trust=trust, check_machine=False) as artifact:
        for source in artifact.weights(verify="always"):
            buffer = memoryview(bytearray(min(source.chunk_bytes, source.size_bytes)))
            for index in range(source.num_chunks):
                source.read_chunk(index, buffer[: source.chunk_span(index)[1]])
            source.finish()
            check_weight_header(source.fd, artifact.manifest.tensors, source.path, str(path))
        check_plan_files(artifact.manifest, artifact.read)
        size = sum(record.size_bytes for record in artifact.manifest.files)
        return VerifyReport(
            num_files=len(artifact.manifest.files) + 1,
            size_bytes=size,
            num_tensors=len(artifact.manifest.tensors),
            digest=artifact.digest,
            signed_by=artifact.signed_by,
        )


def _open_once(path: Path, folder: int) -> OpenArtifact:
    where = f"{path}/{MANIFEST_NAME}"
    fds: dict[str, int] = {}
    try:
        found = _walk(path, folder)
        if MANIFEST_NAME not in found:
            raise ArtifactError(f"{path}: holds no {MANIFEST_NAME}, so it is not an llmc artifact; make one with llmc compile")
        data = _read_manifest(path, folder)
        manifest = decode_manifest(data, where)
        check_manifest(manifest, where)
        _check_file_set(path, manifest, found)
        for record in manifest.files:
            fds[record.path] = _open_file(path, folder, record.path)
            size = os.fstat(fds[record.path]).st_size
            if size != record.size_bytes:
                raise ArtifactError(
                    f"{path}/{record.path}: has {size} bytes, expected {record.size_bytes}; fetch the artifact again or compile again"
                )
        if SIGNATURE_NAME in found:
            fds[SIGNATURE_NAME] = _open_file(path, folder, SIGNATURE_NAME)
    except BaseException:
        for fd in fds.values():
            os.close(fd)
        raise
    return OpenArtifact(path, manifest, data, fds)


def _open_folder(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: there is no such artifact; make one with llmc compile") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be opened as an artifact folder: {os.strerror(error.errno or 0)}") from error
    return fd


def _replaced(path: Path, folder: int) -> bool:
    try:
        return not os.path.samestat(os.stat(path), os.fstat(folder))
    except FileNotFoundError:
        return False


def _walk(path: Path, folder: int) -> set[str]:
    """Every file below the folder, by relative name. Refuses whatever is not a plain file or folder that is ours alone to write."""
    found: set[str] = set()
    _check_owner(os.fstat(folder), str(path))
    _walk_into(path, folder, "", found)
    return found


def _walk_into(path: Path, folder: int, prefix: str, found: set[str]) -> None:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = f"{prefix}{entry.name}"
                info = entry.stat(follow_symlinks=False)
                _check_kind(info, f"{path}/{name}")
                if stat.S_ISREG(info.st_mode):
                    found.add(name)
                elif name.count("/") > 8:
                    raise ArtifactError(f"{path}/{name}: nested deeper than an artifact may be")
                else:
                    _walk_below(path, folder, entry.name, f"{name}/", found)
                if len(found) > _MAX_ENTRIES:
                    raise ArtifactError(f"{path}: holds more than {_MAX_ENTRIES} files, too many for an artifact")
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be listed: {os.strerror(error.errno or 0)}") from error


def _walk_below(path: Path, folder: int, name: str, prefix: str, found: set[str]) -> None:
    before = len(found)
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        _walk_into(path, fd, prefix, found)
    finally:
        os.close(fd)
    if len(found) == before:
        raise ArtifactError(f"{path}/{prefix}: an empty folder, which no artifact has; remove it")


def _check_kind(info: os.stat_result, where: str) -> None:
    if stat.S_ISLNK(info.st_mode):
        raise ArtifactError(f"{where}: is a symbolic link, which an artifact may not hold; copy the artifact with its links resolved")
    if not stat.S_ISREG(info.st_mode) and not stat.S_ISDIR(info.st_mode):
        raise ArtifactError(f"{where}: is neither a file nor a folder, which an artifact may not hold")
    _check_owner(info, where)


def _check_owner(info: os.stat_result, where: str) -> None:
    if not is_private(info.st_mode):
        raise ArtifactError(
            f"{where}: may be written by group or others, so what was checked could be changed; run chmod -R go-w on the artifact"
        )
    if info.st_uid not in (os.geteuid(), 0):
        raise ArtifactError(f"{where}: belongs to user {info.st_uid}, expected user {os.geteuid()} or root; copy the artifact or chown it")


def _read_manifest(path: Path, folder: int) -> bytes:
    fd = _open_file(path, folder, MANIFEST_NAME)
    try:
        size = os.fstat(fd).st_size
        if size > MAX_MANIFEST_BYTES:
            raise ArtifactError(f"{path}/{MANIFEST_NAME}: {size} bytes are more than a manifest may have ({MAX_MANIFEST_BYTES})")
        return _read_exactly(fd, size, f"{path}/{MANIFEST_NAME}")
    finally:
        os.close(fd)


def _open_file(path: Path, folder: int, name: str) -> int:
    """Open a file of the folder, following no link, and check the open file once more."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        hint = "; raise the limit on open files (ulimit -n)" if error.errno in (23, 24) else ""
        raise ArtifactError(f"{path}/{name}: cannot be opened: {os.strerror(error.errno or 0)}{hint}") from error
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise ArtifactError(f"{path}/{name}: is not a regular file")
        _check_owner(info, f"{path}/{name}")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_file_set(path: Path, manifest: Manifest, found: set[str]) -> None:
    expected = {record.path for record in manifest.files}
    missing = sorted(expected - found)
    if missing:
        raise ArtifactError(
            f"{path}/{missing[0]}: is missing ({len(missing)} of {len(expected)} files are); fetch the artifact again or compile again"
        )
    extra = sorted(found - expected - {MANIFEST_NAME, SIGNATURE_NAME})
    if extra:
        raise ArtifactError(f"{path}/{extra[0][:300]}: is not a file of this artifact ({len(extra)} are not); remove it or compile again")


def _check_hashes(artifact: OpenArtifact) -> None:
    weights = {weight.path for weight in artifact.manifest.weights}
    for record in artifact.manifest.files:
        if record.path not in weights:
            _check_hash(record, artifact.fd(record.path), f"{artifact.path}/{record.path}")


def _check_hash(record: FileRecord, fd: int, where: str) -> None:
    hasher = hashlib.sha256()
    offset = 0
    while offset < record.size_bytes:
        piece = os.pread(fd, min(_READ_BYTES, record.size_bytes - offset), offset)
        if not piece:
            break
        hasher.update(piece)
        offset += len(piece)
    if hasher.hexdigest() != record.sha256:
        raise ArtifactError(
            f"{where}: damaged, expected SHA-256 {record.sha256}, found {hasher.hexdigest()}; fetch the artifact again or compile again"
        )


def _read_exactly(fd: int, size: int, where: str) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = os.pread(fd, min(_READ_BYTES, size - len(data)), len(data))
        if not piece:
            raise ArtifactError(f"{where}: ended after {len(data)} bytes while being read, expected {size}; try again when it stands still")
        data += piece
    return bytes(data)
