"""The stand-in for libcuda, compiled once per test run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cuda.stand_in import StandIn, build
from tests.cuda.stand_in_server import KernelServer
from tests.cuda.toy_plans import RUN


@pytest.fixture(scope="session")
def libcuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """libcuda.so.1 in a folder of its own, which LD_LIBRARY_PATH may name."""
    return build(tmp_path_factory.mktemp("libcuda"))


@pytest.fixture
def toy_server(tmp_path: Path) -> Iterator[KernelServer]:
    """The toy program's kernels."""
    server = KernelServer(tmp_path, RUN)
    yield server
    server.close()


@pytest.fixture
def stand_in(libcuda: Path, tmp_path: Path, toy_server: KernelServer) -> Callable[..., StandIn]:
    """Makes a stand-in that runs the toy program, with knobs set."""

    def make(**knobs: int) -> StandIn:
        made = StandIn(libcuda, tmp_path, toy_server.path)
        made.set(**knobs)
        return made

    return make
