"""What `--performance-mode` stands for: the limits and sizes a compile takes where none were given. Flags given beside it win.

balanced        256 sequences, steps of 2048 tokens; decode sizes by the default rule
interactivity   32 sequences, steps of 512 tokens: a prompt delays the others' next token by at most a quarter of what balanced allows;
                on a GPU a plan for every number of sequences, so that no decode step computes padding
throughput      512 sequences, steps of 8192 tokens: fewer, larger steps; on a GPU decode sizes up to 512
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class PerformanceMode:
    """Defaults of one mode. capture_sizes and max_capture_size are for CUDA targets; None: the rule of compiler/cuda/sizes.py."""

    max_num_seqs: int
    max_num_batched_tokens: int
    capture_sizes: tuple[int, ...] | None = None
    max_capture_size: int | None = None


MODES = {
    "balanced": PerformanceMode(max_num_seqs=256, max_num_batched_tokens=2048),
    "interactivity": PerformanceMode(max_num_seqs=32, max_num_batched_tokens=512, capture_sizes=tuple(range(1, 33))),
    "throughput": PerformanceMode(max_num_seqs=512, max_num_batched_tokens=8192, max_capture_size=512),
}
