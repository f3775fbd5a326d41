"""Record the picture in the README: run the commands for real in a terminal, draw what they printed as SVG.

python docs/images/record.py        writes docs/images/demo.svg
"""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[2]
WIDTH, HEIGHT = 104, 50


def in_terminal(command: list[str], cwd: Path) -> str:
    """Run a command in a pseudo-terminal of WIDTH columns; returns what it printed last on each line."""
    leader, follower = pty.openpty()
    env = {**os.environ, "COLUMNS": str(WIDTH), "LINES": str(HEIGHT), "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdout=follower, stderr=subprocess.DEVNULL, cwd=cwd, env=env)
    os.close(follower)
    output = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:
            break
        if not piece:
            break
        output += piece
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    os.close(leader)
    return output.decode().replace("\r\n", "\n")


def chat(url: str, question: str) -> str:
    """One chat answer."""
    body = {"model": "demo_model", "messages": [{"role": "user", "content": question}], "max_tokens": 60}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


def main() -> None:
    llmc = str(Path(sys.executable).parent / "llmc")
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLMC_CACHE_DIR"] = str(Path(folder) / "cache")
        cwd = Path(folder) / "work"
        cwd.mkdir()
        (cwd / "demo_model").symlink_to(ROOT / "examples" / "demo_model")
        console.print(Text.from_markup("[bold green]$[/] llmc compile demo_model -O2 -o artifact"))
        console.print(Text.from_ansi(in_terminal([llmc, "compile", "demo_model", "-O2", "-o", "artifact"], cwd).rstrip()))
        console.print(Text.from_markup("\n[bold green]$[/] llmc serve artifact &"))
        server = subprocess.Popen(
            [llmc, "serve", "artifact", "--port", "0"], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            assert server.stdout is not None
            lines = iter(server.stdout.readline, "")
            ready = next(line.strip() for line in lines if line.startswith("llmc ready"))
            threading.Thread(target=lambda: [None for _ in lines], daemon=True).start()  # keeps the pipe empty
            console.print(Text(ready))
            console.print(
                Text.from_markup(
                    "\n[bold green]$[/] curl -s $URL/v1/chat/completions -d '{... \"What does textwrap.dedent do?\"}' | jq ..."
                )
            )
            console.print(Text(chat(ready.split()[3], "What does textwrap.dedent do?")))
        finally:
            server.terminate()
            server.wait()
    svg = console.export_svg(title="llmc", font_aspect_ratio=0.6)
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # no picture of ours fetches a font
    svg = svg.replace("Fira Code", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono")
    (Path(__file__).parent / "demo.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
