"""minijinja renders what jinja2 renders, in the environment transformers gives templates, and cannot be made to hang."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmc.errors import ArtifactError, RequestRejected
from llmc.runtime.text import ChatTemplate, chat_template
from tests.server.tiny_tokenizers import CHATML

LLAMA2_LIKE = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{% set system_message = messages[0]['content'] %}
{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}
{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if loop.index0 == 0 and system_message != false %}
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{% endfor %}"""

TOOLS_LIKE = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- else %}
    {%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

MACRO_LIKE = """{%- macro turn(role, text) -%}
<|{{ role }}|>
{{ text | trim }}
{%- endmacro -%}
{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now("%Y") %}{% endif %}Year {{ date_string }}
{% for message in messages if message.role != 'system' %}
  {% if message.role == 'nobody' %}{% continue %}{% endif %}
{{ turn(message.role, message.content) }}{{ "," if not loop.last }}
{% endfor %}
{%- generation %}
tail {{ messages | map(attribute='role') | list | tojson }} {{ {'b': 1.5, 'a': [none, true]} | tojson(indent=2) }}
{% endgeneration %}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ messages[-1].content[:3] | upper }} {{ unknown }}|{{ none }}|{{ 1 == 1.0 }}
"""

TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2_LIKE, "tools": TOOLS_LIKE, "macros": MACRO_LIKE}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hello <b>&amp; 'you' \"there\""}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " 你好 😀 \n"}],
    "many": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
        {"role": "user", "content": "{{ 7*7 }} {% for %}"},
        {"role": "assistant", "content": "<think>last</think>c"},
    ],
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def as_transformers_renders(source: str, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    """The environment `apply_chat_template` builds."""

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_inner"), [], [], body).set_lineno(line)

        def _inner(self, caller: Any) -> str:
            return str(caller())

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(source).render(messages=messages, tools=kwargs.pop("tools", None), documents=None, **TOKENS, **kwargs)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_same_text_as_jinja2(template: str, conversation: str, generation_prompt: bool) -> None:
    source, messages = TEMPLATES[template], CONVERSATIONS[conversation]
    ours = ChatTemplate(source, TOKENS).render(messages, generation_prompt)
    assert ours == as_transformers_renders(source, messages, add_generation_prompt=generation_prompt)


def test_same_text_as_jinja2_with_tools_and_variables() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": "<é>"}}}]
    ours = ChatTemplate(TOOLS_LIKE, TOKENS).render(CONVERSATIONS["one"], tools=tools, enable_thinking=False)
    assert ours == as_transformers_renders(TOOLS_LIKE, CONVERSATIONS["one"], add_generation_prompt=True, tools=tools, enable_thinking=False)


def test_message_text_is_never_run_as_a_template() -> None:
    assert "{{ 7*7 }} {% for %}" in ChatTemplate(CHATML, {}).render(CONVERSATIONS["many"])


def test_the_templates_own_refusal_reaches_the_client() -> None:
    with pytest.raises(RequestRejected, match="roles must alternate") as caught:
        ChatTemplate(LLAMA2_LIKE, TOKENS).render([{"role": "assistant", "content": "first"}])
    assert caught.value.status == 400 and caught.value.param == "messages"


def test_errors_do_not_show_the_prompt() -> None:
    with pytest.raises(RequestRejected) as caught:
        ChatTemplate("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", {}).render([{"role": "user", "content": "my secret"}])
    assert "secret" not in str(caught.value)


def test_an_endless_template_runs_out_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "FUEL", 100_000)
    source = "{% for a in range(9999) %}{% for b in range(9999) %}{{ messages[0].content }}{% endfor %}{% endfor %}"
    with pytest.raises(RequestRejected, match="too many steps"):
        ChatTemplate(source, {}).render(CONVERSATIONS["one"])


def test_a_template_minijinja_cannot_read_is_refused() -> None:
    with pytest.raises(ArtifactError, match="line 2"):
        ChatTemplate("a\n{% nonsense %}", {})
