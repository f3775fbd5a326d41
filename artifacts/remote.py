"""A compile cache elsewhere, over fsspec: URL/ac/<key> is a record, URL/cas/<digest> a file, as in the local one.

Nothing that comes from there is believed: records are judged as foreign input, every file is hashed before it gets its name in the
local cache, lengths and times are bounded. What it does mean: who may write to a remote cache decides what code runs here, so it
belongs behind https and credentials of its own; signatures (`llmc sign`) hold whatever the way.

Files are pushed before the record that names them, so a reader finds a whole entry or none.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from llmc.artifacts.store import Store
from llmc.artifacts.stored_files import MAX_RECORD_BYTES, Record, StoredFile, decode_record, total_bytes
from llmc.errors import ArtifactError, ConfigError

_PIECE_BYTES = 1 << 20
_SLOWEST_BYTES_PER_S = 50_000  # a file slower than this, after the first `timeout_s`, counts as failed
_RENAMES = {"file", "local", "memory"}  # where a write can be seen half done, and a rename is cheap


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What a push or pull did; files that were there already are not moved."""

    files: int
    bytes: int
    already_there: int


class RemoteCache:
    """A remote cache. Every failure there is an ArtifactError that names the URL; the local cache holds then what it held before.

    Args:
        url: anything fsspec opens: https://..., s3://bucket/path, gs://..., file:///folder.
        timeout_s: for a connection, and between two pieces of an answer.

    Raises:
        ConfigError: fsspec, or what this kind of URL needs, is not installed.
    """

    def __init__(self, url: str, *, timeout_s: float = 30.0) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise ConfigError("a remote cache needs fsspec: pip install 'llmc[remote]'") from error
        if "://" not in url:
            raise ConfigError(f"{url!r} is no URL; write for example https://host/cache, s3://bucket/cache or file:///folder")
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        protocol = url.split("://")[0]
        try:
            options = _http_options(timeout_s) if protocol in ("http", "https") else {}
            self._fs, root = fsspec.core.url_to_fs(self.url, **options)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{url}: {error}") from error
        self._root, self._renames = str(root).rstrip("/"), protocol in _RENAMES
        self._how: dict[str, Any] = {"method": "put"} if protocol in ("http", "https") else {}

    def find(self, key: str) -> Record | None:
        """The entry of a key; None if there is none.

        Raises:
            ArtifactError: the remote failed, or what it holds is no record of that key.
        """
        try:
            data = b"".join(self._pieces(f"ac/{key}", MAX_RECORD_BYTES))
        except FileNotFoundError:
            return None
        with self._named():
            return decode_record(data, key)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """What is wrong with bytes from here is told with their URL."""
        try:
            yield
        except ArtifactError as error:
            raise error if str(error).startswith(self.url) else ArtifactError(f"{self.url}: {error}") from error

    def pull(self, key: str, store: Store) -> Moved | None:
        """Bring an entry into the local cache; None if the remote does not have it.

        Raises:
            ArtifactError: the remote failed, or gave something else than its record says.
        """
        record = self.find(key)
        if record is None:
            return None
        if total_bytes(record) > store.max_bytes:
            raise ArtifactError(f"{self.url}: entry {key} takes {total_bytes(record)} bytes, the local cache holds {store.max_bytes}")
        moved = 0
        with store.reading():
            missing = [stored for stored in record.files if not store.holds(stored)]
            for stored in missing:
                moved += stored.size_bytes
                with self._named():
                    store.receive(stored, self._download(stored))
            store.keep(record)
        store.collect()
        return Moved(files=len(missing), bytes=moved, already_there=len(record.files) - len(missing))

    def push(self, key: str, store: Store) -> Moved:
        """Send an entry of the local cache.

        Raises:
            ArtifactError: it is not there or damaged here, or the remote refuses it.
        """
        sent, bytes_sent = 0, 0
        with store.reading():
            record = store.find(key)
            if record is None:
                raise ArtifactError(f"{key}: is not in the local cache; `llmc cache ls` lists what is")
            for stored in record.files:
                if not store.holds(stored):
                    raise ArtifactError(f"{key}: {stored.path} is damaged in the local cache; compile again")
                if self._size(f"cas/{stored.digest}") == stored.size_bytes:
                    continue
                self._upload(f"cas/{stored.digest}", partial(self._fs.put_file, str(store.path_of(stored)), **self._how))
                sent, bytes_sent = sent + 1, bytes_sent + stored.size_bytes
            data = msgspec.json.encode(record, order="sorted")
            self._upload(f"ac/{key}", lambda path: self._fs.pipe_file(path, data))
        return Moved(files=sent, bytes=bytes_sent, already_there=len(record.files) - sent)

    def verify(self, key: str, store: Store) -> Moved:
        """Download every file of an entry and hash it; nothing is kept. `store` gives room for that.

        Raises:
            ArtifactError: it is not there, not whole, or not what its record says.
        """
        record = self.find(key)
        if record is None:
            raise ArtifactError(f"{self.url}: has no entry {key}")
        for stored in record.files:
            with self._named():
                store.examine(stored, self._download(stored))
        return Moved(files=len(record.files), bytes=total_bytes(record), already_there=0)

    def _download(self, stored: StoredFile) -> Iterator[bytes]:
        """The bytes of a file of an entry, and at most one more; what is wrong with them is for the store to say."""
        try:
            yield from self._pieces(f"cas/{stored.digest}", stored.size_bytes + 1)
        except FileNotFoundError as error:
            raise ArtifactError(f"{self.url}: lacks {stored.path} of an entry it names ({stored.digest[:16]})") from error

    def _pieces(self, name: str, most_bytes: int) -> Iterator[bytes]:
        """The content of a remote file, at most `most_bytes` of it.

        Raises:
            FileNotFoundError: there is none.
            ArtifactError: anything else went wrong, or it takes too long.
        """
        started, read = time.monotonic(), 0
        try:
            with self._fs.open(f"{self._root}/{name}", "rb", **self._unbuffered()) as file:
                while read < most_bytes and (piece := file.read(min(_PIECE_BYTES, most_bytes - read))):
                    read += len(piece)
                    if time.monotonic() - started > self.timeout_s + read / _SLOWEST_BYTES_PER_S:
                        raise ArtifactError(f"{self.url}: {name} comes too slowly, {read} bytes in {time.monotonic() - started:.0f} s")
                    yield bytes(piece)
        except (ArtifactError, GeneratorExit):
            raise
        except FileNotFoundError as error:
            # fsspec's http also calls a server that is down "not found"; what it was stands in the chain of causes
            root = _root_cause(error)
            if isinstance(root, FileNotFoundError) or getattr(root, "status", None) in (404, 410):
                raise
            raise ArtifactError(f"{self.url}: {name} cannot be read: {_reason(root)}") from error
        except Exception as error:  # every file system of fsspec has errors of its own
            raise ArtifactError(f"{self.url}: {name} cannot be read: {_reason(error)}") from error

    def _unbuffered(self) -> dict[str, Any]:
        """http: one streamed answer, since not every server gives ranges."""
        return {"block_size": 0} if self.url.startswith("http") else {}

    def _size(self, name: str) -> int | None:
        """Bytes of a remote file; None if it is not there, or its size cannot be told, and it is to be sent."""
        with suppress(Exception):
            size = self._fs.info(f"{self._root}/{name}").get("size")
            return int(size) if size is not None else None
        return None

    def _upload(self, name: str, write: Callable[[str], None]) -> None:
        path = f"{self._root}/{name}"
        try:
            if self._renames:
                temporary = f"{path}.{secrets.token_hex(8)}"
                self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
                write(temporary)
                self._fs.mv(temporary, path)
            else:
                write(path)
        except Exception as error:  # every file system of fsspec has errors of its own
            raise ArtifactError(f"{self.url}: {name} cannot be written: {_reason(error)}") from error


def _http_options(timeout_s: float) -> dict[str, Any]:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
    return {"client_kwargs": {"timeout": timeout}, "skip_instance_cache": True}


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300] if str(error) else type(error).__name__
