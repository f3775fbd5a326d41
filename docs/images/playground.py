"""Take the pictures of the playground: python docs/images/playground.py ARTIFACT (needs Chromium; run from the repository's root)."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.server.browser import Browser

QUESTION = "What does textwrap.dedent do?"
DONE = "document.querySelector('.message.assistant:last-child .figures') !== null"


def main(artifact: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "llmc", "serve", artifact, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        found = re.search(r"llmc ready at (\S+) ", server.stdout.readline())
        if found is None:
            raise SystemExit(f"the server ended with status {server.wait()}")
        try:
            with Browser() as browser:
                for name, dark in (("light", False), ("dark", True)):
                    browser.open(found[1] + "/", dark=dark, height=640)
                    browser.wait("document.querySelectorAll('#model option').length > 0")
                    browser.value("max_tokens.value = '64'; temperature.value = '0.8'")
                    browser.value("seed.value = '1'; input.focus()")
                    browser.type(QUESTION)
                    browser.wait(DONE)
                    browser.hover(".message.assistant .token:nth-child(6)")
                    browser.wait("!document.getElementById('tip').hidden")
                    browser.picture(Path(__file__).parent / f"playground_{name}.png")
        finally:
            server.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    main(sys.argv[1])
