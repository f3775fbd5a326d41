"""The chat template: messages to the prompt text, rendered by minijinja under a step limit.

The template is fixed in the artifact; a request brings only messages. minijinja runs no Python and counts instructions
(fuel), so a message cannot make rendering endless. The environment is the one model authors write for: Hugging Face
configures jinja2 with trim_blocks, lstrip_blocks, loop controls, `raise_exception`, `strftime_now` and a `tojson` that
does not escape HTML. Whether both engines agree on a model's template is checked at compile time and recorded.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any

import minijinja

from llmc.errors import ArtifactError, RequestRejected

FUEL = 4_000_000  # instructions; a 1,000-message conversation takes about 100,000
MAX_RENDERED_CHARS = 32 * 1024 * 1024
_MAX_INDENT = 32
# Marks assistant text for training; it prints nothing, and minijinja does not know the tag.
_GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
_NAME = "chat_template"
# What the server or the engine gives a template; special tokens (bos_token, ...) too. A request never sets these.
_RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "raise_exception", "strftime_now", "tojson"}
    | {"namespace", "range", "dict", "loop", "self", "super", "caller", "debug", "lipsum", "cycler", "joiner", "chat_template"}
)


class _Raised(Exception):
    """The template called raise_exception."""


def _raise_exception(message: object = "") -> None:
    raise _Raised(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,  # whatever the template holds
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and not 0 <= indent <= _MAX_INDENT:
        raise _Raised(f"tojson indent must be 0 to {_MAX_INDENT}, found {indent}")
    pair = (str(separators[0]), str(separators[1])) if separators else None
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)


class ChatTemplate:
    """A compiled chat template. Rendering changes nothing and may run in any thread."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        """Compile.

        Args:
            source: the Jinja source from the artifact.
            special_tokens: bos_token, eos_token, ... as the template sees them.

        Raises:
            ArtifactError: minijinja cannot read the template.
        """
        self._special_tokens = dict(special_tokens)
        # debug off: minijinja's debug errors print the variables, that is the prompt.
        self._environment = minijinja.Environment(debug=False, fuel=FUEL, trim_blocks=True, lstrip_blocks=True)
        self._environment.auto_escape_callback = lambda name: False
        self._environment.add_filter("tojson", _tojson)
        self._environment.add_global("raise_exception", _raise_exception)
        self._environment.add_global("strftime_now", _strftime_now)
        try:
            self._environment.add_template(_NAME, _drop_generation_tags(source))
        except minijinja.TemplateError as error:
            raise ArtifactError(
                f"chat template, line {error.line}: {error.kind}: {(error.detail or error.message)[:200]}; "
                "compile again with a template that minijinja reads, or serve with --chat-template"
            ) from error
        free = self._environment.undeclared_variables_in_template(_NAME)
        # Names the template reads and does not always set itself: what chat_template_kwargs may hold.
        self.variables = frozenset(n for n in free if n not in _RESERVED and n not in self._special_tokens and not n.endswith("_token"))
        self.reads_tools = "tools" in free
        self.source = source

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **kwargs: Any) -> str:
        """The prompt text of a conversation.

        Args:
            messages: dicts with "role" and "content" and what else the template reads.
            add_generation_prompt: open the assistant's turn at the end.
            kwargs: further template variables, from the caller's allow-list.

        Raises:
            RequestRejected: the template refused the messages, failed on them, or took too many steps.
        """
        variables = {"tools": None, "documents": None, **self._special_tokens, **kwargs}
        try:
            text = self._environment.render_template(_NAME, messages=messages, add_generation_prompt=add_generation_prompt, **variables)
        except _Raised as error:
            raise RequestRejected(
                f"the model's chat template refused the messages: {str(error)[:200]}", param="messages", code="chat_template"
            ) from error
        except minijinja.TemplateError as error:
            reason = "it takes too many steps" if "fuel" in error.message else f"{error.kind} in line {error.line}"
            raise RequestRejected(
                f"the model's chat template cannot render these messages: {reason}", param="messages", code="chat_template"
            ) from error
        except (TypeError, ValueError, RecursionError) as error:  # from tojson and strftime_now, over the template's values
            raise RequestRejected(
                f"the model's chat template cannot render these messages: {type(error).__name__}", param="messages", code="chat_template"
            ) from error
        if len(text) > MAX_RENDERED_CHARS:
            raise RequestRejected(
                f"the rendered messages have {len(text)} characters, more than {MAX_RENDERED_CHARS}", param="messages", code="chat_template"
            )
        return text


def _drop_generation_tags(source: str) -> str:
    """Replace `{% generation %}` tags by empty comments, which trim the same white space around them."""

    def as_comment(match: re.Match[str]) -> str:
        tag = match[0]
        return ("{#-" if tag.startswith("{%-") else "{#") + ("-#}" if tag.endswith("-%}") else "#}")

    return _GENERATION_TAG.sub(as_comment, source)
