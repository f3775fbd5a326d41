"""The toy program (tests/runtime/toy_program.py) as plans of four kernels, and an artifact of them. Needs neither torch nor Triton."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from llmc.artifacts.chunks import sha256_hex
from llmc.artifacts.manifest import Canary, CudaRequirements, Entry, Limits, PlanRecord, Requirements, Target, TensorSpec
from llmc.artifacts.plan import (
    PLAN_FORMAT,
    Launch,
    Parameter,
    Plan,
    PlanImage,
    PlanKernel,
    PlanOutput,
    Pointer,
    Region,
    Scalar,
    Span,
    encode_plan,
)
from llmc.artifacts.plan_hazards import hazard_edges
from llmc.artifacts.weight_file import WeightTensor
from llmc.artifacts.writer import ArtifactWriter
from tests.cuda import toy_sampling
from tests.cuda.stand_in_server import KernelLaunch
from tests.cuda.toy_cubin import parameters, toy_cubin
from tests.runtime.toy_artifact import toy_entry, toy_greedy, toy_manifest, toy_tokenizer_json
from tests.runtime.toy_program import BLOCK, DIM, INPUTS, VOCAB

FLOAT = 4
# Numbers come as the kernel's last parameters.
KERNELS = {"remember": [8, 8, 8, 8, 4], "answer": [8] * 9 + [4] * 4, "head": [8, 8, 8, 4], "best": [8, 8, 4]}
SAMPLING_IMAGE = toy_cubin(toy_sampling.KERNELS)
IMAGE = toy_cubin(KERNELS)
SHA256 = hashlib.sha256(IMAGE).hexdigest()
SIZES = [(True, 1, 1, 1), (True, 4, 4, 4), (False, 8, 4, 2), (False, 64, 16, 16)]  # decode, T, B, N


def _remember(launch: KernelLaunch) -> None:
    """Each token's row of embed goes to its slot."""
    ids, slots, embed, cache, count = launch.arguments
    number = count.number
    table = embed.array("<f4", VOCAB * DIM).reshape(VOCAB, DIM)
    for token, slot in zip(ids.array("<i8", number), slots.array("<i8", number), strict=True):
        if slot >= 0:
            cache.array("<f4", (slot + 1) * DIM).reshape(-1, DIM)[slot] = table[token]


