"""Tensor parallelism: one program run by several processes of a machine at the same time, each with its part of the weights."""
