"""What clients of the endpoints of embedding artifacts may send. Every field has a bound; the rules are those of schemas.py."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Le, MaxLen, MinLen
from pydantic import Tag

from llmc.runtime.server.schemas import BY_PROMPT_KIND, MAX_PROMPT_TOKENS, TEXT_OR_LIST, FailFast, ModelName, RequestModel, Text, TokenIds

MAX_INPUTS = 2048  # as OpenAI has it


Input = Annotated[
    Annotated[Text, Tag("#text")]
    | Annotated[list[Text], MinLen(1), MaxLen(MAX_INPUTS), FailFast(), Tag("#texts")]
    | Annotated[TokenIds, Tag("#tokens")]
    | Annotated[list[TokenIds], MinLen(1), MaxLen(MAX_INPUTS), FailFast(), Tag("#token_lists")],
    BY_PROMPT_KIND,
]
Texts = Annotated[
    Annotated[Text, Tag("#text")] | Annotated[list[Text], MinLen(1), MaxLen(MAX_INPUTS), FailFast(), Tag("#list")],
    TEXT_OR_LIST,
]


class PooledFields(RequestModel):
    """Fields all of them share."""

    model: ModelName | None = None
    truncate_prompt_tokens: Annotated[int, Ge(-1), Le(MAX_PROMPT_TOKENS)] | None = None
    add_special_tokens: bool | None = None
    priority: Annotated[int, Ge(-(2**31)), Le(2**31 - 1)] | None = None
    user: Annotated[str, MaxLen(512)] | None = None


class EmbeddingsRequest(PooledFields):
    input: Input
    encoding_format: Literal["float", "base64"] | None = None


class ScoreRequest(PooledFields):
    """One text against one, one against several, or several in pairs."""

    text_1: Texts
    text_2: Texts


class RerankRequest(PooledFields):
    query: Text
    documents: Annotated[list[Text], MinLen(1), MaxLen(MAX_INPUTS), FailFast()]
    top_n: Annotated[int, Ge(0), Le(MAX_INPUTS)] | None = None  # 0: all
    return_documents: bool | None = None
