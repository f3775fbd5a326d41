"""A remote cache on a local HTTP server that is honest, missing files, cut, slow, wrong or broken; and in a folder."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fsspec", reason="the extra `remote`")
pytest.importorskip("aiohttp", reason="the extra `remote`")

from llmc.artifacts.keys import Key, input_key
from llmc.artifacts.remote import RemoteCache
from llmc.artifacts.store import Store
from llmc.cli import main
from llmc.errors import ArtifactError, ConfigError

# path of a GET -> what is sent instead of the file: (status, announced length, body, seconds between its pieces)
Fault = Callable[[str, bytes], tuple[int, int, bytes, float] | None]


class Host:
    """A folder over HTTP: GET and PUT, faults as a test says."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.fault: Fault = lambda path, data: None
        host = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *arguments: Any) -> None:
                return

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def do_PUT(self) -> None:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    data = b""
                    while size := int(self.rfile.readline(), 16):
                        data += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    data = self.rfile.read(int(self.headers["Content-Length"]))
                host.files[self.path] = data
                self.send_response(201)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def _answer(self, *, body: bool) -> None:
                data = host.files.get(self.path)
                status, length, sent, pause = (404, 0, b"", 0.0) if data is None else (200, len(data), data, 0.0)
                if data is not None and body:
                    status, length, sent, pause = host.fault(self.path, data) or (status, length, sent, pause)
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if body and pause:
                    for byte in sent:
                        self.wfile.write(bytes([byte]))
                        self.wfile.flush()
                        time.sleep(pause)
                elif body:
                    self.wfile.write(sent)
                self.close_connection = True

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/cache"


@pytest.fixture
def host() -> Iterator[Host]:
    found = Host()
    thread = threading.Thread(target=found.server.serve_forever, daemon=True)
    thread.start()
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "local")


@pytest.fixture
def key(store: Store, tmp_path: Path) -> Key:
    """An entry of three files, one of them empty, in the local cache."""
    folder = tmp_path / "lowered"
    (folder / "deep").mkdir(parents=True)
    (folder / "model.so").write_bytes(bytes(range(256)) * 40)
    (folder / "deep" / "facts.json").write_text('{"a": 1}')
    (folder / "empty").write_bytes(b"")
    made = input_key({"graph": "g", "target": "t"})
    assert store.put(made, folder, {"what": "test"})
    return made


def remote(host: Host) -> RemoteCache:
    return RemoteCache(host.url, timeout_s=1.0)


def contents(store: Store, key: Key, tmp_path: Path) -> dict[str, bytes]:
    out = tmp_path / "fetched"
    assert store.fetch(key, out)
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_what_is_pushed_can_be_pulled_elsewhere(host: Host, store: Store, key: Key, tmp_path: Path) -> None:
    sent = remote(host).push(str(key), store)
    assert (sent.files, sent.already_there) == (3, 0) and sent.bytes == 256 * 40 + 8
    assert sorted(path.split("/")[2] for path in host.files) == ["ac", "cas", "cas", "cas"]
    assert remote(host).push(str(key), store).files == 0  # files are sent once
    elsewhere = Store(tmp_path / "elsewhere")
    received = remote(host).pull(str(key), elsewhere)
    assert received is not None and received.files == 3
    assert contents(elsewhere, key, tmp_path) == contents(store, key, tmp_path / "other")
    again = remote(host).pull(str(key), elsewhere)
    assert again is not None and (again.files, again.already_there) == (0, 3)
    assert remote(host).verify(str(key), elsewhere).files == 3


def test_a_folder_is_a_remote_cache_too_and_leaves_no_temporary_files(store: Store, key: Key, tmp_path: Path) -> None:
    there = RemoteCache(f"file://{tmp_path / 'shared'}")
    there.push(str(key), store)
    names = sorted(path.name for path in (tmp_path / "shared").rglob("*") if path.is_file())
    assert len(names) == 4 and all(len(name) == 64 for name in names)
    elsewhere = Store(tmp_path / "elsewhere")
    assert there.pull(str(key), elsewhere) is not None
    assert contents(elsewhere, key, tmp_path)["deep/facts.json"] == b'{"a": 1}'


def test_what_is_not_there_is_a_miss(host: Host, store: Store, key: Key) -> None:
    assert remote(host).pull(str(key), store) is None
    with pytest.raises(ArtifactError, match="has no entry"):
        remote(host).verify(str(key), store)


def record_path(host: Host) -> str:
    return next(path for path in host.files if "/ac/" in path)


def largest(host: Host) -> str:
    return max((path for path in host.files if "/cas/" in path), key=lambda path: len(host.files[path]))


def on(path: str, status: int, length: int, body: bytes, pause: float = 0.0) -> Fault:
    return lambda asked, data: (status, length, body, pause) if asked == path else None


