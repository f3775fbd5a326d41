"""Writing an artifact without loss.

Everything goes into a hidden folder beside OUT; files are synced, the manifest is written last, and one system call gives
the folder its name. A reader sees the old artifact or the new one. Where OUT holds an artifact already, the two folders
swap names (renameat2 RENAME_EXCHANGE) and the old one is deleted.

File systems without that call (NFS, some FUSE) get two renames: OUT to ".OUT.llmc-old-...", then the new folder to OUT.
A kill just between them leaves no OUT; the next writer, or `recover`, puts the old one back.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar

import msgspec

from llmc.artifacts.chunks import digest_of_chunks, sha256_hex
from llmc.artifacts.consistency import check_manifest
from llmc.artifacts.element_sizes import nbytes_of
from llmc.artifacts.filesystem import (
    OS,
    FileSystem,
    explain_os_error,
    remove_tree,
    require_free_bytes,
    sync_folder,
    write_all,
)
from llmc.artifacts.manifest import FileRecord, Image, Manifest, Role, TensorRecord, WeightFile
from llmc.artifacts.manifest_json import MAX_MANIFEST_BYTES, encode_manifest
from llmc.artifacts.relative_paths import MANIFEST_NAME, check_relative_path
from llmc.artifacts.temporary_folder import make_locked_folder, make_parents, recover, remove_stale, swap_folders
from llmc.artifacts.version import FORMAT_VERSION
from llmc.artifacts.weight_file import WeightTensor, copy_into, write_weight_file
from llmc.errors import ArtifactError, ConfigError, InternalError

_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)

T = TypeVar("T")
Published = Literal["written", "replaced", "unchanged"]


def check_output(out: Path, *, force: bool) -> None:
    """Refuse an output early, before an hour is spent on what goes there.

    Raises:
        ConfigError: `out` is an artifact and `force` is off, or it is something else that holds data.
    """
    if not os.path.lexists(out):
        return
    if not _is_artifact(os.path.realpath(out)):
        if os.path.isdir(out) and not os.listdir(out):
            return
        raise ConfigError(f"{out} exists and is not an llmc artifact; it will not be replaced, choose another output")
    if not force:
        raise ConfigError(f"{out} exists; give another output, or --force to replace it")


def artifact_digest(path: Path) -> str | None:
    """SHA-256 of a folder's manifest.json, which names the artifact; None if there is none. Nothing is checked."""
    try:
        with open(path / MANIFEST_NAME, "rb") as file:
            return sha256_hex(file.read(MAX_MANIFEST_BYTES + 1))
    except (FileNotFoundError, NotADirectoryError):
        return None


