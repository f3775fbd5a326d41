"""The cache: what goes in comes out, damage is a miss, it stays within its size, and a miss can be explained."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import stat
from pathlib import Path

import pytest

from llmc.artifacts import open_artifact
from llmc.artifacts.keys import file_sha256, graph_key, input_key, make_key, model_parts, source_digest
from llmc.artifacts.stamps import StampFolder
from llmc.artifacts.store import Store
from llmc.artifacts.verify import verify
from llmc.errors import ArtifactError, ConfigError, InternalError
from tests.artifacts.failing_disk import Faulty
from tests.artifacts.small_artifact import replace_bytes, write_small

KEY = input_key({"config": "1", "target": "cpu"})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache", max_bytes=10 << 20)


def keep(store: Store, tmp_path: Path, key: object = KEY, seed: int = 0) -> Path:
    out = tmp_path / f"made{seed}"
    write_small(out, seed=seed)
    assert store.put(key, out, {"model": "tiny"})  # type: ignore[arg-type]
    return out


def test_an_artifact_comes_back_whole(store: Store, tmp_path: Path):
    made = keep(store, tmp_path)
    assert store.place(KEY, tmp_path / "again") == "written"
    verify(tmp_path / "again")
    assert (made / "manifest.json").read_bytes() == (tmp_path / "again/manifest.json").read_bytes()
    assert store.place(KEY, tmp_path / "again") == "unchanged"
    assert store.place(KEY, tmp_path / "again", force=True) == "replaced"
    verify(tmp_path / "again")
    assert os.stat(made / "weights/model.safetensors").st_ino == os.stat(tmp_path / "again/weights/model.safetensors").st_ino


def test_unknown_keys_miss(store: Store, tmp_path: Path):
    assert store.place(KEY, tmp_path / "out") is None
    assert store.find("../../etc/passwd") is None
    assert not store.fetch(KEY, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lowered_code_comes_back(store: Store, tmp_path: Path):
    code = tmp_path / "code"
    (code / "sub").mkdir(parents=True)
    (code / "a.so").write_bytes(b"code")
    (code / "sub/b.cpp").write_bytes(b"source")
    key = graph_key({"graph": "g"})
    assert store.put(key, code, {})
    assert store.fetch(key, tmp_path / "got")
    assert (tmp_path / "got/a.so").read_bytes() == b"code"
    assert (tmp_path / "got/sub/b.cpp").read_bytes() == b"source"


def test_every_damaged_file_is_a_miss_and_goes(store: Store, tmp_path: Path):
    made = keep(store, tmp_path)
    for blob in sorted((tmp_path / "cache/cas").glob("*/*")):
        assert store.place(KEY, tmp_path / "out", force=True)
        data = blob.read_bytes()
        replace_bytes(blob, bytes([data[0] ^ 1]) + data[1:])
        assert store.place(KEY, tmp_path / "out", force=True) is None
        assert not blob.exists()
        verify(tmp_path / "out")
        assert store.put(KEY, made, {})
    record = next((tmp_path / "cache/ac").glob("*/*.json"))
    for junk in (b"", b"{}", b"[" * 10_000, record.read_bytes()[:-5]):
        replace_bytes(record, junk)
        assert store.place(KEY, tmp_path / "out", force=True) is None


def test_editing_an_artifact_in_place_does_not_poison_the_cache(store: Store, tmp_path: Path):
    made = keep(store, tmp_path)  # shares its inodes with the cache
    image = next((made / "images").iterdir())
    image.chmod(0o644)
    image.write_bytes(b"evil" + image.read_bytes()[4:])
    assert store.place(KEY, tmp_path / "out") is None


def test_least_recently_used_goes_first(store: Store, tmp_path: Path):
    keys = [input_key({"n": str(n)}) for n in range(3)]
    for n, key in enumerate(keys):
        keep(store, tmp_path, key, seed=n)
        os.utime(tmp_path / f"cache/ac/{key.digest[:2]}/{key.digest}.json", (n, n))
    assert store.place(keys[0], tmp_path / "out")  # used again: now the newest
    one = store.entries()[0].size_bytes
    done = store.collect(max_bytes=one + one // 2)
    assert (done.removed_entries, store.find(keys[0]) is not None) == (2, True)
    assert store.find(keys[1]) is None
    assert sum(p.stat().st_size for p in (tmp_path / "cache/cas").glob("*/*")) == done.kept_bytes <= one + one // 2
    verify(tmp_path / "out")


def test_what_is_larger_than_the_cache_is_not_kept(tmp_path: Path):
    small = Store(tmp_path / "cache", max_bytes=100)
    write_small(tmp_path / "made")
    assert not small.put(KEY, tmp_path / "made", {})
    assert list((tmp_path / "cache/cas").glob("*/*")) == []


def test_nothing_is_collected_while_somebody_reads(store: Store, tmp_path: Path):
    keep(store, tmp_path)
    with open(tmp_path / "cache/lock") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        assert store.collect(max_bytes=0).removed_entries == 0
    assert store.collect(max_bytes=0).removed_entries == 1


def test_a_miss_is_explained_by_the_nearest_entry(store: Store, tmp_path: Path):
    keep(store, tmp_path, input_key({"torch": "2.12", "config": "1", "target": "cpu"}))
    keep(store, tmp_path, input_key({"torch": "2.12", "config": "2", "target": "gpu"}), seed=1)
    record, differences = store.nearest(input_key({"torch": "2.13", "config": "1", "target": "cpu"}))  # type: ignore[misc]
    assert record.parts["target"] == "cpu"
    assert [(d.part, d.a, d.b) for d in differences] == [("torch", "2.12", "2.13")]
    assert store.nearest(graph_key({"torch": "2.13"})) is None


def test_the_folder_must_be_private(tmp_path: Path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigError, match="writable by you alone"):
        Store(tmp_path / "open")
    Store(tmp_path / "new")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_keys_do_not_depend_on_order_and_hold_no_home(monkeypatch: pytest.MonkeyPatch):
    assert make_key("input", {"a": "1", "b": "2"}) == make_key("input", {"b": "2", "a": "1"})
    assert input_key({"a": "1"}).digest != graph_key({"a": "1"}).digest
    monkeypatch.setenv("HOME", "/home/somebody")
    with pytest.raises(InternalError, match="home folder"):
        input_key({"model": "/home/somebody/models/x"})


def test_model_files_are_hashed_once(tmp_path: Path):
    model, stamps = tmp_path / "model", StampFolder(tmp_path / "stamps")
    model.mkdir()
    (model / "config.json").write_bytes(b"{}")
    (model / "a.safetensors").write_bytes(b"weights")
    (model / "README.md").write_bytes(b"not an input")
    for path in model.iterdir():
        os.utime(path, (1, 1))
    first = model_parts(model, stamps)
    assert sorted(first) == ["model/a.safetensors", "model/config.json"]
    (model / "a.safetensors").write_bytes(b"WEIGHTS")
    os.utime(model / "a.safetensors", (1, 1))  # the change time tells, whatever the modification time says
    assert model_parts(model, stamps)["model/a.safetensors"] != first["model/a.safetensors"]


def test_a_stamp_needs_a_file_that_stood_still(tmp_path: Path):
    stamps, path = StampFolder(tmp_path / "stamps"), tmp_path / "file"
    path.write_bytes(b"1")
    info = path.stat()
    assert not stamps.remember(info, info, "sha256:x")  # too young
    import time

    time.sleep(0.06)
    assert stamps.remember(info, info, "sha256:x")
    assert stamps.find(info) == "sha256:x"
    path.write_bytes(b"2")
    assert stamps.find(path.stat()) is None
    assert file_sha256(path, stamps) != "x"


def test_source_digest_counts_names_and_bytes_but_no_places(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("x = 1")
    assert source_digest({"room": tmp_path / "one"}) == source_digest({"room": tmp_path / "two"})
    (tmp_path / "two/a.py").write_text("x = 2")
    assert source_digest({"room": tmp_path / "one"}) != source_digest({"room": tmp_path / "two"})


def _work(root: Path, out: Path, number: int) -> None:
    store = Store(root, max_bytes=1 << 20)
    with store.lock(KEY):
        if store.place(KEY, out) is None:
            with open(root / "compiled", "a") as log:
                log.write(f"{number}\n")
            write_small(out)
            store.put(KEY, out, {})


def test_eight_processes_compile_once(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    Store(tmp_path / "cache")
    workers = [context.Process(target=_work, args=(tmp_path / "cache", tmp_path / "out", n)) for n in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 8
    assert len((tmp_path / "cache/compiled").read_text().split()) == 1
    open_artifact(tmp_path / "out").close()


def test_any_call_may_fail_while_keeping_or_placing(tmp_path: Path):
    made = tmp_path / "made"
    write_small(made)
    for n in range(200):
        fs = Faulty(n, errno.ENOSPC)
        store = Store(tmp_path / "cache", fs=fs)
        try:
            store.put(KEY, made, {})
            store.place(KEY, tmp_path / "out", force=True)
        except ArtifactError as error:
            assert "No space left" in str(error) or "removed" in str(error)
        else:
            if not fs.failed:
                break
        whole = Store(tmp_path / "cache")
        if whole.place(KEY, tmp_path / "whole", force=True) is not None:
            verify(tmp_path / "whole")
        if (tmp_path / "out").exists():
            verify(tmp_path / "out")
    else:
        pytest.fail("keeping and placing take fewer than 200 calls")
    assert n > 30
