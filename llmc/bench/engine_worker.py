"""Worker: one engine in a fresh process, timed step by step. Takes a JSON request, prints one JSON line.

{"artifact": DIR, "threads": 2, "modes": [Mode, ...], "warmup": 1, "repeats": 3, "seed": 0}
-> {"modes": {name: [{"prefill_s", "total_s", "decode_tok_s", "step_ms": [...], "longest_step_ms"}, ...]}, "startup_ms": {...},
    "pss_bytes": n}
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from llmc.bench.processes import pss_bytes
from llmc.bench.workload import Mode, prompts
from llmc.errors import InternalError, LlmcError
from llmc.runtime.engine import Engine, EngineConfig
from llmc.runtime.messages import GenerateRequest, SamplingParams


def generate(engine: Engine, token_ids: list[list[int]], new_tokens: int, tag: str) -> dict[str, Any]:
    """Run all prompts together.

    Returns:
        prefill_s: until every prompt has its first token. total_s. decode_tok_s: tokens per second after that. step_ms: each step
        after that, which is the gap between a sequence's tokens. longest_step_ms: of all steps, those that take prompts in included.
    """
    counts = dict.fromkeys((f"{tag}-{i}" for i in range(len(token_ids))), 0)
    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    started = time.perf_counter()
    for name, ids in zip(counts, token_ids, strict=True):
        engine.add(GenerateRequest(request_id=name, prompt_token_ids=ids, sampling=sampling))
    first, after, steps, longest = None, 0, [], 0.0
    while engine.has_work():
        before = time.perf_counter()
        for event in engine.step():
            if event.error:
                raise InternalError(event.error)
            counts[event.request_id] += len(event.token_ids)
            if first is not None:
                after += len(event.token_ids)
        taken = round(1e3 * (time.perf_counter() - before), 4)
        longest = max(longest, taken)
        if first is not None:
            steps.append(taken)
        elif all(counts.values()):
            first = time.perf_counter()
    ended = time.perf_counter()
    if first is None or any(count != new_tokens for count in counts.values()):
        raise InternalError(f"sequences of {sorted(set(counts.values()))} tokens where {new_tokens} were asked for; please report this")
    decoding = ended - first
    return {
        "prefill_s": first - started,
        "total_s": ended - started,
        "decode_tok_s": after / decoding if after else None,
        "step_ms": steps,
        "longest_step_ms": longest,
    }


def main(arguments: list[str]) -> int:
    request = json.loads(arguments[0])
    try:
        config = EngineConfig(
            artifact=request["artifact"],
            threads=request["threads"],
            enable_prefix_caching=False,
            verify_weights="never",
            seed=0,
            max_queue=max(1024, *(mode["batch"] for mode in request["modes"])),  # all of a mode's sequences are there from the start
        )
        engine = Engine(config)
        rows: dict[str, list[dict[str, Any]]] = {}
        for mode in (Mode(**one) for one in request["modes"]):
            for run in range(request["warmup"] + request["repeats"]):
                row = generate(engine, prompts(mode, engine.manifest.model.vocab_size, request["seed"] + run), mode.new_tokens, f"r{run}")
                if run >= request["warmup"]:
                    rows.setdefault(mode.name, []).append(row)
        used = pss_bytes(os.getpid())
        startup = dict(engine.ready.startup_ms)
        engine.close()
    except LlmcError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps({"modes": rows, "startup_ms": startup, "pss_bytes": used}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