class ArtifactWriter:
    """Collects an artifact's files; `finish` publishes them all at once, or nothing.

        with ArtifactWriter(out, force=True) as writer:
            image = writer.add_image(library, "kernels")
            weights, tensors = writer.add_weights("weights/model.safetensors", ...)
            writer.finish(Manifest(..., images=[image], weights=[weights], tensors=tensors, files=[]))

    Any number of writers may write the same output at once: each has its own folder, the names swap in one step.
    """

    def __init__(self, out: Path, *, force: bool = False, fs: FileSystem = OS) -> None:
        """
        Args:
            out: where the artifact will be; a symbolic link is followed, missing parent folders are made.
            force: replace an artifact that is there. Without it an equal one is left alone, another one is an error.
            fs: file-system calls; tests give one that fails.
        """
        self.out = Path(os.path.realpath(out))
        self._force = force
        self._fs = fs
        self._folder = ""
        self._lock_fd = -1
        self._files: dict[str, FileRecord] = {}
        self._weights: dict[str, WeightFile] = {}
        self._tensors: dict[str, TensorRecord] = {}
        self._folders: list[str] = []

    @property
    def folder(self) -> Path:
        """The temporary folder. Files written there by other hands are published only through `add_file`."""
        return Path(self._folder)

    def __enter__(self) -> Self:
        parent = str(self.out.parent)
        try:
            make_parents(self._fs, parent)
            recover(self._fs, self.out)
            remove_stale(self._fs, self.out)
            self._folder, self._lock_fd = make_locked_folder(self._fs, self.out)
        except OSError as error:
            raise explain_os_error(error, "making a temporary folder", parent) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lock_fd < 0:
            return
        folder, self._folder = self._folder, ""
        try:
            if folder:
                remove_tree(self._fs, folder)
        except OSError as cleanup_error:
            note = f"{folder} could not be removed ({cleanup_error}); the next compile of this output removes it"
            if error is None:
                raise ArtifactError(f"{self.out}: the artifact is complete, but {note}") from cleanup_error
            error.add_note(note)
        finally:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def add_file(self, path: str, content: bytes | Path) -> FileRecord:
        """Put a file into the artifact.

        Args:
            path: its name inside the artifact.
            content: its bytes, or a file to copy.

        Raises:
            ArtifactError: the name is not allowed, or the file could not be written.
        """
        check_relative_path(path, str(self.out))
        if path in self._files:
            raise InternalError(f"{path} was added to the artifact twice; please report this")
        hasher = hashlib.sha256()
        size = len(content) if isinstance(content, bytes) else _size_of_source(content)

        def fill(fd: int) -> int:
            require_free_bytes(self._folder, size)
            if isinstance(content, bytes):
                hasher.update(content)
                write_all(self._fs, fd, content)
                return len(content)
            source = self._fs.open_source(str(content))
            try:
                return copy_into(self._fs, source, fd, hasher.update)
            finally:
                os.close(source)

        written = self._new_file(path, fill, needed_bytes=size)
        self._files[path] = FileRecord(path=path, size_bytes=written, sha256=hasher.hexdigest())
        return self._files[path]

    def add_image(self, content: bytes | Path, role: Role, extension: str = "so") -> Image:
        """Put a code object into the artifact under the name of its hash; the same bytes twice are one file."""
        data = content if isinstance(content, bytes) else _read_source(self._fs, content)
        digest = sha256_hex(data)
        path = f"images/{digest}.{extension}"
        if path not in self._files:
            self.add_file(path, data)
        return Image(sha256=digest, path=path, role=role)

    def add_weights(self, path: str, tensors: Sequence[WeightTensor]) -> tuple[WeightFile, list[TensorRecord]]:
        """Stream tensors into a weight file, in the order given; each tensor's blocks are asked for when its turn comes.

        Returns:
            The records for `Manifest.weights` and `Manifest.tensors`.
        """
        check_relative_path(path, str(self.out))
        needed = sum(_nbytes(tensor) for tensor in tensors)
        weight, records = self._new_file(path, lambda fd: write_weight_file(self._fs, fd, self._folder, path, tensors), needed_bytes=needed)
        self._files[path] = FileRecord(path=path, size_bytes=weight.size_bytes, sha256=digest_of_chunks(weight.chunks))
        self._weights[path] = weight
        return weight, records

    def adopt_file(self, record: FileRecord, source: Path, *, link: bool) -> None:
        """Take over a file whose record is known (from the cache): by hard link where allowed and possible, else by copy.

        The bytes are not hashed here: the caller has done so.
        """
        check_relative_path(record.path, str(self.out))
        if link and self._try_link(str(source), record.path):
            self._files[record.path] = record
            return
        copied = self.add_file(record.path, source)
        self._files[record.path] = msgspec.structs.replace(copied, sha256=record.sha256)

    def finish(self, manifest: Manifest, *, before_naming: Callable[[Path], None] | None = None) -> Published:
        """Write the manifest, make everything durable, and give the artifact its name.

        Args:
            manifest: complete but for `files`, `format_version` and `manifest_sha256`, which are set here.
            before_naming: called with the whole artifact's temporary folder; what it raises prevents the publication.

        Returns:
            "written", "replaced" (an artifact was there), or "unchanged" (the same artifact was there and `force` is off).

        Raises:
            ArtifactError: the system refused; nothing was published.
            ConfigError: another artifact, or something else, is in the way.
            InternalError: the manifest disagrees with itself or with the files added.
        """
        files = sorted(self._files.values(), key=lambda record: record.path)
        complete = msgspec.structs.replace(manifest, files=files, format_version=FORMAT_VERSION)
        try:
            check_manifest(complete, MANIFEST_NAME)
        except ArtifactError as error:
            raise InternalError(f"the compiler made a manifest that disagrees with itself: {error}; please report this") from error
        return self.publish(encode_manifest(complete), before_naming=before_naming)

    def publish(self, manifest_bytes: bytes, *, before_naming: Callable[[Path], None] | None = None) -> Published:
        """The second half of `finish`: for a caller that has the manifest's bytes already (the cache)."""
        try:
            for folder in self._folders:
                sync_folder(self._fs, folder)
        except OSError as error:
            raise explain_os_error(error, "making folders durable", str(self.out)) from error

        def fill(fd: int) -> None:
            write_all(self._fs, fd, manifest_bytes)

        self._new_file(MANIFEST_NAME, fill, needed_bytes=len(manifest_bytes))
        if before_naming is not None:
            before_naming(self.folder)
        try:
            sync_folder(self._fs, self._folder)
            result = self._take_name(sha256_hex(manifest_bytes))
        except OSError as error:
            raise explain_os_error(error, "giving the artifact its name", str(self.out)) from error
        try:
            sync_folder(self._fs, str(self.out.parent))
        except OSError as error:
            raise ArtifactError(
                f"{self.out}: the artifact is complete, but its name may not survive a power cut ({os.strerror(error.errno or 0)}); "
                f"check the disk, then compile again with --force"
            ) from error
        return result

    def _take_name(self, digest: str) -> Published:
        out = str(self.out)
        for _ in range(64):  # each round lost means that another writer won one
            try:
                self._fs.rename(self._folder, out)
            except OSError as error:
                if error.errno not in _OCCUPIED:
                    raise
            else:
                self._folder = ""
                return "written"
            there = artifact_digest(self.out)
            if there is None:
                check_output(self.out, force=self._force)
                continue
            if not self._force:
                if there == digest:
                    return "unchanged"
                raise ConfigError(f"{out} exists and differs from what was compiled; give another output, or --force to replace it")
            if self._exchange(out):
                return "replaced"
        raise ArtifactError(f"{out}: other writers kept taking the name 64 times over; run again")

    def _exchange(self, out: str) -> bool:
        """Swap names with the artifact that is there; afterwards our folder's name holds the old one, to be deleted."""
        old = swap_folders(self._fs, self._folder, Path(out))
        self._folder = old or self._folder
        return old is not None

    def _new_file(self, path: str, fill: Callable[[int], T], *, needed_bytes: int) -> T:
        try:
            fd = self._fs.create(self._prepare(path))
            try:
                result = fill(fd)
                self._fs.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise explain_os_error(error, f"writing {path}", str(self.out), needed_bytes=needed_bytes) from error
        return result

    def _prepare(self, path: str) -> str:
        """Make the folders above a file; returns its full name."""
        if not self._folder:
            raise InternalError("this ArtifactWriter is not open, or has published already; please report this")
        folder = self._folder
        for part in path.split("/")[:-1]:
            folder = f"{folder}/{part}"
            if folder not in self._folders:
                self._fs.mkdir(folder)
                self._folders.append(folder)
        return f"{self._folder}/{path}"

    def _try_link(self, source: str, path: str) -> bool:
        try:
            self._fs.link(source, self._prepare(path))
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                return False  # another file system, or one without hard links: copied instead
            raise explain_os_error(error, f"linking {path}", str(self.out)) from error
        return True


def _is_artifact(path: str) -> bool:
    return os.path.isfile(f"{path}/{MANIFEST_NAME}")


def _nbytes(tensor: WeightTensor) -> int:
    return nbytes_of(tensor.dtype, tensor.shape)


def _size_of_source(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise explain_os_error(error, "reading a file for the artifact", str(path)) from error


def _read_source(fs: FileSystem, path: Path) -> bytes:
    try:
        fd = fs.open_source(str(path))
        try:
            pieces = []
            while piece := fs.read(fd, 1 << 20):
                pieces.append(piece)
            return b"".join(pieces)
        finally:
            os.close(fd)
    except OSError as error:
        raise explain_os_error(error, "reading a code object for the artifact", str(path)) from error
