"""Compiles a tiny program with the runtime's step signature, as a stand-in for a model image. Run as a script: OUT_FOLDER."""

from __future__ import annotations

import json
import os
import sys
import zipfile
from pathlib import Path

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


def main(folder: Path) -> None:
    """Write toy.so, embed.npy, head.npy and constants.json (the program's names for its weights) to `folder`."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
    import numpy as np
    import torch
    import torch.fx.experimental._config as shapes_config

    class Toy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Parameter(torch.randn(VOCAB, DIM))
            self.head = torch.nn.Parameter(torch.randn(VOCAB, DIM))

        def forward(self, ids, positions, rows, slots, tables, seq_lens, starts, k_cache, v_cache):  # type: ignore[no-untyped-def]
            x = self.embed[ids]
            flat = k_cache.view(-1, DIM)
            flat.index_copy_(0, slots[0], x)  # what a token writes, a later step can read
            x = x + flat[slots[0] - (positions > 0).long()] * 0.5
            return x[rows] @ self.head.T

    torch.manual_seed(0)
    model = Toy().eval().requires_grad_(False)
    int32 = torch.int32
    example = (
        torch.arange(5),
        torch.arange(5),
        torch.tensor([1, 4]),
        torch.arange(5)[None],
        torch.zeros(1, 2, 3, dtype=int32),
        torch.tensor([2, 3], dtype=int32),
        torch.tensor([0, 2, 5], dtype=int32),
        torch.zeros(4, 1, BLOCK, DIM),
        torch.zeros(4, 1, BLOCK, DIM),
    )
    size = torch.export.Dim.DYNAMIC
    dims = ({0: size}, {0: size}, {0: size}, {1: size}, {1: size, 2: size}, {0: size}, {0: size}, {0: size}, {0: size})
    with shapes_config.patch(backed_size_oblivious=True), torch.no_grad():
        program = torch.export.export(model, example, dynamic_shapes=dims)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(folder / "toy.pt2"), inductor_configs={"aot_inductor.package_constants_in_so": False}
    )
    with zipfile.ZipFile(package) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".so")]
        (folder / "toy.so").write_bytes(archive.read(name))
    for name, parameter in model.named_parameters():
        np.save(folder / f"{name}.npy", parameter.numpy())
    (folder / "constants.json").write_text(json.dumps({name: name for name, _ in model.named_parameters()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
