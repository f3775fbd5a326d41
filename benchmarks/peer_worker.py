"""What the workers of other engines share. Standard library only: each runs in its engine's own Python, without llmc.

A worker prints one JSON line: {"rows": [{"prefill_s", "decode_tok_s", "total_tok_s"}, ...]}, or with --startup
{"first_token_at": seconds since the epoch, "pss_bytes": n}.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

STARTUP_PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13]
# prompts, new tokens -> seconds until each prompt has its first token, seconds in all
Generate = Callable[[list[list[int]], int], tuple[float, float]]


def arguments(*flags: str) -> argparse.Namespace:
    """The command line; `flags` are switches of one worker's own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--startup", action="store_true", help="load, generate one token, say when it came")
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    return parser.parse_args()


def report(generate: Generate, args: argparse.Namespace, vocab_size: int) -> None:
    """Run the workload, the first time to warm caches, and print the line."""
    if args.startup:
        generate([STARTUP_PROMPT], 1)
        reached = time.time()
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        pss = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        print(json.dumps({"first_token_at": reached, "pss_bytes": pss}), flush=True)
        return
    rows = []
    for run in range(args.repeat + 1):
        rng = random.Random(run)
        prompts = [[rng.randrange(300, vocab_size) for _ in range(args.prompt)] for _ in range(args.batch)]
        prefill, total = generate(prompts, args.new)
        if run:
            decode = args.batch * (args.new - 1) / (total - prefill)
            rows.append({"prefill_s": prefill, "decode_tok_s": decode, "total_tok_s": args.batch * args.new / total})
    print(json.dumps({"rows": rows}), flush=True)
