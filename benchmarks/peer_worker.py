"""What the workers of other engines share. Standard library only: each runs in its engine's own Python, without llmc.

A worker prints one JSON line: {"sizes": {"1x128x64": [{"prefill_s", "decode_tok_s", "total_tok_s"}, ...], ...}}, or with --startup
{"first_token_at": seconds since the epoch, "pss_bytes": n}.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

STARTUP_PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13]
# prompts, new tokens -> seconds until each prompt has its first token, seconds in all
Generate = Callable[[list[list[int]], int], tuple[float, float]]


@dataclass(frozen=True)
class Size:
    """`batch` prompts of `prompt` tokens, `new` tokens each. Written 8x128x64."""

    batch: int
    prompt: int
    new: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """Of its written form; ValueError else."""
        batch, prompt, new = (int(part) for part in text.split("x"))
        return cls(batch, prompt, new)

    def __str__(self) -> str:
        return f"{self.batch}x{self.prompt}x{self.new}"


def arguments(*flags: str) -> argparse.Namespace:
    """The command line; `flags` are switches of one worker's own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", type=Size.parse, nargs="+", default=[Size(1, 512, 64)], metavar="BATCHxPROMPTxNEW")
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
    print(json.dumps({"sizes": {str(size): _rows(generate, size, args.repeat, vocab_size) for size in args.sizes}}), flush=True)


def _rows(generate: Generate, size: Size, repeats: int, vocab_size: int) -> list[dict[str, float]]:
    rows = []
    for run in range(repeats + 1):
        rng = random.Random(run)
        prompts = [[rng.randrange(300, vocab_size) for _ in range(size.prompt)] for _ in range(size.batch)]
        prefill, total = generate(prompts, size.new)
        if run:
            decode = size.batch * (size.new - 1) / (total - prefill)
            rows.append({"prefill_s": prefill, "decode_tok_s": decode, "total_tok_s": size.batch * size.new / total})
    return rows
