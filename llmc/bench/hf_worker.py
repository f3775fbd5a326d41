"""Worker: Hugging Face transformers in a fresh process, as a baseline: the artifact's dtype, sdpa (eager where an architecture has no
other), inference_mode, logits of the last row alone. The same request and answer as engine_worker, with {"model": DIR, "dtype":
"bfloat16"} for the artifact.

{"startup": true} loads, generates one token and gives the wall-clock time of it: {"first_token_at": seconds since the epoch}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from llmc.bench.processes import pss_bytes
from llmc.bench.workload import Mode, prompts


def generate(model: Any, token_ids: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Greedy, all prompts as one batch."""
    ids = torch.tensor(token_ids)
    started = time.perf_counter()
    steps = []
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        token = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            before = time.perf_counter()
            token = model(input_ids=token, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
            steps.append(round(1e3 * (time.perf_counter() - before), 4))
    ended = time.perf_counter()
    decoded = len(token_ids) * (new_tokens - 1)
    return {
        "prefill_s": first - started,
        "total_s": ended - started,
        "decode_tok_s": decoded / (ended - first) if decoded else None,
        "step_ms": steps,
        "longest_step_ms": max(1e3 * (first - started), *steps, 0.0),
    }


def main(arguments: list[str]) -> int:
    request = json.loads(arguments[0])
    torch.set_num_threads(request["threads"])
    transformers.logging.set_verbosity_error()
    dtype = getattr(torch, request["dtype"])
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=dtype).eval()  # its own choice: sdpa where it has it, or eager
    if request.get("startup"):
        generate(model, [[1, 2, 3, 4, 5, 6, 7, 8, 9]], 1)
        print(json.dumps({"first_token_at": time.time(), "pss_bytes": pss_bytes(os.getpid())}))
        return 0
    rows: dict[str, list[dict[str, Any]]] = {}
    for mode in (Mode(**one) for one in request["modes"]):
        for run in range(request["warmup"] + request["repeats"]):
            row = generate(model, prompts(mode, model.config.vocab_size, request["seed"] + run), mode.new_tokens)
            if run >= request["warmup"]:
                rows.setdefault(mode.name, []).append(row)
    print(json.dumps({"modes": rows, "pss_bytes": pss_bytes(os.getpid())}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
