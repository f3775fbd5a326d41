"""CUDA targets: lowering for a GPU that is not here. Needs the `cuda` extra (triton); no driver and no GPU."""
