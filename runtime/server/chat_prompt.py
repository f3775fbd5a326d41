"""A conversation becomes the token ids the model is prompted with, by the artifact's own template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmc.errors import RequestRejected
from llmc.runtime.server.front import Front
from llmc.runtime.server.schemas import ChatMessage, TemplateVariables
from llmc.runtime.text import ChatTemplate


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatPrompt:
    """What the model reads, as text and as tokens."""

    text: str
    token_ids: list[int]


async def chat_prompt(
    front: Front,
    messages: list[ChatMessage],
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    add_special_tokens: bool | None,
    variables: TemplateVariables | None,
) -> ChatPrompt:
    """Render and encode a conversation.

    Args:
        add_generation_prompt: open the assistant's turn at the end; None: unless the final message is continued.
        continue_final_message: leave the last message open, for the model to go on with it.
        add_special_tokens: let the tokenizer add its own too; the template writes them itself, so None means no.
        variables: chat_template_kwargs.

    Raises:
        RequestRejected: there is no template, it refuses the messages, or a variable is not one it reads.
    """
    template = front.model.chat_template
    if template is None:
        raise RequestRejected(
            "this model has no chat template; use /v1/completions, or serve it with --chat-template",
            param="messages",
            code="no_chat_template",
        )
    if continue_final_message and add_generation_prompt:
        raise RequestRejected(
            "continue_final_message goes on with the last message, add_generation_prompt opens a new one; send one of them",
            param="continue_final_message",
        )
    plain = [plain_message(message) for message in messages]
    opened = add_generation_prompt is not False and not continue_final_message
    text = template.render(plain, opened, **allowed_variables(template, variables))
    if continue_final_message:
        text = cut_at_final_message(text, plain[-1]["content"])
    (ids,) = await front.encode([text], add_special_tokens=bool(add_special_tokens))
    return ChatPrompt(text=text, token_ids=ids)


def plain_message(message: ChatMessage) -> dict[str, Any]:
    """A message as templates read it."""
    plain: dict[str, Any] = {"role": message.role, "content": text_of(message)}
    if message.name is not None:
        plain["name"] = message.name
    return plain


def text_of(message: ChatMessage) -> str:
    """The message's text; parts stand on lines of their own."""
    if isinstance(message.content, list):
        return "\n".join(part.text for part in message.content)
    return message.content or ""


def allowed_variables(template: ChatTemplate, variables: TemplateVariables | None) -> dict[str, Any]:
    """chat_template_kwargs, if the template reads each of them and none is the server's own; nulls mean absent."""
    given = {name: value for name, value in (variables or {}).items() if value is not None}
    for name in given:
        if name not in template.variables:
            known = ", ".join(sorted(template.variables)[:20]) or "none"
            raise RequestRejected(
                f"the model's chat template has no variable of this name that a request may set; it has: {known}",
                param="chat_template_kwargs",
                code="invalid_value",
            )
    return given


def cut_at_final_message(text: str, content: str) -> str:
    """The rendered text up to the end of the last message's content, as transformers cuts it.

    Raises:
        RequestRejected: the message is empty, or the template does not show it as it is.
    """
    bare = content.strip()
    start = text.rfind(bare) if bare else -1
    if start < 0:
        raise RequestRejected(
            "continue_final_message needs a last message with text that the chat template shows as it stands",
            param="continue_final_message",
        )
    # Trailing white space belongs to what is continued, unless the template dropped it.
    whole = content.lstrip()
    end = start + (len(whole) if text.startswith(whole, start) else len(bare))
    return text[:end]