def _answer(launch: KernelLaunch) -> None:
    """x[r] = embed[id] + the row of the token before / 2, found in the cache by the block table."""
    rows, ids, positions, tables, lengths, starts, embed, cache, out, *numbers = launch.arguments
    tokens, sequences, wanted, columns = (n.number for n in numbers)
    first = starts.array("<i4", sequences + 1)
    lengths.array("<i4", sequences)
    table = tables.array("<i4", sequences * columns).reshape(sequences, columns)
    result = out.array("<f4", wanted * DIM).reshape(wanted, DIM)
    for index, row in enumerate(rows.array("<i8", wanted)):
        token, position = ids.array("<i8", tokens)[row], int(positions.array("<i8", tokens)[row])
        own = embed.array("<f4", VOCAB * DIM).reshape(VOCAB, DIM)[token]
        before = max(position - 1, 0)
        sequence = int(np.searchsorted(first, row, side="right")) - 1
        slot = int(table[sequence, before // BLOCK]) * BLOCK + before % BLOCK
        previous = cache.array("<f4", (slot + 1) * DIM).reshape(-1, DIM)[slot]
        result[index] = own + np.float32(0.5) * previous


def _head(launch: KernelLaunch) -> None:
    x, head, out, count = launch.arguments
    rows = x.array("<f4", count.number * DIM).reshape(-1, DIM)
    out.array("<f4", count.number * VOCAB).reshape(-1, VOCAB)[:] = rows @ head.array("<f4", VOCAB * DIM).reshape(VOCAB, DIM).T


def _best(launch: KernelLaunch) -> None:
    """The first of each row's largest logits; a NaN counts as minus infinity."""
    logits, out, count = launch.arguments
    rows = logits.array("<f4", count.number * VOCAB).reshape(-1, VOCAB)
    out.array("<i8", count.number)[:] = np.where(np.isnan(rows), -np.inf, rows).argmax(axis=1)


RUN = {"remember": _remember, "answer": _answer, "head": _head, "best": _best, **toy_sampling.RUN}


def toy_plan(decode: bool, tokens: int, sequences: int, rows: int, *, columns: int = 16) -> Plan:
    """remember -> answer -> head -> best at one size."""
    sizes = {"T": tokens, "B": sequences, "N": rows, "M": columns, "NB": 64, "B1": sequences + 1}
    counts = {
        "input_ids": 8 * tokens, "positions": 8 * tokens, "logits_indices": 8 * rows, "slot_mapping": 8 * tokens,
        "block_tables": 4 * sequences * columns, "seq_lens": 4 * sequences, "query_start_loc": 4 * (sequences + 1),
    }  # fmt: skip
    x_bytes, logits_bytes = -(-FLOAT * rows * DIM // 256) * 256, FLOAT * rows * VOCAB
    regions = [Region(name=name, kind="input", size_bytes=size) for name, size in counts.items()]
    regions += [Region(name=name, kind="weight", size_bytes=FLOAT * VOCAB * DIM) for name in ("embed", "head")]
    regions += [Region(name=name, kind="cache", size_bytes=None) for name in ("k_cache.0", "v_cache.0")]
    end = -(-(x_bytes + logits_bytes) // 256) * 256
    regions.append(Region(name="arena", kind="arena", size_bytes=end + 8 * rows))
    index = {region.name: number for number, region in enumerate(regions)}

    def launch(kernel: str, reads: Sequence[str | tuple[int, int]], writes: Sequence[str | tuple[int, int]], *numbers: int) -> Launch:
        def span(place: str | tuple[int, int]) -> Span:
            if isinstance(place, tuple):
                return Span(region=index["arena"], start=place[0], stop=place[1])
            return Span(region=index[place], start=0, stop=regions[index[place]].size_bytes)

        spans = [span(place) for place in (*reads, *writes)]
        pointers: list[Pointer | Scalar] = [Pointer(region=one.region, offset=one.start) for one in spans]
        scalars = [Scalar(data=number.to_bytes(4, "little").hex()) for number in numbers]
        return Launch(
            kernel=list(KERNELS).index(kernel),
            grid=(1, 1, 1),
            arguments=[*pointers, *scalars],
            reads=spans[: len(reads)],
            writes=spans[len(reads) :],
            label=kernel,
        )

    x, logits = (0, FLOAT * rows * DIM), (x_bytes, x_bytes + logits_bytes)
    asked = ["logits_indices", "input_ids", "positions", "block_tables", "seq_lens", "query_start_loc", "embed", "k_cache.0"]
    launches = [
        launch("remember", ["input_ids", "slot_mapping", "embed"], ["k_cache.0"], tokens),
        launch("answer", asked, [x], tokens, sequences, rows, columns),
        launch("head", [x, "head"], [logits], rows),
        launch("best", [logits], [(end, end + 8 * rows)], rows),
    ]
    kernels = [
        PlanKernel(
            image=0,
            entry=entry,
            num_warps=4,
            shared_bytes=0,
            cluster=1,
            parameters=[Parameter(offset=offset, size=size, align_bytes=1) for offset, size in parameters(given)],
        )
        for entry, given in KERNELS.items()
    ]
    return Plan(
        format=PLAN_FORMAT,
        target="sm_90",
        sizes=sizes,
        regions=regions,
        images=[PlanImage(sha256=SHA256, size_bytes=len(IMAGE))],
        kernels=kernels,
        launches=launches,
        edges=hazard_edges(launches),
        outputs=[
            PlanOutput(name="logits", dtype="float32", shape=[rows, VOCAB], region=index["arena"], offset=x_bytes),
            PlanOutput(name="next_tokens", dtype="int64", shape=[rows], region=index["arena"], offset=end),
        ],
    )


def plans_entry(plans: Sequence[tuple[bool, Plan]], **changes: object) -> Entry:
    """An entry of plans, each with whether it is for decode."""
    records = [
        PlanRecord(
            path=f"plans/{sha256_hex(encode_plan(plan))}.json",
            decode=decode,
            num_tokens=plan.sizes["T"],
            num_seqs=plan.sizes["B"],
            num_logits=plan.sizes["N"],
            table_blocks=plan.sizes["M"],
        )
        for decode, plan in plans
    ]
    inputs = [TensorSpec(name=name, dtype=dtype, shape=shape) for name, dtype, shape in INPUTS]  # type: ignore[arg-type]
    return toy_entry(executor="plans", program=records[0].path, plans=records, inputs=inputs, **changes)


def write_toy_plans(
    out: Path,
    weights: dict[str, np.ndarray],
    *,
    plans: Sequence[tuple[bool, Plan]] | None = None,
    image: bytes = IMAGE,
    canary: bool = True,
    sampling: bool = True,
) -> Path:
    """An artifact of the toy program for sm_90, which takes prompts of words: "w2 w3" is [2, 3]."""
    plans = plans if plans is not None else [(decode, toy_plan(decode, t, b, n)) for decode, t, b, n in SIZES]
    found = (
        toy_sampling.sampling_plans([plan.sizes["N"] for _, plan in plans], SAMPLING_IMAGE, sha256_hex(SAMPLING_IMAGE)) if sampling else []
    )
    tails = [(msgspec.structs.replace(record, path=f"plans/{sha256_hex(encode_plan(plan))}.json"), plan) for record, plan in found]
    entry = plans_entry(plans, sampling=[record for record, _ in tails])
    expected, margins = toy_greedy(weights, [3, 4, 5], 6)
    needs = CudaRequirements(compute_capability="9.0", driver_version=12040, shared_memory_per_block_bytes=100_000, num_sms=132)
    with ArtifactWriter(out) as writer:
        images = [writer.add_image(image, "cubin", "cubin")]
        if tails:
            images.append(writer.add_image(SAMPLING_IMAGE, "cubin", "cubin"))
        for tail, plan in tails:
            writer.add_file(tail.path, encode_plan(plan))
        for record, (_, plan) in zip(entry.plans, plans, strict=True):
            writer.add_file(record.path, encode_plan(plan))
        tensors = [
            WeightTensor(name=name, dtype="float32", shape=array.shape, recipe={}, blocks=lambda array=array: [array])  # type: ignore[misc]
            for name, array in sorted(weights.items())
        ]
        writer.add_file("tokenizer/tokenizer.json", toy_tokenizer_json())
        weight_file, records = writer.add_weights("weights/model.safetensors", tensors)
        writer.finish(
            toy_manifest(
                target=Target(name="cuda:sm_90", kind="cuda", isa="sm_90"),
                requirements=Requirements(machine="x86_64", cpu_features=[], torch=None, min_format=3, cuda=needs),
                limits=Limits(max_model_len=256, max_num_seqs=16, max_num_batched_tokens=64),
                entries=[entry],
                images=images,
                weights=[weight_file],
                tensors=records,
                tokenizer=msgspec.structs.replace(toy_manifest().tokenizer, tokenizer_json="tokenizer/tokenizer.json"),
                canaries=[Canary(prompt_token_ids=[3, 4, 5], expected_token_ids=expected, margins=margins)] if canary else [],
            )
        )
    return out
