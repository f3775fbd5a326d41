"""Running plans on an NVIDIA GPU, over libcuda alone: neither torch nor Triton is in the process."""
