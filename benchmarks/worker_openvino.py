"""Worker: OpenVINO GenAI's continuous batching, stepped by hand: fp16 weights on disk, bf16 arithmetic, greedy, no prefix cache.

The model is a folder that `optimum-cli export openvino --task text-generation-with-past --weight-format fp16` made.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai

from benchmarks.peer_worker import arguments, report


def main() -> None:
    args = arguments()
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1  # GB
    scheduler.max_num_batched_tokens = max(256, *(size.batch * size.prompt for size in args.sizes))
    scheduler.enable_prefix_caching = False
    properties = {"INFERENCE_NUM_THREADS": args.threads, "INFERENCE_PRECISION_HINT": "bf16"}
    pipeline = genai.ContinuousBatchingPipeline(args.model, scheduler, "CPU", properties, {})
    names = iter(range(1 << 30))

    def generate(prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
        config = genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        started, first = time.perf_counter(), None
        handles = [pipeline.add_request(next(names), ov.Tensor(np.array([ids], dtype=np.int64)), config) for ids in prompts]
        counts = [0] * len(handles)
        while pipeline.has_non_finished_requests():
            pipeline.step()
            for index, handle in enumerate(handles):
                if handle.can_read():
                    counts[index] += sum(len(output.generated_ids) for output in handle.read().values())
            if first is None and all(counts):
                first = time.perf_counter()
        ended = time.perf_counter()
        if first is None or counts != [new_tokens] * len(prompts):
            raise RuntimeError(f"OpenVINO gave {sorted(counts)} tokens where {new_tokens} each were asked for")
        return first - started, ended - started

    report(generate, args, json.loads((Path(args.model) / "config.json").read_text())["vocab_size"])


if __name__ == "__main__":
    main()
