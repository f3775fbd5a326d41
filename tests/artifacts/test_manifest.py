"""The manifest's bytes: any manifest survives a round trip, and equal manifests are equal bytes."""

from __future__ import annotations

import json
import subprocess
import sys
import typing
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.artifacts.consistency import check_manifest
from llmc.artifacts.manifest import Manifest
from llmc.artifacts.manifest_json import decode_manifest, encode_manifest
from llmc.artifacts.version import FORMAT_VERSION
from llmc.errors import ArtifactError
from tests.artifacts.small_artifact import small_manifest


def strategy_for(kind: Any) -> st.SearchStrategy[Any]:
    """Values of an annotation as manifest.py uses them."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{name: strategy_for(hint) for name, hint in hints.items() if name != "manifest_sha256"})
    if origin is Literal:
        return st.sampled_from(args)
    if origin is list:
        return st.lists(strategy_for(args[0]), max_size=2)
    if origin is dict:
        return st.dictionaries(strategy_for(args[0]), strategy_for(args[1]), max_size=2)
    if args:
        return st.one_of([strategy_for(arg) for arg in args])
    simple: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(-(2**53), 2**53),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        bool: st.booleans(),
        type(None): st.none(),
        Any: st.integers(0, 9),
    }
    return simple[kind]


@given(strategy_for(Manifest))
@settings(max_examples=100, deadline=None)
def test_round_trip(manifest: Manifest):
    manifest = msgspec.structs.replace(manifest, format_version=FORMAT_VERSION)
    data = encode_manifest(manifest)
    read = decode_manifest(data, "manifest.json")
    assert encode_manifest(read) == data
    assert msgspec.structs.replace(read, manifest_sha256="") == manifest


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_give_one_kind_of_error(data: bytes):
    with pytest.raises(ArtifactError):
        decode_manifest(data, "manifest.json")


@given(strategy_for(Manifest))
@settings(max_examples=100, deadline=None)
def test_any_manifest_is_consistent_or_refused(manifest: Manifest):
    try:
        check_manifest(manifest, "manifest.json")
    except ArtifactError as error:
        assert str(error).startswith("manifest.json: ")


def test_keys_are_sorted_and_nothing_is_spaced():
    data = encode_manifest(msgspec.structs.replace(small_manifest(), format_version=1))
    plain = json.loads(data)
    assert data == (json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n").encode()


def test_the_digest_can_be_recomputed_by_hand():
    import hashlib

    data = encode_manifest(msgspec.structs.replace(small_manifest(), format_version=1))
    stated = json.loads(data)["manifest_sha256"]
    assert hashlib.sha256(data.replace(stated.encode(), b"0" * 64)).hexdigest() == stated


def test_reading_an_artifact_imports_nothing_heavy():
    script = "import sys, llmc.artifacts.verify; print([m for m in ('numpy', 'torch', 'pydantic', 'model_signing') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"
