"""Worker: Hugging Face transformers in a fresh process: bf16, sdpa, inference_mode, logits of the last row only. One JSON line."""

from __future__ import annotations

import argparse
import json
import random
import time

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache


def generate(model: torch.nn.Module, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
    """Greedy, all prompts as one batch. Returns (seconds to the first tokens, seconds in all)."""
    ids = torch.tensor(prompts)
    started = time.perf_counter()
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        token = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            token = model(input_ids=token, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
    return first - started, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--startup", action="store_true", help="load, generate one token, print nothing but the time of the token")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    if args.startup:
        generate(model, [[1, 2, 3, 4, 5, 6, 7, 8, 9]], 1)
        print(json.dumps({"first_token_at": time.time()}))
        return
    vocab = model.config.vocab_size
    rows = []
    for run in range(args.repeat + 1):
        rng = random.Random(run)
        prompts = [[rng.randrange(300, vocab) for _ in range(args.prompt)] for _ in range(args.batch)]
        prefill, total = generate(model, prompts, args.new)
        if run:
            decoded = args.batch * (args.new - 1)
            rows.append({"prefill_s": prefill, "decode_tok_s": decoded / (total - prefill), "total_tok_s": args.batch * args.new / total})
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