def faults(host: Host) -> dict[str, Fault]:
    """Ways for the largest file, and for the record, to come wrong."""
    file, record = largest(host), record_path(host)
    data, entry = host.files[file], host.files[record]
    changed = bytes([data[0] ^ 1]) + data[1:]
    other = json.loads(entry)
    escaping = json.dumps({**other, "files": [{**other["files"][0], "path": "../escape"}]}).encode()
    foreign = json.dumps({**other, "key": "0" * 64}).encode()
    twice = json.dumps({**other, "files": other["files"][:1] * 2}).encode()
    huge = json.dumps({**other, "files": [{**other["files"][0], "size_bytes": 1 << 50}]}).encode()
    return {
        "cut in the middle": on(file, 200, len(data), data[:5000]),
        "short, and says so": on(file, 200, 5000, data[:5000]),
        "longer than said": on(file, 200, len(data) + 9, data + b"x" * 9),
        "one bit changed": on(file, 200, len(data), changed),
        "an error page": on(file, 500, 4, b"oops"),
        "too slow": on(file, 200, len(data), data, 0.1),
        "silent": on(file, 200, len(data), data[:1], 30.0),
        "record cut": on(record, 200, len(entry), entry[:20]),
        "record is no JSON": on(record, 200, 5, b"<htm>"),
        "record of another key": on(record, 200, len(foreign), foreign),
        "record with a path outside": on(record, 200, len(escaping), escaping),
        "record that names a file twice": on(record, 200, len(twice), twice),
        "record of more than the cache holds": on(record, 200, len(huge), huge),
        "server error for the record": on(record, 503, 0, b""),
    }


NAMES = ["cut in the middle", "short, and says so", "longer than said", "one bit changed", "an error page", "too slow", "silent",
         "record cut", "record is no JSON", "record of another key", "record with a path outside", "record that names a file twice",
         "record of more than the cache holds", "server error for the record"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_answer_is_an_error_and_the_local_cache_stays_as_it_was(
    host: Host, store: Store, key: Key, tmp_path: Path, name: str
) -> None:
    remote(host).push(str(key), store)
    found = faults(host)
    assert set(found) == set(NAMES)
    host.fault = found[name]
    elsewhere = Store(tmp_path / "elsewhere")
    for attempt in (remote(host).pull, remote(host).verify):
        with pytest.raises(ArtifactError) as caught:
            attempt(str(key), elsewhere)
        assert host.url in str(caught.value)
        assert "\n" not in str(caught.value)[:200]
        if name == "record of more than the cache holds":
            break  # verifying keeps nothing, so it would download until the answer ends
    assert elsewhere.entries() == [] and elsewhere.find(key) is None
    whole = {path.name for path in elsewhere.root.glob("cas/*/*")}
    assert largest(host).split("/")[-1] not in whole and not any(name.startswith(".") for name in whole)
    assert not (tmp_path / "escape").exists()
    host.fault = lambda path, data: None
    assert remote(host).pull(str(key), elsewhere) is not None  # and the next try finds it
    assert contents(elsewhere, key, tmp_path) == contents(store, key, tmp_path / "other")


def test_a_file_that_the_record_names_and_nobody_has(host: Host, store: Store, key: Key, tmp_path: Path) -> None:
    remote(host).push(str(key), store)
    del host.files[largest(host)]
    with pytest.raises(ArtifactError, match=r"lacks model\.so"):
        remote(host).pull(str(key), Store(tmp_path / "elsewhere"))


def test_what_is_damaged_here_is_not_sent(host: Host, store: Store, key: Key) -> None:
    blob = max(store.root.glob("cas/*/*"), key=lambda path: path.stat().st_size)
    blob.chmod(0o600)
    blob.write_bytes(b"x" * blob.stat().st_size)
    with pytest.raises(ArtifactError, match="damaged in the local cache"):
        remote(host).push(str(key), store)
    assert host.files == {} or not any("/ac/" in path for path in host.files)


def test_no_server_and_no_url(store: Store, key: Key) -> None:
    with pytest.raises(ArtifactError, match=r"cannot be read: .*9"):
        RemoteCache("http://127.0.0.1:9/cache", timeout_s=1.0).pull(str(key), store)
    with pytest.raises(ConfigError, match="is no URL"):
        RemoteCache("some/folder")
    with pytest.raises(ConfigError):
        RemoteCache("nosuchprotocol://x")


def test_commands(
    host: Host, store: Store, key: Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMC_CACHE_DIR", str(store.root))
    assert main(["cache", "push", "--remote", host.url]) == 2
    assert main(["cache", "push", str(key)[:12], "--remote", host.url]) == 0
    assert "3 files, 10.2 kB sent; 0 were there" in capsys.readouterr().out
    monkeypatch.setenv("LLMC_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert main(["cache", "pull", "0" * 64, "--remote", host.url]) == 1
    assert "miss:" in capsys.readouterr().out
    assert main(["cache", "pull", str(key)[:12], "--remote", host.url]) == 2
    assert "64 hexadecimal digits" in capsys.readouterr().err
    assert main(["cache", "pull", str(key), "--remote", host.url]) == 0
    assert main(["cache", "verify", str(key), "--remote", host.url]) == 0
    assert main(["cache", "verify"]) == 0
    assert "1 entries are whole" in capsys.readouterr().out
    blob = max((tmp_path / "elsewhere").glob("cas/*/*"), key=lambda path: path.stat().st_size)
    blob.chmod(0o600)
    blob.write_bytes(b"x" * blob.stat().st_size)
    assert main(["cache", "verify"]) == 4
    assert "model.so" in capsys.readouterr().err
    assert main(["cache", "verify"]) == 0
    assert "0 entries are whole" in capsys.readouterr().out
