"""llmc::sample, adjust_logits and token_logprobs in Triton: the launches; the kernels are in `triton_kernels.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..launch import FLOATS, H200, Argument, Device, Launch, Launcher, cdiv, dtype_reason, next_power_of_2, run
from ..registry import Implementation
from . import triton_kernels as K

RUN = 4096  # ids of a row that one program looks at
MAX_VOCAB = 1 << 18  # so many weights of at most 2^44 units fit into 63 bits
MAX_TOP = 32  # logprobs a row
LEVELS = 8  # of four bits
TOP_K, NUCLEUS, DRAW = 0, 1, 2


def sample(
    logits: Tensor, inverse_temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p_gap: Tensor, seeds: Tensor, positions: Tensor,
    truncate: bool, *, launch: Launcher = run, device: Device = H200,
) -> Tensor:  # fmt: skip
    """`sample_reference` on a GPU."""
    num_rows, vocab = logits.shape
    sizes = _Sizes(logits)
    peaks = launch_peaks(logits, sizes, launch)
    cuts = logits.new_empty((num_rows,), dtype=torch.float32)
    nucleus = logits.new_empty((num_rows, 2), dtype=torch.int64)
    partial = logits.new_empty((2, num_rows, sizes.num_runs, 16), dtype=torch.int64)
    state = logits.new_empty((LEVELS, num_rows, 3), dtype=torch.int64)
    out = logits.new_empty((num_rows,), dtype=torch.int64)
    launch(
        Launch(
            kernel=K.begin_kernel,
            grid=(num_rows, 1, 1),
            args={"cuts": cuts, "nucleus": nucleus, "partial": partial[1], "state": state, "num_runs": sizes.num_runs},
            constants={},
            num_warps=1,
        )
    )
    # where a search begins at an even level, the sums of its last level lie in the second half
    last: dict[str, Argument] = {"peaks": peaks, "partial": partial[1], "state": state, "inverse_temperature": inverse_temperature}
    rows: dict[str, Argument] = {"vocab": vocab, "num_rows": num_rows, "num_runs": sizes.num_runs}

    def search(which: int) -> None:
        for level in range(LEVELS):
            launch(
                Launch(
                    kernel=K.search_kernel,
                    grid=sizes.grid,
                    args={
                        "logits": logits, "peaks": peaks, "cuts": cuts, "nucleus": nucleus, "partial_before": partial[(level + 1) % 2],
                        "partial": partial[level % 2], "state": state, "inverse_temperature": inverse_temperature, "top_k": top_k,
                        "top_p": top_p, "seeds": seeds, "positions": positions, "stride": logits.stride(0), "vocab": vocab,
                        "num_rows": num_rows, "level": level,
                    },
                    constants={"SEARCH": which, "TRUNCATE": truncate, "BLOCK": sizes.block, "BLOCK_RUNS": sizes.block_runs},
                )
            )  # fmt: skip

    if truncate:
        search(TOP_K)
    launch(
        Launch(
            kernel=K.cut_kernel,
            grid=(num_rows, 1, 1),
            args={**last, "cuts": cuts, "top_k": top_k, "min_p_gap": min_p_gap, **rows},
            constants={"TRUNCATE": truncate, "BLOCK_RUNS": sizes.block_runs},
            num_warps=1,
        )
    )
    if truncate:
        search(NUCLEUS)
        launch(
            Launch(
                kernel=K.nucleus_kernel,
                grid=(num_rows, 1, 1),
                args={**last, "nucleus": nucleus, "top_p": top_p, **rows},
                constants={"BLOCK_RUNS": sizes.block_runs},
                num_warps=1,
            )
        )
    search(DRAW)
    launch(
        Launch(
            kernel=K.pick_kernel,
            grid=(num_rows, 1, 1),
            args={
                **last, "logits": logits, "cuts": cuts, "nucleus": nucleus, "out": out, "top_p": top_p, "seeds": seeds,
                "positions": positions, "stride": logits.stride(0), **rows,
            },
            constants={"TRUNCATE": truncate, "BLOCK": sizes.block, "BLOCK_RUNS": sizes.block_runs},
        )
    )  # fmt: skip
    return out


def adjust_logits(
    logits: Tensor, mask: Tensor | None, ids: Tensor, bias: Tensor, counts: Tensor, penalties: Tensor, *,
    launch: Launcher = run, device: Device = H200,
) -> Tensor:  # fmt: skip
    """`adjust_logits_reference` on a GPU."""
    (num_rows, vocab), sizes = logits.shape, _Sizes(logits)
    out = logits.new_empty((num_rows, vocab), dtype=torch.float32)
    launch(
        Launch(
            kernel=K.mask_kernel,
            grid=sizes.grid,
            args={
                "logits": logits, "mask": ids if mask is None else mask, "out": out, "stride": logits.stride(0),
                "mask_stride": 0 if mask is None else mask.stride(0), "vocab": vocab,
            },
            constants={"HAS_MASK": mask is not None, "BLOCK": sizes.block},
        )
    )  # fmt: skip
    block = min(1024, next_power_of_2(ids.shape[1]))
    launch(
        Launch(
            kernel=K.penalty_kernel,
            grid=(num_rows, cdiv(ids.shape[1], block), 1),
            args={
                "out": out, "ids": ids, "bias": bias, "counts": counts, "penalties": penalties, "vocab": vocab, "num_ids": ids.shape[1],
            },
            constants={"BLOCK": block},
        )
    )  # fmt: skip
    return out


def token_logprobs(
    logits: Tensor, token_ids: Tensor, num_top: int, *, launch: Launcher = run, device: Device = H200
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`token_logprobs_reference` on a GPU."""
    num_rows, sizes = logits.shape[0], _Sizes(logits)
    peaks = launch_peaks(logits, sizes, launch)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return logits.new_empty((num_rows, *shape), dtype=dtype)

    units, higher = empty(sizes.num_runs, dtype=torch.int64), empty(sizes.num_runs, dtype=torch.int32)
    run_values, run_ids = (empty(sizes.num_runs, max(1, num_top), dtype=d) for d in (torch.float32, torch.int32))
    logprobs, ranks = empty(dtype=torch.float32), empty(dtype=torch.int64)
    top_ids, top_logprobs = empty(num_top, dtype=torch.int64), empty(num_top, dtype=torch.float32)
    common: dict[str, Any] = {
        "logits": logits, "token_ids": token_ids, "peaks": peaks, "units": units, "higher": higher, "stride": logits.stride(0)
    }  # fmt: skip
    launch(
        Launch(
            kernel=K.top_runs_kernel,
            grid=sizes.grid,
            args={**common, "top_values": run_values, "top_ids": run_ids, "vocab": logits.shape[1]},
            constants={
                "NUM_TOP": num_top, "BLOCK_TOP": next_power_of_2(num_top), "BLOCK": sizes.block, "BLOCK_RUNS": sizes.block_runs,
            },
        )
    )  # fmt: skip
    launch(
        Launch(
            kernel=K.top_rows_kernel,
            grid=(num_rows, 1, 1),
            args={
                **common, "run_values": run_values, "run_ids": run_ids, "logprobs": logprobs, "ranks": ranks, "top_ids": top_ids,
                "top_logprobs": top_logprobs, "num_runs": sizes.num_runs,
            },
            constants={
                "NUM_TOP": num_top, "BLOCK_ALL": next_power_of_2(sizes.num_runs * max(1, num_top)), "BLOCK_RUNS": sizes.block_runs,
            },
        )
    )  # fmt: skip
    return logprobs, ranks, top_ids, top_logprobs


