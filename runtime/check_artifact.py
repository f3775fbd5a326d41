"""Does a finished artifact answer as its compiler's reference did? `python -m llmc.runtime.check_artifact FOLDER`.

A process of its own, because foreign or broken code may end it. The last line of stdout is {"compared": tokens,
"startup_ms": {stage: ms}}; on failure the last line of stderr is one sentence and the status is that of the error.
"""

from __future__ import annotations

import json
import sys

from llmc.artifacts.verify import open_artifact
from llmc.errors import LlmcError
from llmc.runtime.engine_config import EngineConfig
from llmc.runtime.load import load_model

_BLOCKS = 64  # canaries are short; the memory of a served KV cache is not needed


def main(arguments: list[str]) -> int:
    """Load the folder's artifact, run its canaries, and say how many tokens were compared."""
    if len(arguments) != 1:
        print("usage: python -m llmc.runtime.check_artifact FOLDER", file=sys.stderr)
        return 2
    try:
        with open_artifact(arguments[0], check_machine=False) as opened:
            on_cpu = opened.manifest.target.kind == "cpu"
        # mapped, not copied: a compile needs no second model's worth of memory; a GPU copies. Not hashed: the writer has just done so.
        model = load_model(EngineConfig(artifact=arguments[0], num_blocks=_BLOCKS, weights_mmap=on_cpu, verify_weights="never"))
    except LlmcError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    model.executor.close()
    print(json.dumps({"compared": model.num_canary_tokens, "startup_ms": dict(model.startup_ms)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
