"""Writing without loss: afterwards OUT is the old artifact or the new one, and no temporary folder stays."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import stat
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from llmc.artifacts import open_artifact
from llmc.artifacts.filesystem import FileSystem
from llmc.artifacts.inspect import diff
from llmc.artifacts.verify import verify
from llmc.artifacts.weight_file import WeightTensor
from llmc.artifacts.writer import ArtifactWriter, artifact_digest, check_output
from llmc.errors import ArtifactError, ConfigError, InternalError
from tests.artifacts.failing_disk import Faulty
from tests.artifacts.small_artifact import replace_bytes, small_manifest, write_small


class NoExchange(FileSystem):
    """A file system without renameat2."""

    def exchange(self, one: str, other: str) -> None:
        raise OSError(errno.EINVAL, "not supported")


def hidden(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EMFILE])
def test_any_call_may_fail(tmp_path: Path, code: int):
    out = tmp_path / "out"
    write_small(out)
    old = artifact_digest(out)
    for n in range(1000):
        fs = Faulty(n, code)
        try:
            write_small(out, force=True, fs=fs, seed=n + 1)
        except ArtifactError as error:
            assert os.strerror(code) in str(error) or "removed" in str(error)
            if code == errno.ENOSPC and "were needed" in str(error):
                assert "are free on that file system" in str(error)
            if artifact_digest(out) != old:
                assert fs.failed in ("fsync", "open_folder", "unlink", "rmdir")  # after the names were swapped
                old = artifact_digest(out)
        else:
            old = artifact_digest(out)
            if not fs.failed:
                break
        verify(out)
    else:
        pytest.fail("a write makes fewer than 1000 calls")
    assert n > 30
    assert hidden(tmp_path) == []  # what a failing clean-up left, the next writer removed


@pytest.mark.parametrize("fail_at", range(0, 36, 7))  # a write makes 42 calls up to the one that swaps the names
def test_a_disk_that_stays_full(tmp_path: Path, fail_at: int):
    out = tmp_path / "out"
    write_small(out)
    old = artifact_digest(out)
    with pytest.raises(ArtifactError, match="No space left"):
        write_small(out, force=True, fs=Faulty(fail_at, errno.ENOSPC, for_good=True), seed=1)
    assert artifact_digest(out) == old
    verify(out)
    assert write_small(out, force=True, seed=2) == "replaced"
    assert hidden(tmp_path) == []


def test_no_room_is_known_before_anything_is_written(tmp_path: Path):
    def never() -> list[np.ndarray[Any, Any]]:
        pytest.fail("blocks were asked for")

    huge = WeightTensor(name="w", dtype="float32", shape=(1 << 24, 1 << 24), recipe={}, blocks=never)
    with pytest.raises(ArtifactError, match=rf"{4 << 48} bytes were needed, \d+ are free"), ArtifactWriter(tmp_path / "out") as writer:
        writer.add_weights("weights/model.safetensors", [huge])
    assert os.listdir(tmp_path) == []


def test_an_error_in_the_caller_leaves_nothing(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), ArtifactWriter(tmp_path / "out") as writer:
        writer.add_file("a", b"1")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_force_and_equal_artifacts(tmp_path: Path):
    out = tmp_path / "deep/er/out"
    assert write_small(out) == "written"
    inode = out.stat().st_ino
    assert write_small(out) == "unchanged"
    assert out.stat().st_ino == inode
    with pytest.raises(ConfigError, match="exists and differs"):
        write_small(out, seed=1)
    with pytest.raises(ConfigError, match="--force to replace"):
        check_output(out, force=False)
    check_output(out, force=True)
    assert write_small(out, seed=1, force=True) == "replaced"
    assert os.listdir(out.parent) == ["out"]


def test_what_is_no_artifact_is_never_replaced(tmp_path: Path):
    precious = tmp_path / "home"
    precious.mkdir()
    assert write_small(precious, force=True) == "written"  # an empty folder may be taken
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("docs", "file"):
        with pytest.raises(ConfigError, match="is not an llmc artifact"):
            write_small(tmp_path / name, force=True)
    assert (tmp_path / "docs/thesis.txt").read_text() == "years of work"
    assert hidden(tmp_path) == []


def test_nothing_is_writable_by_others_under_any_umask(tmp_path: Path):
    for umask in (0o000, 0o077):
        old = os.umask(umask)
        try:
            write_small(tmp_path / f"out{umask}")
        finally:
            os.umask(old)
        for path in [tmp_path / f"out{umask}", *(tmp_path / f"out{umask}").rglob("*")]:
            mode = stat.S_IMODE(path.stat().st_mode)
            assert not mode & 0o022
            assert path.is_dir() or not mode & 0o222
            assert not mode & umask
        verify(tmp_path / f"out{umask}")


def test_same_input_same_bytes(tmp_path: Path):
    write_small(tmp_path / "a")
    write_small(tmp_path / "elsewhere/b")
    names = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "elsewhere/b" / name).read_bytes()
    assert diff(tmp_path / "a", tmp_path / "elsewhere/b") == []
    write_small(tmp_path / "c", seed=1)
    assert {d.path.split("[")[0] for d in diff(tmp_path / "a", tmp_path / "c")} == {"files", "weights"}


def test_without_exchange(tmp_path: Path):
    out = tmp_path / "out"
    write_small(out)
    assert write_small(out, seed=1, force=True, fs=NoExchange()) == "replaced"
    verify(out)
    assert hidden(tmp_path) == []


def test_without_exchange_a_kill_between_the_renames_is_repaired(tmp_path: Path):
    out = tmp_path / "out"
    write_small(out)
    old = artifact_digest(out)
    out.rename(tmp_path / ".out.llmc-old-1-aaaaaaaaaaaa")
    with pytest.raises(KeyError), ArtifactWriter(out):
        assert artifact_digest(out) == old
        raise KeyError
    verify(out)
    assert hidden(tmp_path) == []


def test_left_overs_go_and_work_in_progress_stays(tmp_path: Path):
    (tmp_path / ".out.llmc-tmp-1-abc").mkdir()
    (tmp_path / ".out.llmc-tmp-1-abc/file").write_text("x")
    (tmp_path / ".other.llmc-tmp-1-abc").mkdir()
    with ArtifactWriter(tmp_path / "out") as first, ArtifactWriter(tmp_path / "out") as second:
        first.add_file("a", b"1")
        assert first.folder != second.folder
        assert not (tmp_path / ".out.llmc-tmp-1-abc").exists()
    assert hidden(tmp_path) == [".other.llmc-tmp-1-abc"]


def test_a_reader_sees_the_old_or_the_new(tmp_path: Path):
    out = tmp_path / "out"
    write_small(out)
    context = multiprocessing.get_context("fork")
    writer = context.Process(target=_rewrite, args=(out, 40))
    writer.start()
    opened = 0
    while writer.is_alive():
        with open_artifact(out) as artifact:
            artifact.read("tokenizer/tokenizer.json")
        opened += 1
    writer.join()
    assert writer.exitcode == 0
    assert opened > 10


def _rewrite(out: Path, times: int) -> None:
    for n in range(times):
        write_small(out, force=True, seed=n % 2)


@pytest.mark.parametrize("force", [False, True])
def test_eight_writers_at_once(tmp_path: Path, force: bool):
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(8)
    workers = [context.Process(target=_write_at, args=(gate, tmp_path / "out", force)) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 8
    assert os.listdir(tmp_path) == ["out"]
    verify(tmp_path / "out")


def _write_at(gate: Any, out: Path, force: bool) -> None:
    gate.wait(30)
    write_small(out, force=force)


def kill_at_random(tmp_path: Path, times: int) -> None:
    out = tmp_path / "out"
    write_small(out)
    known = {artifact_digest(out)}
    write_small(tmp_path / "other", seed=1)
    known.add(artifact_digest(tmp_path / "other"))
    context = multiprocessing.get_context("fork")
    rng = np.random.default_rng(0)
    for _ in range(times):
        writer = context.Process(target=_rewrite, args=(out, 1000))
        writer.start()
        time.sleep(float(rng.uniform(0.005, 0.08)))
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join()
        assert artifact_digest(out) in known
        verify(out)
    assert write_small(out, force=True) == "replaced"
    assert hidden(tmp_path) == []


def test_sigkill_at_random_moments(tmp_path: Path):
    kill_at_random(tmp_path, 20)


@pytest.mark.slow
def test_sigkill_at_random_moments_200_times(tmp_path: Path):
    kill_at_random(tmp_path, 200)


def test_a_check_that_fails_prevents_the_publication(tmp_path: Path):
    write_small(tmp_path / "out")
    old = artifact_digest(tmp_path / "out")
    seen = []

    def refuse(folder: Path) -> None:
        seen.append(verify(folder).num_files)
        raise InternalError("canary")

    with pytest.raises(InternalError, match="canary"), ArtifactWriter(tmp_path / "out", force=True) as writer:
        writer.add_file("a", b"1")
        empty = msgspec.structs.replace(small_manifest(), entries=[])
        tokenizer = msgspec.structs.replace(empty.tokenizer, tokenizer_json=None, chat_template=None)
        writer.finish(msgspec.structs.replace(empty, tokenizer=tokenizer), before_naming=refuse)
    assert seen == [2]
    assert artifact_digest(tmp_path / "out") == old
    assert hidden(tmp_path) == []


def test_our_own_mistakes_are_ours(tmp_path: Path):
    with ArtifactWriter(tmp_path / "out") as writer:
        writer.add_file("a", b"1")
        with pytest.raises(InternalError, match="twice"):
            writer.add_file("a", b"2")
        with pytest.raises(ArtifactError, match="is not allowed"):
            writer.add_file("../a", b"2")
        short = WeightTensor(name="w", dtype="float32", shape=(4,), recipe={}, blocks=lambda: [np.zeros(3, np.float32)])
        with pytest.raises(InternalError, match="its blocks have 12 bytes"):
            writer.add_weights("weights/a.safetensors", [short])
        wrong = WeightTensor(name="w", dtype="bfloat16", shape=(4,), recipe={}, blocks=lambda: [np.zeros(4, np.float16)])
        with pytest.raises(InternalError, match="a block has dtype float16"):
            writer.add_weights("weights/b.safetensors", [wrong])


def test_weights_load_in_the_safetensors_library(tmp_path: Path):
    safetensors = pytest.importorskip("safetensors")
    write_small(tmp_path / "out")
    with safetensors.safe_open(tmp_path / "out/weights/model.safetensors", "numpy") as file:
        assert file.get_tensor("norm").shape == (5,)
        assert file.get_slice("embed").get_shape() == [8, 16, 16, 2]


def test_verify_once_trusts_a_stamp_and_only_that_file(tmp_path: Path):
    from llmc.artifacts.stamps import StampFolder

    out, stamps = tmp_path / "out", StampFolder(tmp_path / "stamps")
    write_small(out)
    time.sleep(0.06)

    def read(mode: Any) -> bool:
        with open_artifact(out) as artifact:
            (source,) = artifact.weights(verify=mode, stamps=stamps)
            for index in range(source.num_chunks):
                source.read_chunk(index, memoryview(bytearray(source.chunk_span(index)[1])))
            source.finish()
            return source.must_verify

    assert [read("never"), read("once"), read("once"), read("always")] == [False, True, False, True]
    path = out / "weights/model.safetensors"
    replace_bytes(path, path.read_bytes()[:-1] + b"!")
    with pytest.raises(ArtifactError, match=r"bytes 0 to 12352 are damaged"):
        read("once")
    assert not read("never")


def test_a_source_that_was_not_read_is_not_finished(tmp_path: Path):
    write_small(tmp_path / "out")
    with open_artifact(tmp_path / "out") as artifact, pytest.raises(InternalError, match="never verified"):
        artifact.weights()[0].finish()
