"""What gpu_check's parts do inside their processes. Each writes its JSON anew after every figure, so that a time limit loses little.

Started by gpu_check alone, whose PYTHONPATH makes llmc of the checkout: the folder that a script is in must not stand before it.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import gpu_machine
from benchmarks.models import SHAPES, make_model

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 480  # per part
_LAST_START_SECONDS = 400  # nothing long is begun later
_TO_WRITE_SECONDS = 20  # kept free at a part's end
# Options of `llmc compile` by model. The default sizes are what a user gets; the large model has fewer, to compile in its time.
OPTIONS = {
    "0.6B": ("--max-model-len", "16384", "--max-num-seqs", "256", "--compile-sizes", "512,2048"),
    "8B": ("--max-model-len", "16384", "--max-num-seqs", "256", "--cudagraph-capture-sizes", "1,8,64,256", "--compile-sizes", "512,2048"),
}
_TINY = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 16, "cudagraph_capture_sizes": (2, 4), "compile_sizes": (16,)}
MAX_KV_BYTES = 64 << 30


@dataclass
class Part:
    """A part under way. `report` is its JSON; `write` brings it to disk."""

    name: str
    out: Path
    only: str
    stand_in: bool
    report: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.report = {"part": self.name, "machine": gpu_machine.facts(self.stand_in), "results": [], "failed": [], "left_out": []}
        if not self.stand_in:
            self.report["ceilings"] = gpu_machine.ceilings()
        self.write()

    def write(self) -> None:
        (self.out / f"{self.name}.json").write_text(json.dumps(self.report, indent=1) + "\n")

    def left_seconds(self) -> float:
        """What a figure may still take; its process is stopped then, and the part ends in time."""
        return max(1.0, LIMIT_SECONDS - _TO_WRITE_SECONDS - (time.monotonic() - self.began))

    def add(self, label: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Run one figure: its result, its failure or its absence goes into the report. Returns the result."""
        if self.only not in label:
            return None
        if time.monotonic() - self.began > _LAST_START_SECONDS:
            self.report["left_out"].append({"case": label, "why": "the part's time was over"})
            return None
        try:
            result = measure()
        except Exception as error:  # the other figures are worth having; the part fails at its end
            self.report["failed"].append({"case": label, "error": f"{type(error).__name__}: {error}"[:2000]})
            print(f"{label}: {type(error).__name__}: {error}", flush=True)
            result = None
        else:
            self.report["results"].append({"case": label, **result})
            print(json.dumps({"case": label, **result}), flush=True)
        self.write()
        return result

    def finish(self) -> None:
        """End the process with status 1 if a figure failed."""
        if not self.stand_in:
            self.report["machine_after"] = gpu_machine.smi()
        self.write()
        if self.report["failed"]:
            raise SystemExit(f"{len(self.report['failed'])} cases failed, see {self.out / (self.name + '.json')}")


@dataclass(frozen=True)
class Ready:
    """A checkpoint, its artifact for this machine's GPU, and the environment in which that runs."""

    name: str
    model: Path
    artifact: Path
    compile_s: float


def work_folder() -> Path:
    return Path(os.environ.get("LLMC_BENCH_DIR", Path.home() / ".cache" / "llmc-bench")) / "gpu"


