"""Worker: one llmc engine in a fresh process, timed step by step. Prints one JSON line. Called by decode.py."""

from __future__ import annotations

import argparse
import json
import random
import time

from llmc.runtime.engine import Engine, EngineConfig
from llmc.runtime.messages import GenerateRequest, SamplingParams


def generate(engine: Engine, prompts: list[list[int]], new_tokens: int, tag: str) -> tuple[float, float, float]:
    """Run `prompts` together. Returns (seconds to the last prompt's first token, seconds in all, decoded tokens after that)."""
    counts = dict.fromkeys((f"{tag}-{i}" for i in range(len(prompts))), 0)
    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    started = time.perf_counter()
    for name, prompt in zip(counts, prompts, strict=True):
        engine.add(GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling))
    first = None
    after = 0
    while engine.has_work():
        for event in engine.step():
            if event.error:
                raise RuntimeError(event.error)
            counts[event.request_id] += len(event.token_ids)
            if first is not None:
                after += len(event.token_ids)
        if first is None and all(counts.values()):
            first = time.perf_counter()
    ended = time.perf_counter()
    assert first is not None and all(count == new_tokens for count in counts.values())
    return first - started, ended - started, after


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    engine = Engine(EngineConfig(artifact=args.artifact, threads=args.threads, enable_prefix_caching=False, verify_weights="never"))
    vocab = engine.manifest.model.vocab_size
    rows = []
    for run in range(args.repeat + 1):
        rng = random.Random(run)
        prompts = [[rng.randrange(300, vocab) for _ in range(args.prompt)] for _ in range(args.batch)]
        prefill, total, after = generate(engine, prompts, args.new, f"r{run}")
        if run:  # the first run warms caches
            rows.append({"prefill_s": prefill, "decode_tok_s": after / (total - prefill), "total_tok_s": args.batch * args.new / total})
    print(json.dumps({"rows": rows}))
    engine.close()


if __name__ == "__main__":
    main()
