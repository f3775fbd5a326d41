"""What Jinja2, as transformers sets it up, makes of a chat template: `python -m llmc.compiler.template_reference`.

A process of its own with limits, because a template comes with a downloaded model and Jinja2 counts no steps: one with nested
loops, or `10 ** 10 ** 10`, would keep the compile for ever. Nothing but the text comes back.

Standard input: {"template", "special": {name: text}, "probes": [[messages, add_generation_prompt], ...], "cpu_s"} as JSON.
Standard output: a list with each probe's text, null where the template raised.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from llmc.errors import InternalError, UnsupportedModel

CPU_S = 20  # the import takes 1; a real template, milliseconds
MEMORY_BYTES = 4 << 30
_WALL_S = 600  # a machine this busy is broken

Probe = tuple[list[dict[str, Any]], bool]


def reference_texts(template: str, special: Mapping[str, str], probes: Sequence[Probe], *, cpu_s: int = CPU_S) -> list[str | None]:
    """Render every probe in a child process; None for one that the template refused.

    Raises:
        UnsupportedModel: the template took more than `cpu_s` seconds of processor time. Wanting more than MEMORY_BYTES is a refusal.
    """
    question = json.dumps({"template": template, "special": dict(special), "probes": probes, "cpu_s": cpu_s})
    command = [sys.executable, "-m", "llmc.compiler.template_reference"]
    try:
        done = subprocess.run(command, input=question.encode(), capture_output=True, timeout=_WALL_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise UnsupportedModel(f"the chat template was not rendered within {_WALL_S} s; give the model another one") from error
    if done.returncode < 0:  # by a signal: SIGXCPU, or SIGKILL a second later
        raise UnsupportedModel(
            f"the chat template did not render a conversation of three messages within {cpu_s} s of processor time, "
            "where real ones take milliseconds; give the model another one"
        )
    if done.returncode != 0:
        raise InternalError(f"rendering the chat template failed: {done.stderr.decode(errors='replace')[-500:]}; please report this")
    texts: list[str | None] = json.loads(done.stdout)
    return texts


def _render(template: str, special: Mapping[str, str], messages: list[dict[str, Any]], prompt: bool) -> str | None:
    from transformers.utils.chat_template_utils import render_jinja_template

    values: dict[str, Any] = dict(special)
    try:
        result: Any = render_jinja_template(conversations=[messages], chat_template=template, add_generation_prompt=prompt, **values)
    except Exception:  # a template's expressions fail as Python's do: TypeError, OverflowError, MemoryError
        return None
    return str(result[0][0])  # (texts, generation spans)


def _main() -> None:
    import transformers.utils.chat_template_utils  # noqa: F401  before the limit on memory, which is the template's alone

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    question = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (question["cpu_s"], question["cpu_s"] + 1))
    texts = [_render(question["template"], question["special"], *probe) for probe in question["probes"]]
    sys.stdout.write(json.dumps(texts))


if __name__ == "__main__":
    _main()