def target() -> str:
    """This GPU's target, by its compute capability."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"cuda:sm_{major}{minor}"


def ready(part: Part, name: str) -> Ready:
    """The artifact of a model for this GPU; compiled by whichever part comes first, kept for the others.

    Raises:
        RuntimeError: the compile failed; its message.
        TimeoutExpired: the part's time was over; what was compiled is in the cache.
    """
    model, artifact = make_model(name, work_folder()), work_folder() / f"{name}-artifact"
    marker = artifact.with_suffix(".seconds")
    if not marker.is_file():
        began = time.monotonic()
        command = [
            sys.executable,
            "-m",
            "llmc",
            "compile",
            str(model),
            "-o",
            str(artifact),
            "--force",
            "--target",
            target(),
            *OPTIONS[name],
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=part.left_seconds())
        if done.returncode != 0:
            raise RuntimeError(f"llmc compile ended with status {done.returncode}: {done.stderr.strip()[-1500:]}")
        marker.write_text(f"{time.monotonic() - began:.1f}")
    return Ready(name, model, artifact, float(marker.read_text()))


@contextmanager
def on_stand_in(out: Path) -> Iterator[Ready]:
    """The smallest model's artifact, and this process's environment such that its plans run on the stand-in driver."""
    from tests.cuda import stand_in
    from tests.cuda.interpreted import Interpreter, compile_recorded
    from tests.cuda.served import environment

    folder = out / "stand_in"
    folder.mkdir(exist_ok=True)
    model, artifact = make_model("T", folder), folder / f"artifact-{os.getpid()}"
    began = time.monotonic()
    sources = compile_recorded(model, artifact, dtype="float32", **_TINY)
    seconds = time.monotonic() - began
    interpreter = Interpreter(sources)
    try:
        os.environ.update(environment(stand_in.build(folder), interpreter.path))
        yield Ready("T", model, artifact, seconds)
    finally:
        interpreter.close()


def prepare(part: Part) -> None:
    """Checkpoints and artifacts, so that no other part spends its time on them."""

    def measure(name: str) -> dict[str, Any]:
        began = time.monotonic()
        found = ready(part, name)
        size = sum(file.stat().st_size for file in found.artifact.rglob("*") if file.is_file())
        return {"compile_s": found.compile_s, "seconds": round(time.monotonic() - began, 1), "artifact_bytes": size}

    if part.stand_in:
        with on_stand_in(part.out) as found:
            part.add("prepare T", lambda: {"compile_s": found.compile_s})
        return
    for name in ("0.6B", "8B"):
        part.add(f"prepare {name}", partial(measure, name))


def startup(part: Part) -> None:
    """Process start to first token over HTTP; transformers with torch.compile in the same run."""
    from llmc.bench.contenders import cold_start

    def measure(found: Ready, rounds: int) -> dict[str, Any]:
        starts = [cold_start(found.artifact, threads=8 if rounds > 1 else 1) for _ in range(rounds + (rounds > 1))][rounds > 1 :]
        stages = {name: statistics.median(s.stages_ms[name] for s in starts) for name in starts[0].stages_ms}
        seconds = [s.seconds for s in starts]
        memory = statistics.median(s.pss_bytes for s in starts)
        return {"compile_s": found.compile_s, "first_token_s": seconds, "pss_bytes": memory, "stages_ms": stages}

    if part.stand_in:
        with on_stand_in(part.out) as found:
            part.add("start T", lambda: measure(found, 1))
        return
    for name in ("0.6B", "8B"):
        part.add(f"start {name}", lambda name=name: measure(ready(part, name), 5))
        part.add(f"transformers compiled {name}", lambda name=name: _hf_startup(part, work_folder() / name))


def decode(part: Part) -> None:
    """Tokens per second by batch and context, as a share of what a copy on this GPU reads; baselines in the same run."""
    from llmc.bench.contenders import engine_rows
    from llmc.bench.workload import Mode

    def measure(found: Ready, batch: int, context: int, new: int, repeats: int) -> dict[str, Any]:
        mode = Mode(name="work", batch=batch, prompt_tokens=context, new_tokens=new)
        rows = engine_rows(found.artifact, [mode], threads=8 if repeats > 1 else 1, warmup=repeats > 1, repeats=repeats, seed=0)["modes"][
            "work"
        ]
        rate = [row["decode_tok_s"] for row in rows]
        bytes_of_a_step = step_bytes(found.name, batch, context + new // 2)
        result = {"decode_tok_s": rate, "prefill_s": [row["prefill_s"] for row in rows], "step_bytes": bytes_of_a_step}
        if "ceilings" in part.report:
            share = statistics.median(rate) / batch * bytes_of_a_step / part.report["ceilings"]["copy_bytes_per_s"]
            result["share_of_copy"] = round(share, 3)
        return result

    if part.stand_in:
        with on_stand_in(part.out) as found:
            part.add("decode T batch 2 context 8", lambda: measure(found, 2, 8, 3, 1))
        return
    for name in ("0.6B", "8B"):
        for batch, context in ((1, 512), (1, 8192), (8, 512), (64, 512), (256, 512), (8, 8192), (64, 8192)):
            if batch * (context + 64) * kv_bytes(name) > MAX_KV_BYTES:
                part.report["left_out"].append(
                    {"case": f"{name} batch {batch} context {context}", "why": "its keys and values are too many"}
                )
                continue
            part.add(
                f"decode {name} batch {batch} context {context}",
                partial(lambda name, batch, context: measure(ready(part, name), batch, context, 64, 3), name, batch, context),
            )
        for how, batch in (("eager", 1), ("compiled", 1), ("compiled", 8), ("continuous", 64)):
            request = {"model": str(work_folder() / name), "how": how, "batch": batch, "prompt": 512, "new": 64, "repeats": 2}
            part.add(f"transformers {how} {name} batch {batch} context 512", partial(_baseline, part, request))


def throughput(part: Part) -> None:
    """256 sequences of the 0.6B shape, input and output lengths uniform in 100..1024, seed 0: tokens per second of the whole."""

    def measure(found: Ready, count: int, lengths: tuple[int, int]) -> dict[str, Any]:
        worker = [sys.executable, __file__, "serve-all", str(found.artifact), str(count), *map(str, lengths)]
        done = subprocess.run(worker, capture_output=True, text=True, check=False, timeout=part.left_seconds())
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip()[-1500:])
        return dict(json.loads(done.stdout.splitlines()[-1]))

    if part.stand_in:
        with on_stand_in(part.out) as found:
            part.add("throughput T", lambda: measure(found, 4, (2, 6)))
    else:
        part.add("throughput 0.6B", lambda: measure(ready(part, "0.6B"), 256, (100, 1024)))


def serve_all(artifact: str, count: int, low: int, high: int) -> None:
    """Worker of `throughput`: one engine, all sequences at once. Prints one JSON line."""
    from llmc.runtime.engine import Engine, EngineConfig
    from llmc.runtime.messages import GenerateRequest, SamplingParams

    engine = Engine(EngineConfig(artifact=artifact, enable_prefix_caching=False, verify_weights="never", seed=0))
    rng = random.Random(0)
    sizes = [(rng.randint(low, high), rng.randint(low, high)) for _ in range(count)]
    vocab, wanted = engine.manifest.model.vocab_size, 0
    for i, (given, new) in enumerate(sizes):
        prompt = [rng.randrange(300, vocab) for _ in range(given)]
        sampling = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        engine.add(GenerateRequest(request_id=str(i), prompt_token_ids=prompt, sampling=sampling))
        wanted += new
    began, made, steps = time.perf_counter(), 0, []
    while engine.has_work():
        before = time.perf_counter()
        for event in engine.step():
            if event.error:
                raise RuntimeError(event.error)
            made += len(event.token_ids)
        steps.append(1e3 * (time.perf_counter() - before))
    seconds = time.perf_counter() - began
    engine.close()
    if made != wanted:
        raise RuntimeError(f"{made} tokens were made where {wanted} were asked for")
    step_ms = {"median": statistics.median(steps), "max": max(steps)}
    print(json.dumps({"tok_s": made / seconds, "tokens": made, "seconds": seconds, "steps": len(steps), "step_ms": step_ms}))


def kernels(part: Part) -> None:
    """Every kernel's benchmark against the vendor's limits and torch; on the stand-in each is compiled for sm_90, and not run."""
    import torch

    from llmc.kernels import gpu_bench

    torch.manual_seed(0)
    compiled: dict[str, dict[str, Any]] = {}
    for name in gpu_bench.BENCHES:
        for case in importlib.import_module(f"llmc.kernels.{name}").cases():
            run = partial(gpu_bench.compile_case, case, compiled) if part.stand_in else partial(gpu_bench.run_case, case, 10)
            part.add(case.name, run)
            if not part.stand_in:
                torch.cuda.empty_cache()


def tuning(part: Part) -> None:
    """Tiles of plain_linear, timed in turns; on the stand-in compiled for sm_90: what spills or changes a row's bits is out."""
    import torch

    from llmc.kernels import gpu_bench
    from llmc.kernels.plain_linear.bench import MATRICES, arguments, check_bits
    from llmc.kernels.plain_linear.triton_impl import Tile, plain_linear
    from llmc.kernels.plain_linear.tuning import TMA_CAPABILITY, candidates

    torch.manual_seed(0)
    tma = part.stand_in or 10 * torch.cuda.get_device_capability()[0] >= TMA_CAPABILITY

    def case_of(tokens: int, n: int, k: int, tile: Tile) -> gpu_bench.Case:
        moved = (tokens * k + n * k + tokens * n) * 2
        name = f"{tokens}x{n}x{k} {tile.block_n}x{tile.block_t} {tile.num_warps} warps {tile.num_stages} stages{' tma' * tile.tma}"
        ours = partial(plain_linear, tile=tile)
        return gpu_bench.Case(name=name, make=partial(arguments, tokens, n, k), ours=ours, moved_bytes=moved, flop=2 * tokens * n * k)

    def measure(tokens: int, n: int, k: int) -> dict[str, Any]:
        found: list[dict[str, Any]] = []
        compiled: dict[str, dict[str, Any]] = {}
        for tile in candidates(tokens, tma=tma):
            case = case_of(tokens, n, k, tile)
            row: dict[str, Any] = {"block_n": tile.block_n, "block_t": tile.block_t, "warps": tile.num_warps, "stages": tile.num_stages}
            row["tma"] = tile.tma
            try:
                if part.stand_in:
                    row["launches"] = gpu_bench.compile_case(case, compiled)["launches"]
                else:
                    check_bits(tokens, n, k, tile)
                    row["us"] = gpu_bench.run_case(case, 10)["llmc"]["us"]["median"]
            except Exception as error:  # a tile that does not fit, or gives other bits, is a finding of the search, not a failure of it
                row["out"] = f"{type(error).__name__}: {error}"[:300]
            found.append(row)
        result: dict[str, Any] = {"m": tokens, "n": n, "k": k, "tiles": found}
        if not part.stand_in:
            best = min((row for row in found if "us" in row), key=lambda row: row["us"])
            result |= {"default_us": found[0]["us"], "best": best, "gain": round(found[0]["us"] / best["us"], 3)}
        return result

    matrices = MATRICES[:1] if part.stand_in else MATRICES
    for n, k in matrices:
        for tokens in (1, 64, 256, 2048):
            if n <= 100_000 or tokens <= 256:
                part.add(f"tiles {tokens}x{n}x{k}", partial(measure, tokens, n, k))


