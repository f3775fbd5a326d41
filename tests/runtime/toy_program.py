"""The toy program's signature, the same as a compiled step's with one layer. toy_program.c is the program.

logits[r] = (embed[id] + embed[id of the token before] / 2) @ head^T, where "before" is read from the cache, by the block table.
"""

from __future__ import annotations

VOCAB, DIM, BLOCK = 32, 16, 16
INPUTS = [
    ("input_ids", "int64", ["T"]),
    ("positions", "int64", ["T"]),
    ("logits_indices", "int64", ["N"]),
    ("slot_mapping", "int64", [1, "T"]),
    ("block_tables", "int32", [1, "B", "M"]),
    ("seq_lens", "int32", ["B"]),
    ("query_start_loc", "int32", ["B1"]),
    ("k_cache.0", "float32", ["NB", 1, BLOCK, DIM]),
    ("v_cache.0", "float32", ["NB", 1, BLOCK, DIM]),
]
