"""Worker: llama.cpp through llama-cpp-python, in a fresh process: greedy, batch 1. One JSON line. Runs in that package's own Python."""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import time

import llama_cpp
import numpy as np


def generate(model: llama_cpp.Llama, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """Returns (seconds to the first token, seconds in all)."""
    vocab = model.n_vocab()

    def best() -> int:
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (vocab,)).argmax())

    model.reset()
    started = time.perf_counter()
    model.eval(prompt)
    token = best()
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        model.eval([token])
        token = best()
    return first - started, time.perf_counter() - started


def _without_repacking() -> None:
    """Llama() has no argument for `use_extra_bufts`, so the defaults that it starts from are changed."""
    original = llama_cpp.llama_model_default_params

    def plain() -> llama_cpp.llama_model_params:
        params = original()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = plain


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="without repacked buffers")
    args = parser.parse_args()
    if args.batch != 1:
        parser.error("llama.cpp is measured at batch 1 here")
    if args.plain:
        _without_repacking()
    model = llama_cpp.Llama(
        args.model, n_ctx=args.prompt + args.new + 8, n_threads=args.threads, n_threads_batch=args.threads, n_batch=512, verbose=False
    )
    rows = []
    for run in range(args.repeat + 1):
        rng = random.Random(run)
        prompt = [rng.randrange(300, model.n_vocab()) for _ in range(args.prompt)]
        prefill, total = generate(model, prompt, args.new)
        if run:
            rows.append({"prefill_s": prefill, "decode_tok_s": (args.new - 1) / (total - prefill), "total_tok_s": args.new / total})
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
