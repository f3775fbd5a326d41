"""Choosing tokens: numpy, fp32, one row at a time, so that a row's token depends on that row alone."""

from llmc.runtime.sampler.sampler import Sampler

__all__ = ["Sampler"]
