"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from llmc.errors import RequestRejected
from llmc.runtime.sampling_params import check_token_ids
from llmc.runtime.server.answers import json_answer
from llmc.runtime.server.chat_prompt import chat_prompt
from llmc.runtime.server.front import Front
from llmc.runtime.server.parse import parse_body
from llmc.runtime.server.routes import Router
from llmc.runtime.server.schemas import DetokenizeRequest, TokenizeRequest


def tokenize_router(front: Front) -> Router:
    """The routes, bound to this server's parts."""
    router = Router()

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Any:
        body = parse_body(await request.body(), TokenizeRequest)
        front.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestRejected("send either prompt or messages", param="prompt")
        if body.messages is not None:
            tokens = (await chat_prompt(front, body)).token_ids
        else:
            assert body.prompt is not None
            (tokens,) = await front.encode([body.prompt], add_special_tokens=body.add_special_tokens is not False)
        answer: dict[str, Any] = {"count": len(tokens), "max_model_len": front.max_model_len, "tokens": tokens}
        if body.return_token_strs:
            answer["token_strs"] = await front.aside(
                lambda: [front.model.tokenizer.token_text(token) for token in tokens], size=len(tokens)
            )
        return json_answer(answer)

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Any:
        body = parse_body(await request.body(), DetokenizeRequest)
        front.check_model(body.model)
        check_token_ids(body.tokens, vocab_size=front.model.vocab_size, param="tokens")
        text = await front.aside(lambda: front.model.tokenizer.decode(body.tokens, skip_special_tokens=False), size=len(body.tokens))
        return json_answer({"prompt": text})

    if front.settings.enable_tokenizer_info_endpoint:

        @router.get("/tokenizer_info")
        async def tokenizer_info(_request: Request) -> Any:
            """What a tokenizer_config.json holds of this tokenizer, in its names."""
            model = front.model
            added = model.tokenizer.added_tokens()
            return json_answer(
                {
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "model_max_length": front.max_model_len,
                    "vocab_size": model.tokenizer.num_tokens,
                    **model.special_tokens,
                    "added_tokens_decoder": {str(i): {"content": text, "special": special} for i, (text, special) in sorted(added.items())},
                    "chat_template": model.chat_template.source if model.chat_template is not None else None,
                }
            )

    return router
