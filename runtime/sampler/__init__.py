"""Choosing tokens: numpy, fp32, each row's token from that row alone, whoever else is in the step."""

from llmc.runtime.sampler.sampler import Sampler

__all__ = ["Sampler"]
