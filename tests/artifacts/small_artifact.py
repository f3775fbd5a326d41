"""A small artifact for tests: two tensors in a weight file, two images that are no code, tokenizer files, one entry."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from llmc.artifacts.filesystem import OS, FileSystem
from llmc.artifacts.manifest import (
    Entry,
    KVFacts,
    KVGroup,
    Limits,
    Manifest,
    ModelFacts,
    Requirements,
    Target,
    TensorSpec,
    TokenizerFacts,
)
from llmc.artifacts.manifest_json import decode_manifest, encode_manifest
from llmc.artifacts.weight_file import WeightTensor
from llmc.artifacts.writer import ArtifactWriter, Published


def write_small(out: Path, *, force: bool = False, fs: FileSystem = OS, seed: int = 0, big: int = 8) -> Published:
    """Write it; artifacts of another `seed` differ in their weights, `big` is the number of rows of the larger tensor."""
    rng = np.random.default_rng(seed)
    values = {"embed": rng.integers(0, 1 << 16, (big, 16, 16, 2)).astype(np.uint16), "norm": rng.random(5, dtype=np.float32)}
    with ArtifactWriter(out, force=force, fs=fs) as writer:
        images = [writer.add_image(b"not really code " * 40, "kernels"), writer.add_image(b"nor is this one " * 40, "model")]
        writer.add_file("tokenizer/tokenizer.json", b'{"version":"1.0"}')
        writer.add_file("tokenizer/chat_template.jinja", b"{{ messages }}")
        tensors = [
            WeightTensor(name="embed", dtype="bfloat16", shape=(big, 16, 16, 2), recipe=_source("embed"), blocks=lambda: [values["embed"]]),
            WeightTensor(name="norm", dtype="float32", shape=(5,), recipe=_source("norm"), blocks=lambda: [values["norm"]]),
        ]
        weights, records = writer.add_weights("weights/model.safetensors", tensors)
        manifest = msgspec.structs.replace(small_manifest(), images=images, weights=[weights], tensors=records)
        entry = msgspec.structs.replace(manifest.entries[0], program=images[1].path, constants={"c0": "embed"})
        return writer.finish(msgspec.structs.replace(manifest, entries=[entry]))


def small_manifest() -> Manifest:
    """A manifest without files."""
    return Manifest(
        format_version=0,
        llmc_version="0.1.0",
        model=ModelFacts(
            name="tiny",
            architecture="Qwen3ForCausalLM",
            model_type="qwen3",
            dtype="bfloat16",
            num_layers=1,
            hidden_size=32,
            vocab_size=128,
            max_position_embeddings=64,
            num_parameters=4096,
        ),
        target=Target(name="cpu:x86-64-v3", kind="cpu", isa="x86-64-v3"),
        requirements=Requirements(machine=platform.machine(), cpu_features=[], torch=None, min_format=1),
        level=2,
        limits=Limits(max_model_len=64, max_num_seqs=2, max_num_batched_tokens=32),
        kv=KVFacts(block_size=16, dtype="bfloat16", num_kv_heads=[1], head_dim=[16], groups=[KVGroup(layers=[0], window=0)]),
        entries=[
            Entry(
                name="step",
                executor="aoti",
                program="",
                inputs=[TensorSpec(name="input_ids", dtype="int64", shape=["T"])],
                outputs=[TensorSpec(name="logits", dtype="bfloat16", shape=["N", 128])],
                constants={},
            )
        ],
        images=[],
        weights=[],
        tensors=[],
        passes=[],
        op_implementations={"linear": "cpu"},
        tokenizer=TokenizerFacts(
            tokenizer_json="tokenizer/tokenizer.json",
            chat_template="tokenizer/chat_template.jinja",
            template_parity="same",
            bos_token_id=None,
            eos_token_ids=[1],
            pad_token_id=None,
            special_tokens={},
            num_tokens=128,
        ),
        generation_defaults={"temperature": 0.7},
        canaries=[],
        canary_tolerance=0.01,
        toolchain={"torch": "2.13.0"},
        settings={"level": 2, "dtype": "auto"},
        files=[],
    )


def rewrite_manifest(out: Path, **changes: Any) -> None:
    """Change fields of a written artifact's manifest, as a forger would: its own digest is made right again."""
    path = out / "manifest.json"
    manifest = decode_manifest(path.read_bytes(), str(path))
    replace_bytes(path, encode_manifest(msgspec.structs.replace(manifest, **changes)))


def replace_bytes(path: Path, data: bytes) -> None:
    """Put other bytes into a published (read-only) file."""
    path.unlink()
    path.write_bytes(data)


def _source(name: str) -> dict[str, Any]:
    return {"op": "source", "name": name}
