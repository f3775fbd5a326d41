"""Time an artifact's decode step. `python -m llmc.runtime.time_decode FOLDER`; the last line of stdout is a JSON list, ms a token.

A process of its own, as every comparison of two programs wants it: one may not warm the other's memory or threads.
"""

from __future__ import annotations

import json
import sys
import time

from llmc.errors import LlmcError
from llmc.runtime.llm import LLM
from llmc.runtime.messages import SamplingParams

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 16, 32, 3


def main(arguments: list[str]) -> int:
    """Load the folder's artifact and decode one sequence a few times, the first of which warms up and is not counted."""
    if len(arguments) != 1:
        print("usage: python -m llmc.runtime.time_decode FOLDER", file=sys.stderr)
        return 2
    try:
        with LLM(arguments[0], num_blocks=64, verify_weights="never", generation_config="llmc") as llm:
            times = [_decode(llm) for _ in range(1 + REPEATS)]
    except LlmcError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(times[1:]))
    return 0


def _decode(llm: LLM) -> float:
    """Milliseconds of a token, prefill taken off by timing it alone."""
    prompt = [1 + i for i in range(PROMPT_TOKENS)]
    seconds = []
    for new_tokens in (1, 1 + NEW_TOKENS):
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        started = time.perf_counter()
        llm.generate([prompt], params)
        seconds.append(time.perf_counter() - started)
    return max(0.0, (seconds[1] - seconds[0]) * 1000 / NEW_TOKENS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
