"""Worker: transformers on the GPU in a fresh process, bf16, the baseline of gpu_check's parts. Takes a JSON request, prints one JSON line.

{"model": DIR, "how": "eager" | "compiled" | "continuous", "batch": 1, "prompt": 512, "new": 64, "repeats": 3}
-> {"decode_tok_s": [...], "prefill_s": [...]}; continuous batching has no prefill of its own and gives {"total_tok_s": [...]}.
{"model": DIR, "how": "startup"} -> {"first_token_at": seconds since the epoch}, loaded and compiled, one token made.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache


def generate(model: Any, forward: Any, ids: torch.Tensor, new_tokens: int, static: bool) -> tuple[float, float]:
    """Greedy. Returns (seconds to the first tokens, seconds of the rest)."""
    longest = ids.shape[1] + new_tokens
    with torch.inference_mode():
        cache = StaticCache(config=model.config, max_cache_len=longest) if static else DynamicCache(config=model.config)
        torch.cuda.synchronize()
        started = time.perf_counter()
        token = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        torch.cuda.synchronize()
        first = time.perf_counter()
        for step in range(new_tokens - 1):
            at = torch.arange(ids.shape[1] + step, ids.shape[1] + step + 1, device=ids.device)
            token = forward(input_ids=token, past_key_values=cache, cache_position=at).logits[:, -1].argmax(-1, keepdim=True)
        torch.cuda.synchronize()
    return first - started, time.perf_counter() - first


def main() -> None:
    request = json.loads(sys.argv[1])
    transformers.logging.set_verbosity_error()
    how = request["how"]
    attention = "sdpa" if how != "continuous" else "paged|sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=torch.bfloat16, attn_implementation=attention, device_map="cuda"
    ).eval()
    static = how in ("compiled", "startup")
    forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True) if static else model
    vocab = model.config.vocab_size
    if how == "startup":
        generate(model, forward, torch.randint(300, vocab, (1, 9), device="cuda"), 2, static)
        print(json.dumps({"first_token_at": time.time()}))
        return
    batch, prompt, new = request["batch"], request["prompt"], request["new"]
    result: dict[str, list[float]] = {}
    for run in range(request["repeats"] + 1):  # the first warms up
        torch.manual_seed(run)
        ids = torch.randint(300, vocab, (batch, prompt), device="cuda")
        if how == "continuous":
            settings = transformers.GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
            started = time.perf_counter()
            model.generate_batch(inputs=ids.tolist(), generation_config=settings)
            figures = {"total_tok_s": batch * new / (time.perf_counter() - started)}
        else:
            prefill, decode = generate(model, forward, ids, new, static)
            figures = {"prefill_s": prefill, "decode_tok_s": batch * (new - 1) / decode}
        for name, value in figures.items() if run else ():
            result.setdefault(name, []).append(value)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