def checked_tokens(logits: Tensor, tokens: Tensor, *, launch: Launcher = run, device: Device = H200) -> tuple[Tensor, Tensor]:
    """`checked_tokens_reference` on a GPU."""
    checked, fed = tokens.new_empty(tokens.shape), tokens.new_empty(tokens.shape)
    args: dict[str, Argument] = {
        "logits": logits, "tokens": tokens, "checked": checked, "fed": fed, "stride": logits.stride(0), "vocab": logits.shape[1]
    }  # fmt: skip
    launch(Launch(kernel=K.checked_kernel, grid=(logits.shape[0], 1, 1), args=args, constants={}, num_warps=1))
    return checked, fed


class _Sizes:
    """How the rows of logits are cut into runs."""

    def __init__(self, logits: Tensor) -> None:
        num_rows, vocab = logits.shape
        self.block = min(RUN, max(16, next_power_of_2(vocab)))
        self.num_runs = cdiv(vocab, self.block)
        self.block_runs = next_power_of_2(self.num_runs)
        self.grid = (num_rows, self.num_runs, 1)


def launch_peaks(logits: Tensor, sizes: _Sizes, launch: Launcher) -> Tensor:
    """float32 [rows, runs]: the largest logit of each run."""
    peaks = logits.new_empty(sizes.grid[:2], dtype=torch.float32)
    args: dict[str, Argument] = {"logits": logits, "peaks": peaks, "stride": logits.stride(0), "vocab": logits.shape[1]}
    launch(Launch(kernel=K.peaks_kernel, grid=sizes.grid, args=args, constants={"BLOCK": sizes.block}))
    return peaks


