from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("tests.server.running")  # its assertions count also under python -O

from tests.server.running import RunningServer  # noqa: E402


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """One server for all tests that leave it as they found it."""
    with RunningServer(settings={"max_body_bytes": 200_000, "header_timeout_s": 0.5, "body_timeout_s": 0.5}) as running:
        yield running


@pytest.fixture(autouse=True)
def still_serves(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test the shared server answers a normal request."""
    yield
    if "server" in request.fixturenames:
        assert request.getfixturevalue("server").complete().status_code == 200
