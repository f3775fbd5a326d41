"""Test modules that change their process for good, each run in a process of its own.

They open kernels with RTLD_GLOBAL: an engine loaded later in the same process would call those instead of its artifact's.
"""

from __future__ import annotations

from pathlib import Path

VARIABLE = "LLMC_TEST_OWN_PROCESS"  # set in such a process
MODULES = (
    "tests/kernels/test_aoti_shims.py",
    "tests/kernels/test_paged_attention_shim.py",
    "tests/kernels/test_rope_kv_write_shim.py",
    "tests/kernels/test_tensor_runtime.py",
)
ROOT = Path(__file__).resolve().parents[1]