def _logits_reason(logits: Tensor) -> str | None:
    if logits.stride(1) != 1:
        return "rows of logits must be contiguous"
    if logits.shape[1] > MAX_VOCAB:
        return f"a vocabulary of {logits.shape[1]}; it takes up to {MAX_VOCAB}"
    return dtype_reason(FLOATS, logits=logits)


def sample_reason(
    logits: Tensor, inverse_temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p_gap: Tensor, seeds: Tensor, positions: Tensor,
    truncate: bool,
) -> str | None:  # fmt: skip
    """Why these kernels do not take the arguments, or None."""
    if any(not t.is_contiguous() for t in (inverse_temperature, top_k, top_p, min_p_gap, seeds, positions)):
        return "the rows' parameters must be contiguous"
    return _logits_reason(logits)


def adjust_logits_reason(logits: Tensor, mask: Tensor | None, ids: Tensor, bias: Tensor, counts: Tensor, penalties: Tensor) -> str | None:
    """Why these kernels do not take the arguments, or None."""
    if any(not t.is_contiguous() for t in (ids, bias, counts, penalties)) or (mask is not None and mask.stride(1) != 1):
        return "mask, ids, bias, counts and penalties must be contiguous"
    return _logits_reason(logits)


def token_logprobs_reason(logits: Tensor, token_ids: Tensor, num_top: int) -> str | None:
    """Why these kernels do not take the arguments, or None."""
    if num_top > MAX_TOP:
        return f"{num_top} logprobs a row; it takes up to {MAX_TOP}"
    return _logits_reason(logits) or (None if token_ids.is_contiguous() else "token_ids must be contiguous")


def checked_tokens_reason(logits: Tensor, tokens: Tensor) -> str | None:
    """Why these kernels do not take the arguments, or None."""
    return _logits_reason(logits) or (None if tokens.is_contiguous() else "tokens must be contiguous")


IMPLEMENTATIONS = (
    Implementation(op="sample", name="triton", supports=sample_reason, call=sample),
    Implementation(op="adjust_logits", name="triton", supports=adjust_logits_reason, call=adjust_logits),
    Implementation(op="token_logprobs", name="triton", supports=token_logprobs_reason, call=token_logprobs),
    Implementation(op="checked_tokens", name="triton", supports=checked_tokens_reason, call=checked_tokens),
)
