"""A chat request on its way: checked, rendered, encoded, submitted. What the chat-like APIs share."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from starlette.requests import Request

from llmc.errors import RequestRejected
from llmc.runtime.server import sse
from llmc.runtime.server.chat_prompt import chat_prompt
from llmc.runtime.server.chat_reply import ChatReply, chat_replies
from llmc.runtime.server.errors import name_fields
from llmc.runtime.server.front import Front
from llmc.runtime.server.generation import Generation, check_task
from llmc.runtime.server.sampling import bad_word_ids, sampling_params, truncated
from llmc.runtime.server.schemas import ChatCompletionRequest
from llmc.runtime.server.structured import structured_field
from llmc.runtime.server.tool_choice import check_tools, forced_calls


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRun:
    """A submitted chat. Its generation must be closed in the end, whatever happens."""

    generation: Generation
    replies: list[ChatReply]  # one per choice
    prompt: list[int]


async def start_chat(front: Front, request: Request, body: ChatCompletionRequest) -> ChatRun:
    """Check the request and submit it.

    Raises:
        RequestRejected: naming the field.
    """
    check_task(front, pool=False)
    lora = front.check_model(body.model)
    _check_fields(body)
    check_tools(front, body)
    forced = forced_calls(body)
    name_fields(
        request.scope,
        prompt="messages",
        max_tokens="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        logprobs="top_logprobs",
        structured_outputs="tools" if forced is not None else structured_field(body),
    )
    rendered = await chat_prompt(front, body)
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    (prompt,) = truncated(front, body, [rendered.token_ids], max_tokens)
    sampling = sampling_params(
        front,
        body,
        [prompt],
        max_tokens=max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        bad_words=await bad_word_ids(front, body),
    )
    if forced is not None:
        if sampling.structured_outputs is not None:
            raise RequestRejected("tool_choice forces a call, so the output cannot have another form too", param="tool_choice")
        sampling = msgspec.structs.replace(sampling, structured_outputs=forced)
    replies = chat_replies(front, body, rendered, formed=sampling.structured_outputs is not None)
    generation = Generation(
        front,
        request,
        [prompt],
        sampling,
        priority=body.priority or 0,
        cache_salt=body.cache_salt,
        shown_special=front.model.reply_marks,
        lora=lora,
    )
    return ChatRun(generation=generation, replies=replies, prompt=prompt)


def _check_fields(body: ChatCompletionRequest) -> None:
    if body.top_logprobs and not body.logprobs:
        raise RequestRejected("top_logprobs needs logprobs to be true", param="top_logprobs")
    if body.max_tokens == 0:
        raise RequestRejected("max_tokens must be at least 1", param="max_tokens")
    sse.check_options(body)
    if body.echo and body.messages[-1].role != "assistant":
        raise RequestRejected("echo repeats the last message, which must then be the assistant's", param="echo")
