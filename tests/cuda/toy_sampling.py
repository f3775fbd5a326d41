"""Plans that sample for the toy program, a kernel each, which chooses as the host's sampler does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmc.artifacts.manifest import SamplingRecord
from llmc.artifacts.plan import PLAN_FORMAT, Launch, Parameter, Plan, PlanImage, PlanKernel, PlanOutput, Pointer, Region, Scalar, Span
from llmc.runtime.sampler.choose import choose
from llmc.runtime.sampler.logprobs import token_logprobs
from llmc.runtime.sampler.philox import uniform
from tests.cuda.stand_in_server import KernelLaunch
from tests.cuda.toy_cubin import parameters
from tests.runtime.toy_program import VOCAB

NUM_TOUCHED, NUM_TOP = 12, 5
WORDS = -(-VOCAB // 32)
DRAWN = ["inverse_temperature", "top_k", "top_p", "min_p_gap", "seeds", "draws"]
CHANGED = ["mask", "touched_ids", "touched_bias", "touched_counts", "penalties"]
TYPES = {"inverse_temperature": "<f4", "top_k": "<i4", "top_p": "<f8", "min_p_gap": "<f8", "seeds": "<i8", "draws": "<i8", "mask": "<i4",
         "touched_ids": "<i4", "touched_bias": "<f4", "touched_counts": "<f4", "penalties": "<f4", "logits": "<f4", "next_tokens": "<i8",
         "tokens": "<i8", "fed_tokens": "<i8", "logprobs": "<f4", "ranks": "<i8", "top_ids": "<i8", "top_logprobs": "<f4"}  # fmt: skip
WIDTHS = {"mask": WORDS, "touched_ids": NUM_TOUCHED, "touched_bias": NUM_TOUCHED, "touched_counts": NUM_TOUCHED, "penalties": 3,
          "logits": VOCAB, "top_ids": NUM_TOP, "top_logprobs": NUM_TOP}  # fmt: skip
INPUTS = {"check": ["logits", "next_tokens"], "draw": ["logits", *DRAWN], "truncate": ["logits", *DRAWN]}
INPUTS["full"] = [*INPUTS["draw"], *CHANGED]
OUTPUTS = {kind: ["tokens", "fed_tokens"] for kind in INPUTS}
OUTPUTS["full"] = [*OUTPUTS["full"], "logprobs", "ranks", "top_ids", "top_logprobs"]
KERNELS = {f"sample_{kind}": [8] * (len(INPUTS[kind]) + len(OUTPUTS[kind])) + [4] for kind in INPUTS}


def _arrays(launch: KernelLaunch, kind: str) -> dict[str, np.ndarray]:
    *pointers, count = launch.arguments
    names, rows = [*INPUTS[kind], *OUTPUTS[kind]], count.number
    return {
        name: argument.array(TYPES[name], rows * WIDTHS.get(name, 1)).reshape(rows, *([WIDTHS[name]] if name in WIDTHS else []))
        for name, argument in zip(names, pointers, strict=True)
    }


def _finish(found: dict[str, np.ndarray], row: int, token: int) -> None:
    found["tokens"][row], found["fed_tokens"][row] = token, max(token, 0)


def _check(launch: KernelLaunch) -> None:
    found = _arrays(launch, "check")
    for row, token in enumerate(found["next_tokens"].tolist()):
        good = 0 <= token < VOCAB and np.isfinite(found["logits"][row, token])
        _finish(found, row, token if good else -1)


def _choose(found: dict[str, np.ndarray], row: int, logits: np.ndarray, truncate: bool) -> int:
    if not np.isfinite(logits.max()):
        return -1
    inverse = float(found["inverse_temperature"][row])
    if inverse == 0.0:
        return int(logits.argmax())
    temperature, gap = 1.0 / inverse, float(found["min_p_gap"][row])
    draw = uniform(int(found["seeds"][row]), int(found["draws"][row]))
    top_k, top_p = (int(found["top_k"][row]), float(found["top_p"][row])) if truncate else (0, 1.0)
    return choose(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=float(np.exp(gap * inverse)), draw=draw)


def _draw(launch: KernelLaunch, kind: str, truncate: bool) -> None:
    found = _arrays(launch, kind)
    for row, logits in enumerate(found["logits"]):
        _finish(found, row, _choose(found, row, logits, truncate))


def _full(launch: KernelLaunch) -> None:
    found = _arrays(launch, "full")
    for row, raw in enumerate(found["logits"]):
        bits = np.unpackbits(found["mask"][row].view(np.uint8), bitorder="little")[:VOCAB]
        logits = np.where(bits, raw, np.float32(-np.inf)).astype(np.float32)
        repetition, frequency, presence = found["penalties"][row]
        for index, token in enumerate(found["touched_ids"][row]):
            if token < 0:
                continue
            value, count = logits[token] + found["touched_bias"][row, index], found["touched_counts"][row, index]
            if count >= 0:
                value = value / repetition if value > 0 else value * repetition
                value = value - frequency * count - presence * (count > 0)
            logits[token] = value
        token = _choose(found, row, logits, True)
        _finish(found, row, token)
        likely = token_logprobs(raw, max(token, 0), NUM_TOP)
        found["logprobs"][row], found["ranks"][row] = likely.logprob, likely.rank
        found["top_ids"][row], found["top_logprobs"][row] = zip(*likely.top, strict=True)


RUN = {
    "sample_check": _check,
    "sample_draw": lambda launch: _draw(launch, "draw", False),
    "sample_truncate": lambda launch: _draw(launch, "truncate", True),
    "sample_full": _full,
}


def sampling_plan(kind: str, rows: int, image: bytes, sha256: str) -> Plan:
    """One launch at one number of rows."""

    def nbytes(name: str) -> int:
        return np.dtype(TYPES[name]).itemsize * rows * WIDTHS.get(name, 1)

    regions = [Region(name=name, kind="input", size_bytes=nbytes(name)) for name in INPUTS[kind]]
    reads = [Span(region=index, start=0, stop=region.size_bytes) for index, region in enumerate(regions)]
    arena, writes, outputs, at = len(regions), [], [], 0
    for name in OUTPUTS[kind]:
        writes.append(Span(region=arena, start=at, stop=at + nbytes(name)))
        shape = [rows, *([WIDTHS[name]] if name in WIDTHS else [])]
        dtype = {"<f4": "float32", "<i8": "int64"}[TYPES[name]]
        outputs.append(PlanOutput(name=name, dtype=dtype, shape=shape, region=arena, offset=at))  # type: ignore[arg-type]
        at += -(-nbytes(name) // 256) * 256
    regions.append(Region(name="arena", kind="arena", size_bytes=at))
    entry = f"sample_{kind}"
    pointers: list[Pointer | Scalar] = [Pointer(region=span.region, offset=span.start) for span in (*reads, *writes)]
    return Plan(
        format=PLAN_FORMAT,
        target="sm_90",
        sizes={"N": rows, "V": VOCAB},
        regions=regions,
        images=[PlanImage(sha256=sha256, size_bytes=len(image))],
        kernels=[
            PlanKernel(
                image=0, entry=entry, num_warps=4, shared_bytes=0, cluster=1,
                parameters=[Parameter(offset=offset, size=size, align_bytes=1) for offset, size in parameters(KERNELS[entry])],
            )
        ],
        launches=[
            Launch(
                kernel=0, grid=(1, 1, 1), arguments=[*pointers, Scalar(data=rows.to_bytes(4, "little").hex())], reads=reads,
                writes=writes, label=entry,
            )
        ],
        edges=[],
        outputs=outputs,
    )  # fmt: skip


def sampling_plans(rows: Sequence[int], image: bytes, sha256: str) -> list[tuple[SamplingRecord, Plan]]:
    """Every kind at every number of rows; records have no path yet."""
    made = []
    for count in sorted(set(rows)):
        for kind in INPUTS:
            touched, top = (NUM_TOUCHED, NUM_TOP) if kind == "full" else (0, 0)
            record = SamplingRecord(path="", kind=kind, num_logits=count, num_touched=touched, num_top=top)  # type: ignore[arg-type]
            made.append((record, sampling_plan(kind, count, image, sha256)))
    return made
