from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.end_to_end.workshop import Workshop

pytest.register_assert_rewrite("tests.end_to_end.served")  # its assertions count also under python -O


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Models and artifacts, each made once per test run: workers share the compile cache."""
    from tests.end_to_end.workshop import Workshop  # torch and transformers, for the tests that want them

    return Workshop(tmp_path_factory.mktemp("workshop"))