def kv_bytes(name: str) -> int:
    """Bytes that a token's keys and values take in all layers, bf16."""
    shape = SHAPES[name]
    return 2 * 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim


def step_bytes(name: str, batch: int, context: int) -> int:
    """Bytes that a decode step must read: every weight once, every sequence's keys and values."""
    shape = SHAPES[name]
    attention = shape.hidden_size * shape.head_dim * (2 * shape.num_attention_heads + 2 * shape.num_key_value_heads)
    layer = attention + 3 * shape.hidden_size * shape.intermediate_size
    return 2 * (shape.num_hidden_layers * layer + shape.vocab_size * shape.hidden_size) + batch * context * kv_bytes(name)


def _baseline(part: Part, request: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_baseline.py"), json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=min(240.0, part.left_seconds()))
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip()[-1500:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _hf_startup(part: Part, model: Path) -> dict[str, Any]:
    began = time.time()
    return {"first_token_s": _baseline(part, {"model": str(model), "how": "startup"})["first_token_at"] - began}


PARTS: dict[str, Callable[[Part], None]] = {
    "prepare": prepare, "startup": startup, "decode": decode, "throughput": throughput, "kernels": kernels, "tuning": tuning,
}  # fmt: skip


def run(name: str, out: Path, only: str, stand_in: bool) -> None:
    """Do one part in this process.

    Raises:
        SystemExit: a figure failed.
    """
    part = Part(name, out, only, stand_in)
    try:
        PARTS[name](part)
    except Exception as error:  # what no figure can do without
        part.report["failed"].append({"case": name, "error": f"{type(error).__name__}: {error}"[:2000]})
        print(f"{name}: {type(error).__name__}: {error}", flush=True)
    part.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve-all"]:
        serve_all(sys.argv[2], *map(int, sys.argv[3:6]))
    else:
        run(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "stand-in")
