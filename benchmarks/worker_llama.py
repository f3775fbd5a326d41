"""Worker: llama.cpp through llama-cpp-python's C interface: greedy, argmax over the logits it shows. Runs in that package's own Python."""

from __future__ import annotations

import ctypes
import functools
import time

import llama_cpp as llama
import numpy as np

from benchmarks.peer_worker import arguments, report


@llama.llama_log_callback
def _quiet(level: int, text: bytes, data: object) -> None:
    """llama.cpp reports what it loads on standard error; failures are told by what its functions return."""


def main() -> None:
    args = arguments("--plain")  # without repacked buffers
    llama.llama_log_set(_quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    options = llama.llama_model_default_params()
    options.n_gpu_layers = 0
    if args.plain:
        options.use_extra_bufts = False
    model = llama.llama_model_load_from_file(args.model.encode(), options)
    if not model:
        raise RuntimeError(f"llama.cpp does not load {args.model}")
    vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    @functools.cache
    def context_of(sequences: int, length: int) -> llama.llama_context_p:
        """Sized for what runs in it."""
        context = llama.llama_context_default_params()
        context.n_ctx = -(-length // 256) * 256 * sequences
        context.n_batch = max(2048, sequences * length)
        context.n_ubatch = 512
        context.n_seq_max = sequences
        context.n_threads = context.n_threads_batch = args.threads
        state = llama.llama_init_from_model(model, context)
        if not state:
            raise RuntimeError("llama.cpp makes no context")
        return state

    def best(state: llama.llama_context_p, row: int) -> int:
        return int(np.ctypeslib.as_array(llama.llama_get_logits_ith(state, row), shape=(vocab,)).argmax())

    def decode(state: llama.llama_context_p, batch: llama.llama_batch, tokens: list[tuple[int, int, int, bool]]) -> None:
        """tokens: (id, position, sequence, whether its logits are wanted)."""
        batch.n_tokens = len(tokens)
        for index, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[index], batch.pos[index], batch.logits[index] = token, position, wanted
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
        if llama.llama_decode(state, batch):
            raise RuntimeError("llama.cpp failed in a step")

    def generate(prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
        length = len(prompts[0])
        state = context_of(len(prompts), length + new_tokens)
        llama.llama_memory_clear(llama.llama_get_memory(state), True)
        batch = llama.llama_batch_init(len(prompts) * length, 0, 1)
        started = time.perf_counter()
        decode(state, batch, [(token, at, row, at == length - 1) for row, prompt in enumerate(prompts) for at, token in enumerate(prompt)])
        tokens = [best(state, row * length + length - 1) for row in range(len(prompts))]
        first = time.perf_counter()
        for step in range(new_tokens - 1):
            decode(state, batch, [(token, length + step, row, True) for row, token in enumerate(tokens)])
            tokens = [best(state, row) for row in range(len(prompts))]
        ended = time.perf_counter()
        llama.llama_batch_free(batch)
        return first - started, ended - started

    report(generate, args, vocab)


if __name__ == "__main__":
    main()
