"""Worker: vLLM on a CPU, its engine stepped by hand in this process: bf16, greedy, no prefix cache. Compiled; --eager: as it is written."""

from __future__ import annotations

import os
import time

from benchmarks.peer_worker import arguments, report


def main() -> None:
    args = arguments("--eager")
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    for name, value in {**defaults, "VLLM_CPU_OMP_THREADS_BIND": f"0-{args.threads - 1}" if args.threads > 1 else "0"}.items():
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams  # after the variables, which it reads when it is imported

    llm = LLM(
        args.model,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=max(8, *(size.batch for size in args.sizes)),
        max_num_batched_tokens=max(1024, *(size.batch * size.prompt for size in args.sizes)),
        enforce_eager=args.eager,
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
    )
    engine = llm.llm_engine
    names = iter(range(1 << 30))

    def generate(prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        started, first, counts = time.perf_counter(), None, {}
        for prompt in prompts:
            engine.add_request(str(next(names)), {"prompt_token_ids": prompt}, sampling)
        while engine.has_unfinished_requests():
            for output in engine.step():
                counts[output.request_id] = len(output.outputs[0].token_ids)
            if first is None and len(counts) == len(prompts):
                first = time.perf_counter()
        ended = time.perf_counter()
        if first is None or sorted(counts.values()) != [new_tokens] * len(prompts):
            raise RuntimeError(f"vLLM gave {sorted(counts.values())} tokens where {new_tokens} each were asked for")
        return first - started, ended - started

    report(generate, args, llm.get_tokenizer().vocab_size)


if __name__ == "__main__":
    main()
