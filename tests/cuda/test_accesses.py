"""What kernels of ours are found to read and write: by hand for some, and as torch says where it can."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs the cuda extra: pip install 'llmc[cuda]'")

from torch._higher_order_ops import triton_kernel_wrap

from llmc.compiler.cuda.accesses import pointer_accesses
from llmc.compiler.cuda.cross import cross_cuda
from llmc.kernels.catalogue import catalogue
from llmc.kernels.cuda_targets import cuda_target
from llmc.kernels.launch import Launch

# Calls of functions, descriptors, pointers behind numbers, indices that are loaded.
EXPECTED = {
    "decode_kernel": ({"x", "weight"}, {"out"}),
    "add_kernel": ({"partial", "bias"}, {"out"}),
    "prefill_tma_kernel": ({"x", "weight", "bias"}, {"out"}),
    "segments_kernel": ({"q", "k_cache", "v_cache", "block_tables", "seq_lens", "query_start_loc"}, {"partial", "peaks"}),
    "merge_kernel": ({"partial", "peaks", "seq_lens", "query_start_loc"}, {"out"}),
}
CASES = ("plain_linear bfloat16 1", "plain_linear bfloat16 tma 256", "paged_attention llama-8b", "sample truncated", "moe_sort 64")


@pytest.fixture(scope="module")
def launches() -> list[Launch]:
    found = catalogue()
    return list({launch.kernel.__name__: launch for case in CASES for launch in found[case]}.values())


def test_what_kernels_touch(launches: list[Launch]) -> None:
    found = {launch.kernel.__name__: pointer_accesses(launch) for launch in launches if launch.kernel.__name__ in EXPECTED}
    assert found == EXPECTED


@pytest.mark.skipif(not hasattr(triton_kernel_wrap, "identify_accessed_tensors"), reason="this torch does not say what is read")
def test_torch_says_the_same(launches: list[Launch]) -> None:
    with cross_cuda(cuda_target("cuda:h200")):
        for launch in launches:
            pointers = {name for name, value in launch.args.items() if isinstance(value, torch.Tensor)}
            theirs = triton_kernel_wrap.identify_accessed_tensors(launch.kernel, {**launch.args, **launch.constants}, {}).read_writes
            expected = [{dependence.name for dependence in found} & pointers for found in (theirs.reads, theirs.writes)]
            assert [*pointer_accesses(launch)] == expected, launch.kernel.__name__
