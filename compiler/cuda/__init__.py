"""CUDA targets: lowering for a GPU that is not here. Needs the `cuda` extra (triton); no driver and no GPU.

Not reachable from the command line until a whole model compiles and an executor runs it (`kernels.cuda_targets.NOT_BUILT`).
"""
