"""These tests run where TRITON_INTERPRET=1 was set before Python started, or on a GPU. `tests/kernels/test_triton.py` starts them."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("LLMC_TRITON_TESTS") else ["test_*.py"]
