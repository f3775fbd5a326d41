"""Worker: an artifact's logits under forced tokens, for comparing two artifacts.

    {"artifact": DIR, "threads": 2, "sequences": [[ids], ...], "decode": 16, "out": FILE.npy} -> {"rows": n}

Each sequence is computed as a prefill but for its last `decode` tokens, which are computed one by one, so that both ways of the
attention kernel take part. Row r of the file, float32 [rows, vocab_size], is the logits after token r.
"""

from __future__ import annotations

import itertools
import json
import sys

import numpy as np

from llmc.errors import LlmcError
from llmc.runtime.canary import forced_share
from llmc.runtime.engine_config import EngineConfig
from llmc.runtime.load import LoadedModel, load_model


def logits_of(model: LoadedModel, token_ids: list[int], decode: int) -> np.ndarray:
    """float32 [len(token_ids), vocab_size]."""
    block_size, groups = model.manifest.kv.block_size, len(model.manifest.kv.groups)
    num_blocks = -(-len(token_ids) // block_size)
    prefill = max(1, len(token_ids) - decode)
    edges = [*range(0, prefill, model.limits.max_num_batched_tokens), *range(prefill, len(token_ids) + 1)]
    parts = []
    for start, end in itertools.pairwise(edges):
        share = forced_share("logits", token_ids, start, end, groups=groups, num_blocks=num_blocks)
        model.builder.check(share)
        logits = model.executor.run(model.builder.build([share]).batch).to_float32()
        parts.append(logits[: end - start].copy())
    return np.concatenate(parts)


def main(arguments: list[str]) -> int:
    request = json.loads(arguments[0])
    sequences: list[list[int]] = request["sequences"]
    try:
        model = load_model(EngineConfig(artifact=request["artifact"], threads=request["threads"], verify_weights="never", canary=False))
        rows = np.concatenate([logits_of(model, sequence, request["decode"]) for sequence in sequences])
        model.executor.close()
    except LlmcError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    np.save(request["out"], rows, allow_pickle=False)
    print(json.dumps({"rows": len(rows)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
