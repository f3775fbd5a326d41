"""Artifacts through an OCI image layout and back, and layouts that are not what they say."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmc.artifacts.inspect import diff
from llmc.artifacts.oci import ARTIFACT_TYPE, pull, push
from llmc.cli import main
from llmc.errors import ArtifactError, ConfigError, LlmcError
from tests.artifacts.small_artifact import write_small


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    write_small(tmp_path / "artifact")
    return tmp_path / "artifact"


@pytest.fixture
def layout(artifact: Path, tmp_path: Path) -> Path:
    push(artifact, tmp_path / "layout", "v1")
    return tmp_path / "layout"


def test_there_and_back_is_the_same_artifact(artifact: Path, layout: Path, tmp_path: Path) -> None:
    pull(layout, "v1", tmp_path / "back")
    assert diff(artifact, tmp_path / "back") == []


def test_the_layout_is_one_that_other_tools_read(artifact: Path, layout: Path) -> None:
    assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    (named,) = json.loads((layout / "index.json").read_text())["manifests"]
    assert named["annotations"] == {"org.opencontainers.image.ref.name": "v1"} and named["artifactType"] == ARTIFACT_TYPE
    manifest = json.loads((layout / "blobs" / "sha256" / named["digest"].removeprefix("sha256:")).read_text())
    assert manifest["schemaVersion"] == 2 and manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    titles = {layer["annotations"]["org.opencontainers.image.title"] for layer in manifest["layers"]}
    assert titles == {path.relative_to(artifact).as_posix() for path in artifact.rglob("*") if path.is_file()}
    for one in (named, manifest["config"], *manifest["layers"]):
        data = (layout / "blobs" / "sha256" / one["digest"].removeprefix("sha256:")).read_bytes()
        assert hashlib.sha256(data).hexdigest() == one["digest"].removeprefix("sha256:") and len(data) == one["size"]


def test_tags_move_and_stand_beside_each_other(artifact: Path, layout: Path) -> None:
    first = push(artifact, layout, "v1")
    assert push(artifact, layout, "v2") == first  # the same bytes give the same digest
    tags = [one["annotations"]["org.opencontainers.image.ref.name"] for one in json.loads((layout / "index.json").read_text())["manifests"]]
    assert tags == ["v1", "v2"]


def edit_manifest(layout: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the OCI manifest and its digests, as somebody would who wants to be believed."""
    index = json.loads((layout / "index.json").read_text())
    (named,) = index["manifests"]
    manifest = json.loads((layout / "blobs" / "sha256" / named["digest"].removeprefix("sha256:")).read_text())
    change(manifest)
    data = json.dumps(manifest).encode()
    named |= {"digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data)}
    (layout / "blobs" / "sha256" / hashlib.sha256(data).hexdigest()).write_bytes(data)
    (layout / "index.json").write_text(json.dumps(index))


def largest_blob(layout: Path) -> Path:
    return max((layout / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1])


def rename_layer(name: str) -> Callable[[Path], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["layers"][0]["annotations"]["org.opencontainers.image.title"] = name

    return lambda layout: edit_manifest(layout, change)


FAULTS: dict[str, Callable[[Path], Any]] = {
    "a changed byte": lambda layout: flip(largest_blob(layout)),
    "a cut blob": lambda layout: cut(largest_blob(layout)),
    "a missing blob": lambda layout: largest_blob(layout).unlink(),
    "a layer missing": lambda layout: edit_manifest(layout, lambda manifest: manifest["layers"].pop(0)),
    "a layer twice": lambda layout: edit_manifest(layout, lambda manifest: manifest["layers"].append(manifest["layers"][0])),
    "a name outside": rename_layer("../outside"),
    "a digest that is a path": lambda layout: edit_manifest(layout, lambda m: m["layers"][0].update(digest="sha256:../../x")),
    "no layers": lambda layout: edit_manifest(layout, lambda manifest: manifest.update(layers=[])),
    "no JSON": lambda layout: (layout / "index.json").write_text("<html>"),
    "another version": lambda layout: (layout / "oci-layout").write_text('{"imageLayoutVersion": "2.0.0"}'),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_layout_that_is_not_what_it_says_gives_nothing(layout: Path, tmp_path: Path, name: str) -> None:
    FAULTS[name](layout)
    with pytest.raises(ArtifactError):
        pull(layout, "v1", tmp_path / "back")
    assert not (tmp_path / "back").exists() and not (tmp_path / "outside").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".back")]


def test_a_blob_that_is_a_link_is_not_followed(layout: Path, tmp_path: Path) -> None:
    blob = largest_blob(layout)
    shutil.move(blob, tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError):
        pull(layout, "v1", tmp_path / "back")


def test_what_is_no_layout_is_left_alone(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    for call in (lambda: push(artifact, tmp_path / "mine", "v1"), lambda: push(artifact, tmp_path / "l", "a/b"),
                 lambda: pull(tmp_path / "mine", "v1", tmp_path / "back")):  # fmt: skip
        with pytest.raises(ConfigError):
            call()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]
    flip(artifact / "manifest.json")
    with pytest.raises(LlmcError):
        push(artifact, tmp_path / "l", "v1")
    assert not (tmp_path / "l").exists()


def test_commands(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["oci", "push", str(artifact), str(tmp_path / "l"), "--tag", "v3"]) == 0
    assert "sha256:" in capsys.readouterr().out
    assert main(["oci", "pull", str(tmp_path / "l"), str(tmp_path / "back"), "--tag", "v4"]) == 2
    assert "tags here: v3" in capsys.readouterr().err
    assert main(["oci", "pull", str(tmp_path / "l"), str(tmp_path / "back"), "--tag", "v3"]) == 0
    assert diff(artifact, tmp_path / "back") == []
