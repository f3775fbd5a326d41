"""Ten minutes of mixed traffic: memory stays flat, and everything is returned. LLMC_SOAK_S sets another length."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.reliability.served import Server

pytestmark = pytest.mark.slow


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def traffic(server: Server, seed: int, until: float, faults: list[str]) -> None:
    """Answers of both kinds, errors, and clients that leave, at random."""
    rng = random.Random(seed)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        while time.monotonic() < until:
            prompt = [rng.randrange(400) for _ in range(rng.randrange(1, 60))]
            kind = rng.randrange(6)
            if kind == 0:
                status, expected = client.post("/v1/completions", json={"prompt": prompt, "n": -1}).status_code, {400}
            elif kind == 1:
                stream = server.stream(prompt=prompt, max_tokens=100)
                stream.recv(65536)
                stream.close()
                continue
            elif kind == 2:
                status, expected = client.get(rng.choice(["/metrics", "/load", "/v1/models", "/openapi.json"])).status_code, {200}
            elif kind == 3:
                body = {"messages": [{"role": "user", "content": "word " * rng.randrange(10)}], "max_tokens": 10}
                status, expected = client.post("/v1/chat/completions", json=body).status_code, {200, 429}
            else:
                body = {"prompt": prompt, "max_tokens": rng.randrange(1, 60), "stream": kind == 4, "logprobs": rng.choice([None, 3])}
                status, expected = client.post("/v1/completions", json=body).status_code, {200, 429}
            if status not in expected:
                faults.append(f"kind {kind}: {status}")


def test_memory_is_flat() -> None:
    length_s = float(os.environ.get("LLMC_SOAK_S", "600"))
    with open(os.devnull, "wb") as log, Server(max_queue=64, log=log) as server:
        faults: list[str] = []
        until = time.monotonic() + length_s
        threads = [threading.Thread(target=traffic, args=(server, seed, until, faults)) for seed in range(8)]
        for thread in threads:
            thread.start()
        engine = server.engine_pid()
        time.sleep(length_s * 0.3)
        early = {pid: resident_bytes(pid) for pid in (server.process.pid, engine)}
        for thread in threads:
            thread.join()
        server.await_idle()
        late = {pid: resident_bytes(pid) for pid in early}
        assert faults == []
        assert server.engine_pid() == engine, "the engine was not restarted"
        for pid in early:
            assert late[pid] < early[pid] * 1.05 + 4_000_000, (early, late)
