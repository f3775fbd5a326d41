"""Broken and hostile artifacts: each is refused with its own sentence, and nothing of it is mapped as code."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from llmc.artifacts import open_artifact
from llmc.artifacts.manifest import Entry, FileRecord, Requirements
from llmc.artifacts.manifest_json import decode_manifest
from llmc.artifacts.requirements import Machine, check_requirements
from llmc.artifacts.verify import verify
from llmc.errors import ArtifactError
from tests.artifacts.small_artifact import replace_bytes, rewrite_manifest, write_small


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pristine") / "out"
    write_small(out)
    return out


@pytest.fixture
def out(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "out"))


def files_of(out: Path) -> list[Path]:
    return sorted(path for path in out.rglob("*") if path.is_file())


def refusal(out: Path) -> str:
    """The one sentence, checked to be one and to name the artifact."""
    with pytest.raises(ArtifactError) as caught:
        verify(out)
    message = str(caught.value)
    assert "\n" not in message
    assert str(out) in message
    assert len(message) < 700
    return message


def test_the_pristine_one_opens(pristine: Path):
    assert verify(pristine).num_files == 6
    with open_artifact(pristine) as artifact:
        assert artifact.read("tokenizer/tokenizer.json") == b'{"version":"1.0"}'
        assert os.pread(artifact.fd(artifact.image("kernels").path), 4, 0) == b"not "  # type: ignore[union-attr]


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, -1.0])
def test_truncated(out: Path, keep: float):
    for path in files_of(out):
        data = path.read_bytes()
        replace_bytes(path, data[: int(len(data) * keep)] if keep >= 0 else data[:-1])
        message = refusal(out)
        assert str(path) in message
        assert ("bytes, expected" in message) or path.name == "manifest.json"
        replace_bytes(path, data)
    verify(out)


def test_a_flipped_byte_anywhere(out: Path):
    for path in files_of(out):
        data = path.read_bytes()
        for place in sorted({0, 1, len(data) // 3, len(data) // 2, len(data) - 2, len(data) - 1}):
            for flip in (1, 0x20, 0x80):
                replace_bytes(path, data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
                assert path.name in refusal(out)
        replace_bytes(path, data)


def test_every_byte_of_the_manifest_counts(out: Path):
    path = out / "manifest.json"
    data = path.read_bytes()
    for place in range(len(data)):
        with pytest.raises(ArtifactError):
            decode_manifest(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :], "manifest.json")


def test_two_files_swapped(out: Path):
    swap(out / "tokenizer/tokenizer.json", out / "tokenizer/chat_template.jinja")
    assert "bytes, expected" in refusal(out)
    swap(out / "tokenizer/tokenizer.json", out / "tokenizer/chat_template.jinja")
    swap(*(out / "images").iterdir())  # of one size
    assert "damaged, expected SHA-256" in refusal(out)


def swap(one: Path, other: Path) -> None:
    aside = one.parent.parent.parent / "aside"
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def test_added_files_and_folders(out: Path):
    (out / "images/extra.so").write_bytes(b"code")
    assert "is not a file of this artifact" in refusal(out)
    (out / "images/extra.so").unlink()
    (out / ".hidden").write_bytes(b"")
    assert "is not a file of this artifact" in refusal(out)
    (out / ".hidden").unlink()
    (out / "empty").mkdir()
    assert "an empty folder" in refusal(out)


def test_missing_files(out: Path):
    (out / "tokenizer/tokenizer.json").unlink()
    assert "tokenizer.json: is missing (1 of 5 files are)" in refusal(out)
    (out / "manifest.json").unlink()
    assert "holds no manifest.json" in refusal(out)
    shutil.rmtree(out)
    assert "there is no such artifact" in refusal(out)
    out.write_bytes(b"a file")
    assert "cannot be opened as an artifact folder" in refusal(out)


def test_links(out: Path, tmp_path: Path):
    path = out / "tokenizer/tokenizer.json"
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    assert "is a symbolic link" in refusal(out)
    path.unlink()
    (tmp_path / "elsewhere.json").rename(path)
    (out / "images").rename(tmp_path / "images")
    (out / "images").symlink_to(tmp_path / "images")
    assert "is a symbolic link" in refusal(out)


def test_fifos_do_not_block(out: Path):
    path = out / "tokenizer/tokenizer.json"
    path.unlink()
    os.mkfifo(path)
    assert "neither a file nor a folder" in refusal(out)


def test_a_link_to_the_whole_artifact_is_fine(out: Path, tmp_path: Path):
    (tmp_path / "current").symlink_to(out)
    verify(tmp_path / "current")


@pytest.mark.parametrize("where", ["", "images", "tokenizer/tokenizer.json", "manifest.json"])
def test_writable_by_others(out: Path, where: str):
    for mode in (0o020, 0o002):
        path = out / where
        path.chmod((path.stat().st_mode & 0o777) | mode)
        assert "may be written by group or others" in refusal(out)
        path.chmod(path.stat().st_mode & ~mode)
    verify(out)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_owned_by_somebody_else(out: Path):
    os.chown(out / "tokenizer/tokenizer.json", 12345, -1)
    assert "belongs to user 12345" in refusal(out)


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/etc/passwd",
        "a/../b",
        "a//b",
        ".",
        "..",
        "",
        ".hidden",
        "a/.b",
        "a\\b",
        "a\x00b",
        "a\nb",
        "manifest.json",
        "signature.sig",
        "ü",
        "a/b/c/d/e/f/g/h/i",
        "x" * 300,
    ],
)
def test_names_that_lead_elsewhere(out: Path, name: str):
    manifest = decode_manifest((out / "manifest.json").read_bytes(), "")
    rewrite_manifest(out, files=[*manifest.files, FileRecord(path=name, size_bytes=0, sha256="0" * 64)])
    message = refusal(out)
    assert "is not allowed" in message or "is reserved" in message


def test_versions(out: Path):
    data = (out / "manifest.json").read_bytes()
    for version, says in [(7, "format_version 7 is newer than this runtime reads (1 to 3); upgrade llmc"), (0, "is older than")]:
        replace_bytes(out / "manifest.json", data.replace(b'"format_version":3', b'"format_version":%d' % version))
        assert says in refusal(out)
    future = b'{"format_version":4,"everything":{"else":["may","differ"]}}'
    replace_bytes(out / "manifest.json", future)
    assert "newer than this runtime reads" in refusal(out)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"format_version":"1"}',
        b'{"format_version":1.5}',
        b'{"format_version":1}',
        b"\xff",
        b'{"format_version":NaN}',
        b'{"format_version":' + b"9" * 5000 + b"}",
        b"[" * 1_000_000,
        b'{"format_version":1,"model":' + b'{"a":' * 100_000,
    ],
)
def test_what_is_no_manifest(out: Path, data: bytes):
    replace_bytes(out / "manifest.json", data)
    assert "manifest.json" in refusal(out)


def test_a_huge_manifest_is_not_read(out: Path):
    path = out / "manifest.json"
    path.chmod(0o644)
    os.truncate(path, 1 << 40)  # sparse
    assert "more than a manifest may have" in refusal(out)


def test_unknown_fields_are_refused(out: Path):
    data = (out / "manifest.json").read_bytes()
    replace_bytes(out / "manifest.json", data.replace(b'{"canaries"', b'{"also":1,"canaries"'))
    assert "unknown field `also`" in refusal(out)


CHANGES: list[tuple[str, Callable[[object], dict[str, object]]]] = [
    ("lists images/", lambda m: {"files": [*m.files, m.files[0]]}),
    ("not named images/<its SHA-256>", lambda m: {"images": [msgspec.structs.replace(m.images[0], path="tokenizer/tokenizer.json")]}),
    ("which is not listed in files", lambda m: {"images": [msgspec.structs.replace(m.images[0], path="images/none.so")]}),
    ("needs 1 chunk digests", lambda m: {"weights": [msgspec.structs.replace(m.weights[0], chunks=[])]}),
    ("is not that of its chunk digests", lambda m: {"weights": [msgspec.structs.replace(m.weights[0], chunks=["0" * 64])]}),
    ("has two sizes", lambda m: {"weights": [msgspec.structs.replace(m.weights[0], size_bytes=5)]}),
    ("not a multiple of 4096", lambda m: {"weights": [msgspec.structs.replace(m.weights[0], chunk_bytes=0)]}),
    ("is listed twice", lambda m: {"tensors": [*m.tensors, m.tensors[0]]}),
    ("overlap", lambda m: {"tensors": [m.tensors[0], msgspec.structs.replace(m.tensors[1], offset=m.tensors[0].offset)]}),
    ("an end within", lambda m: {"tensors": [msgspec.structs.replace(m.tensors[0], offset=1 << 40)]}),
    ("an end within", lambda m: {"tensors": [msgspec.structs.replace(m.tensors[0], offset=-64)]}),
    ("expected a start divisible by 64", lambda m: {"tensors": [msgspec.structs.replace(m.tensors[1], offset=m.tensors[1].offset + 4)]}),
    ("needs 4194304", lambda m: {"tensors": [msgspec.structs.replace(m.tensors[0], shape=[1 << 20, 2])]}),
    ("sizes of 0 or more", lambda m: {"tensors": [msgspec.structs.replace(m.tensors[0], shape=[-1, -4096])]}),
    ("which is not a weight file", lambda m: {"tensors": [msgspec.structs.replace(m.tensors[0], file="tokenizer/tokenizer.json")]}),
    ("uses tensor 'embed', which is not listed", lambda m: {"tensors": [m.tensors[1]]}),
    ("is described differently", lambda m: {"tensors": [msgspec.structs.replace(m.tensors[0], dtype="float16"), m.tensors[1]]}),
    ("not in both the file's header", lambda m: {"tensors": [m.tensors[0]]}),
    ("not an image of role model", lambda m: {"entries": [program(m, "tokenizer/tokenizer.json")]}),
    ("share a name", lambda m: {"entries": [m.entries[0], m.entries[0]]}),
    ("names the file 'nowhere'", lambda m: {"entries": [program(m, "nowhere")]}),
    ("names the file 'x.json'", lambda m: {"tokenizer": msgspec.structs.replace(m.tokenizer, tokenizer_json="x.json")}),
    ("compiled for sparc64 processors", lambda m: {"requirements": needs(machine="sparc64")}),
]


def program(manifest: object, path: str) -> Entry:
    return msgspec.structs.replace(manifest.entries[0], program=path)  # type: ignore[attr-defined]


def needs(**changes: object) -> Requirements:
    plain: dict[str, object] = {"machine": platform.machine(), "cpu_features": [], "torch": None, "min_format": 1}
    return Requirements(**(plain | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(("says", "change"), CHANGES)
def test_a_manifest_that_disagrees_with_itself(out: Path, says: str, change: Callable[[object], dict[str, object]]):
    rewrite_manifest(out, **change(decode_manifest((out / "manifest.json").read_bytes(), "")))
    with pytest.raises(ArtifactError) as caught:
        verify(out)
        open_artifact(out).close()  # asks the machine too
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_requirements_say_what_is_missing_and_what_to_do():
    here = Machine(name="x86_64", cpu_features=frozenset({"avx2", "fma"}), torch="2.13")
    check_requirements(Requirements(machine="x86_64", cpu_features=["avx2"], torch="2.13", min_format=1), here, "out")
    for changes, says in [
        (
            {"cpu_features": ["amx_tile", "avx2", "avx512f"]},
            "needs the CPU features amx_tile, avx512f, which this CPU does not have; compile",
        ),
        ({"torch": "2.11"}, "built against torch 2.11, here torch 2.13 is installed; install torch 2.11 or compile again"),
        ({"machine": "aarch64"}, "compiled for aarch64 processors, this machine is x86_64"),
        ({"min_format": 4}, "needs a runtime that reads format 4"),
    ]:
        plain: dict[str, object] = {"machine": "x86_64", "cpu_features": [], "torch": None, "min_format": 1}
        with pytest.raises(ArtifactError, match=says):
            check_requirements(Requirements(**(plain | changes)), here, "out")  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="no torch is installed"):
        check_requirements(needs(torch="2.13"), Machine(name=platform.machine(), cpu_features=frozenset(), torch=None), "out")


def test_a_refused_artifact_leaves_no_file_open(out: Path):
    replace_bytes(out / "tokenizer/tokenizer.json", b"x" * 17)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        refusal(out)
    assert len(os.listdir("/proc/self/fd")) == before


def test_reading_a_file_that_changes_while_it_is_open(out: Path):
    with open_artifact(out) as artifact:
        path = out / "tokenizer/tokenizer.json"
        path.chmod(0o644)
        with open(path, "r+b") as file:
            file.write(b"X")
        with pytest.raises(ArtifactError, match="changed while the artifact was open"):
            artifact.read("tokenizer/tokenizer.json")
