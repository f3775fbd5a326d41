"""The whole of llmc in one run: compile the bundled model, serve it, chat with it, stop.

make demo
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.table import Table

MODEL = Path(__file__).parent / "demo_model"
QUESTION = "What does textwrap.dedent do?"


def wait_for_ready(server: subprocess.Popen[str]) -> dict[str, object]:
    """Read the server's log up to the line that says it is ready; it carries the url and the start-up times as JSON."""
    assert server.stdout is not None
    for line in server.stdout:
        if '"event":"ready"' in line.replace(" ", ""):
            return dict(json.loads(line))
    raise SystemExit(f"the server ended with status {server.wait()} before it was ready")


def main() -> None:
    console = Console()
    llmc = [sys.executable, "-m", "llmc"]
    with tempfile.TemporaryDirectory(prefix="llmc-demo-") as folder:
        artifact = Path(folder) / "demo"
        subprocess.run([*llmc, "compile", str(MODEL), "-O2", "-o", str(artifact)], check=True)
        server = subprocess.Popen(
            [*llmc, "serve", str(artifact), "--port", "0", "--disable-log-stats"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            ready = wait_for_ready(server)
            client = OpenAI(base_url=f"{ready['url']}/v1", api_key="unused")
            messages = [{"role": "user", "content": QUESTION}]
            model = client.models.list().data[0].id
            completions = client.chat.completions  # the client imports half of itself on first use, which is not the server's time
            sent = time.perf_counter()
            stream = completions.create(
                model=model,
                messages=messages,  # type: ignore[arg-type]
                max_tokens=64,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
            console.print(f"\n[bold]{QUESTION}[/]")
            first = None
            tokens = 0
            for chunk in stream:
                if chunk.usage is not None:
                    tokens = chunk.usage.completion_tokens
                if chunk.choices and chunk.choices[0].delta.content:
                    first = first or time.perf_counter()
                    console.print(chunk.choices[0].delta.content, end="", markup=False, highlight=False)
            done = time.perf_counter()
            console.print("\n")
            table = Table(title="llmc demo", title_justify="left", show_header=False)
            size = sum(p.stat().st_size for p in artifact.rglob("*") if p.is_file())
            level = json.loads((artifact / "manifest.json").read_text())["level"]
            assert first is not None
            table.add_row("process start to ready", f"{ready['total_ms']:.0f} ms")
            for key, milliseconds in ready.items():
                if key.endswith("_ms") and key != "total_ms":
                    table.add_row(f"  {key.removesuffix('_ms')}", f"{milliseconds:.0f} ms")
            table.add_row("time to first token (request)", f"{(first - sent) * 1000:.0f} ms")
            table.add_row("decode", f"{(tokens - 1) / (done - first):.0f} tokens/s")
            table.add_row("artifact", f"{size / 1e6:.1f} MB, -O{level}")
            console.print(table)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=60)


if __name__ == "__main__":
    main()
