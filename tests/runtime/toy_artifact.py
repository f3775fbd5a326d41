"""Artifacts and manifests small enough for any test of the runtime."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np

from llmc.artifacts.manifest import (
    Canary,
    Entry,
    KVFacts,
    KVGroup,
    Limits,
    Manifest,
    ModelFacts,
    Requirements,
    Target,
    TensorRecord,
    TensorSpec,
    TokenizerFacts,
)
from llmc.artifacts.weight_file import WeightTensor
from llmc.artifacts.writer import ArtifactWriter
from tests.runtime.toy_program import BLOCK, DIM, INPUTS, VOCAB

EOS = 1


def toy_entry(**changes: object) -> Entry:
    fields: dict = {
        "name": "step",
        "executor": "aoti",
        "program": "images/x.so",
        "inputs": [TensorSpec(name=name, dtype=dtype, shape=shape) for name, dtype, shape in INPUTS],
        "outputs": [TensorSpec(name="logits", dtype="float32", shape=["N", VOCAB])],
        "constants": {"embed": "embed", "head": "head"},
    }
    return Entry(**{**fields, **changes})


def toy_kv(block_size: int = BLOCK, windows: tuple[int, ...] = (0,)) -> KVFacts:
    """One layer per group."""
    groups = [KVGroup(layers=[layer], window=window) for layer, window in enumerate(windows)]
    return KVFacts(block_size=block_size, dtype="float32", num_kv_heads=[1] * len(groups), head_dim=[DIM] * len(groups), groups=groups)


def toy_manifest(**changes: object) -> Manifest:
    fields: dict = {
        "format_version": 1,
        "llmc_version": "0",
        "model": ModelFacts(
            name="toy",
            architecture="Toy",
            model_type="toy",
            dtype="float32",
            num_layers=1,
            hidden_size=DIM,
            vocab_size=VOCAB,
            max_position_embeddings=256,
            num_parameters=2 * VOCAB * DIM,
        ),
        "target": Target(name="cpu", kind="cpu", isa="x86-64-v3"),
        "requirements": Requirements(machine="x86_64", cpu_features=[], torch=None, min_format=1),
        "level": 2,
        "limits": Limits(max_model_len=256, max_num_seqs=16, max_num_batched_tokens=64),
        "kv": toy_kv(),
        "entries": [toy_entry()],
        "images": [],
        "weights": [],
        "tensors": [],
        "passes": [],
        "op_implementations": {},
        "tokenizer": TokenizerFacts(
            tokenizer_json=None,
            chat_template=None,
            template_parity="none",
            bos_token_id=None,
            eos_token_ids=[EOS],
            pad_token_id=None,
            special_tokens={},
            num_tokens=VOCAB,
        ),
        "generation_defaults": {},
        "canaries": [],
        "canary_tolerance": 1e-3,
        "toolchain": {},
        "settings": {},
        "files": [],
    }
    return Manifest(**{**fields, **changes})


def toy_logits(weights: dict[str, np.ndarray], token_ids: list[int]) -> np.ndarray:
    """What the toy program answers after the last of `token_ids`, float32 [VOCAB]."""
    embed, head = weights["embed"], weights["head"]
    previous = token_ids[-2] if len(token_ids) > 1 else token_ids[-1]
    return (embed[token_ids[-1]] + np.float32(0.5) * embed[previous]) @ head.T


def toy_greedy(weights: dict[str, np.ndarray], prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """The toy program's greedy continuation and the margin of each choice."""
    token_ids, margins = list(prompt), []
    for _ in range(count):
        best = np.sort(toy_logits(weights, token_ids))[-2:]
        margins.append(float(best[1] - best[0]))
        token_ids.append(int(toy_logits(weights, token_ids).argmax()))
    return token_ids[len(prompt) :], margins


WORDS = ["<unk>", "<eos>", *(f"w{number}" for number in range(2, VOCAB))]
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w2{% endif %}"


def toy_tokenizer_json() -> bytes:
    """Words split at spaces: "w2 w3" is [2, 3]."""
    words = {word: number for number, word in enumerate(WORDS)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": EOS, "content": "<eos>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    return json.dumps(tokenizer).encode()


def write_toy_artifact(
    out: Path, program: Path, weights: dict[str, np.ndarray], *, wrong_canary: bool = False, text: bool = False, external: bool = False
) -> Path:
    """An artifact of the toy program.

    `text` adds a tokenizer, a chat template and sampling defaults; `external` leaves "embed" to a checkpoint.
    """
    expected, margins = toy_greedy(weights, [3, 4, 5], 6)
    if wrong_canary:
        expected[2] = (expected[2] + 1) % VOCAB
    facts = toy_manifest().tokenizer
    with ArtifactWriter(out) as writer:
        image = writer.add_image(program.read_bytes(), "model")
        packed = {name: array for name, array in sorted(weights.items()) if not (external and name == "embed")}
        weight_file, records = writer.add_weights(
            "weights/model.safetensors",
            [
                WeightTensor(name=name, dtype="float32", shape=array.shape, recipe={}, blocks=lambda array=array: [array])
                for name, array in packed.items()
            ],
        )
        if external:
            shape, recipe = [VOCAB, DIM], {"op": "source", "name": "model.embed"}
            records += [
                TensorRecord(name="embed", dtype="float32", shape=shape, file=None, offset=0, nbytes=VOCAB * DIM * 4, recipe=recipe)
            ]
        if text:
            writer.add_file("tokenizer/tokenizer.json", toy_tokenizer_json())
            writer.add_file("tokenizer/chat_template.jinja", CHAT_TEMPLATE.encode())
            facts = msgspec.structs.replace(
                facts,
                tokenizer_json="tokenizer/tokenizer.json",
                chat_template="tokenizer/chat_template.jinja",
                special_tokens={"eos_token": "<eos>"},
            )
        writer.finish(
            toy_manifest(
                entries=[toy_entry(program=image.path)],
                images=[image],
                weights=[weight_file],
                tensors=records,
                tokenizer=facts,
                generation_defaults={"temperature": 0.0, "max_new_tokens": 5} if text else {},
                canaries=[Canary(prompt_token_ids=[3, 4, 5], expected_token_ids=expected, margins=margins)],
            )
        )
    return out
