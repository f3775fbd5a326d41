"""Continuous batching: who runs in each step, and what became of it. See README.md."""

from llmc.runtime.scheduler.config import Policy, SchedulerConfig
from llmc.runtime.scheduler.scheduler import Scheduler

__all__ = ["Policy", "Scheduler", "SchedulerConfig"]
