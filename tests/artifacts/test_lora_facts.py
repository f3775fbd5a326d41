"""What a manifest says of its room for adapters: matrices inside their elements, apart, and a program that asks for them."""

from __future__ import annotations

import msgspec
import pytest

from llmc.artifacts.consistency import check_manifest
from llmc.artifacts.manifest import LoraFacts, LoraModule, Manifest, TensorSpec
from llmc.errors import ArtifactError
from tests.artifacts.small_artifact import write_small

Q = LoraModule(name="model.layers.0.q_proj", in_features=8, out_features=4, offset=0)
UP = LoraModule(name="model.layers.0.up_proj", in_features=8, out_features=12, offset=48)
FACTS = LoraFacts(max_loras=2, max_rank=4, dtype="float32", slot_elements=128, modules=[UP, Q])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    out = tmp_path_factory.mktemp("small") / "artifact"
    write_small(out)
    return msgspec.json.decode((out / "manifest.json").read_bytes(), type=Manifest)


def with_room(plain: Manifest, facts: LoraFacts, *, pool: list[int] | None = None) -> Manifest:
    inputs = [
        TensorSpec(name="lora_slots", dtype="int32", shape=["T"]),
        TensorSpec(name="lora_pool", dtype=facts.dtype, shape=[*(pool or [facts.max_loras, facts.slot_elements])]),
    ]
    entries = [msgspec.structs.replace(entry, inputs=[*entry.inputs, *inputs]) for entry in plain.entries]
    return msgspec.structs.replace(plain, lora=facts, entries=entries)


def test_a_manifest_with_room_for_adapters_is_right(plain: Manifest) -> None:
    check_manifest(with_room(plain, FACTS), "manifest.json")
    assert msgspec.json.decode(msgspec.json.encode(with_room(plain, FACTS)), type=Manifest).lora == FACTS


@pytest.mark.parametrize(
    "change, words",
    [
        ({"max_loras": 0}, "lora has 0 adapters of rank 4"),
        ({"max_loras": 1 << 40}, "lora has"),
        ({"max_rank": 1 << 20}, "lora has 2 adapters of rank"),
        ({"dtype": "int8"}, "in int8"),
        ({"slot_elements": 127}, "end at 128 of 127 elements"),
        ({"modules": []}, "modules of lora end at 0"),
        ({"modules": [Q, msgspec.structs.replace(UP, offset=47)]}, "overlaps the one before it"),
        ({"modules": [Q, msgspec.structs.replace(UP, name=Q.name)]}, "or one is listed twice"),
        ({"modules": [msgspec.structs.replace(Q, in_features=0)]}, "has no size"),
        ({"modules": [msgspec.structs.replace(Q, offset=-1)]}, "overlaps"),
    ],
)
def test_one_sentence_for_each_way_to_be_wrong(plain: Manifest, change: dict[str, object], words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        check_manifest(with_room(plain, msgspec.structs.replace(FACTS, **change)), "manifest.json")


def test_the_program_must_take_what_the_manifest_promises(plain: Manifest) -> None:
    with pytest.raises(ArtifactError, match="does not take the adapters"):
        check_manifest(with_room(plain, FACTS, pool=[2, 64]), "manifest.json")
    with pytest.raises(ArtifactError, match="does not take the adapters"):
        check_manifest(msgspec.structs.replace(plain, lora=FACTS), "manifest.json")
