"""Tests of `--backend tvm`. They need the extra of that name and are skipped with the reason where it is not installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.end_to_end.workshop import Workshop

pytest.register_assert_rewrite("tests.end_to_end.served")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Models and artifacts, each made once per test run."""
    if find_spec("tvm") is None:
        pytest.skip("needs the extra tvm: pip install 'llmc[tvm]'")
    return Workshop(tmp_path_factory.mktemp("workshop"))
