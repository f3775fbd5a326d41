"""What clients may send. Every field has a bound (tests/server/test_schemas.py walks the models), unknown ones are refused.

Fields OpenAI or vLLM know and this server has not got yet stand in `NOT_BUILT`: they are refused by name with the reason,
unless null or a value that asks for nothing (`ASKS_NOTHING`), and never ignored. `null` always means "as if absent".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from pydantic import BaseModel, ConfigDict, Discriminator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, Tag, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic.types import FailFast as _FailFast
from pydantic_core import PydanticCustomError, core_schema

MAX_TEXT_CHARS = 4 << 20
MAX_PROMPTS = 1024
MAX_PROMPT_TOKENS = 1 << 20
MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_TOKEN_ID = 2**31 - 1
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKENS = 1024
MAX_BIASES = 1024
MAX_BAD_WORDS = 256  # each is looked for at every step
MAX_TEMPLATE_VARIABLES = 32
MAX_GRAMMAR_CHARS = 128 * 1024  # of a schema, a regular expression, a grammar
MAX_CHOICES = 4096
MAX_TOOLS = 512
MAX_TOOL_CALLS = 256  # of one message
MAX_JSON_VALUES = 50_000  # of one free JSON object


class FailFast(_FailFast):
    """pydantic's, with the hash that a member of a union needs."""

    __hash__ = object.__hash__


TokenId = Annotated[int, Ge(0), Le(MAX_TOKEN_ID)]
Text = Annotated[str, MaxLen(MAX_TEXT_CHARS)]
# FailFast: a list of a million wrong entries gives one error, not a million.
TokenIds = Annotated[list[TokenId], MinLen(1), MaxLen(MAX_PROMPT_TOKENS), FailFast()]
ModelName = Annotated[str, MinLen(1), MaxLen(512)]
NumTop = Annotated[int, Ge(-1), Le(MAX_TOKEN_ID)]  # of log-probabilities; -1: of the whole vocabulary
StopText = Annotated[str, MinLen(1), MaxLen(MAX_STOP_CHARS)]


def _prompt_kind(value: Any) -> str:
    """Told by the first entry: a list of a million is not tried four times over."""
    if isinstance(value, list):
        first = value[0] if value else None
        if isinstance(first, str):
            return "#texts"
        return "#token_lists" if isinstance(first, list) else "#tokens"
    return "#text"


BY_PROMPT_KIND = Discriminator(_prompt_kind)  # of a union tagged #text, #texts, #tokens, #token_lists
TEXT_OR_LIST = Discriminator(lambda value: "#list" if isinstance(value, list) else "#text")
WORD_OR_TOOL = Discriminator(lambda value: "#tool" if isinstance(value, dict) else "#word")

Prompt = Annotated[
    Annotated[Text, Tag("#text")]
    | Annotated[list[Text], MinLen(1), MaxLen(MAX_PROMPTS), FailFast(), Tag("#texts")]
    | Annotated[TokenIds, Tag("#tokens")]
    | Annotated[list[TokenIds], MinLen(1), MaxLen(MAX_PROMPTS), FailFast(), Tag("#token_lists")],
    BY_PROMPT_KIND,
]


Stops = Annotated[Annotated[StopText, Tag("#text")] | Annotated[list[StopText], MaxLen(MAX_STOPS), FailFast(), Tag("#list")], TEXT_OR_LIST]
# JSON has only string keys; 10 digits hold every token id.
BiasKey = Annotated[str, MinLen(1), MaxLen(10), Field(pattern=r"^[0-9]+$")]


BadWord = Annotated[str, MinLen(1), MaxLen(256)]


ToolName = Annotated[str, MinLen(1), MaxLen(256), Field(pattern=r"^[A-Za-z0-9_.:/-]+$")]


@dataclass(frozen=True)
class BoundedJson:
    """Metadata of a field that holds any JSON: how many values may be in it, at all depths. Depth is bounded by the parser."""

    max_values: int = MAX_JSON_VALUES

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "x-max-values": self.max_values}

    def _check(self, value: Any) -> Any:
        level, count = [value], 0
        while level:
            count += len(level)
            if count > self.max_values:
                raise PydanticCustomError("too_many_values", f"at most {self.max_values} JSON values are accepted here")
            level = [inner for item in level for inner in _within(item)]
        return value


def _within(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


JsonObject = Annotated[dict[str, Any], BoundedJson()]


class RequestModel(BaseModel):
    """Base of every request: strict types, finite numbers, no unknown fields."""

    # defer_build: a model is compiled when it is first used; compiling all of them took 50 ms of every start
    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), hide_input_in_errors=True, defer_build=True
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        """`null` means "as if absent", at every depth, as does a value that asks for nothing of what is not built; a null under a name
        nobody knows is still refused."""
        if not isinstance(value, dict) or (None not in value.values() and ASKS_NOTHING.keys().isdisjoint(value)):
            return value
        return {k: v for k, v in value.items() if not (v is None if k in cls.model_fields else k in NOT_BUILT and is_absent(k, v))}


class StreamOptions(RequestModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class TextFormat(RequestModel):
    type: Literal["text"]


class JsonObjectFormat(RequestModel):
    type: Literal["json_object"]


class NamedSchema(RequestModel):
    """A JSON schema under a name. It is always kept to, so `strict` changes nothing."""

    name: Annotated[str, MinLen(1), MaxLen(256)]
    description: Annotated[str, MaxLen(MAX_GRAMMAR_CHARS)] | None = None
    schema_: Annotated[JsonObject, Field(alias="schema")]
    strict: bool | None = None


class JsonSchemaFormat(RequestModel):
    type: Literal["json_schema"]
    json_schema: NamedSchema


def _format_kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"#{kind}" if kind in ("json_object", "json_schema") else "#text"


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("#text")]
    | Annotated[JsonObjectFormat, Tag("#json_object")]
    | Annotated[JsonSchemaFormat, Tag("#json_schema")],
    Discriminator(_format_kind),
]
GrammarText = Annotated[str, MinLen(1), MaxLen(MAX_GRAMMAR_CHARS)]
SchemaOrText = Annotated[
    Annotated[JsonObject, Tag("#object")] | Annotated[GrammarText, Tag("#text")],
    Discriminator(lambda value: "#object" if isinstance(value, dict) else "#text"),
]


class StructuredOutputs(RequestModel):
    """vLLM's; exactly one field is given."""

    json_: Annotated[SchemaOrText | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: GrammarText | None = None
    choice: Annotated[list[GrammarText], MinLen(1), MaxLen(MAX_CHOICES), FailFast()] | None = None
    grammar: GrammarText | None = None


class SamplingFields(RequestModel):
    """Fields completions and chat share."""

    model: ModelName | None = None
    n: Annotated[int, Ge(1), Le(128)] | None = None
    temperature: Annotated[float, Ge(0), Le(100)] | None = None
    top_p: Annotated[float, Gt(0), Le(1)] | None = None
    top_k: Annotated[int, Ge(-1), Le(MAX_TOKEN_ID)] | None = None
    min_p: Annotated[float, Ge(0), Le(1)] | None = None
    presence_penalty: Annotated[float, Ge(-2), Le(2)] | None = None
    frequency_penalty: Annotated[float, Ge(-2), Le(2)] | None = None
    repetition_penalty: Annotated[float, Gt(0), Le(1000)] | None = None
    logit_bias: Annotated[dict[BiasKey, Annotated[float, Ge(-100), Le(100)]], MaxLen(MAX_BIASES)] | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Annotated[list[BadWord], MaxLen(MAX_BAD_WORDS), FailFast()] | None = None
    seed: Annotated[int, Ge(-(2**63)), Le(2**63 - 1)] | None = None
    max_tokens: Annotated[int, Ge(0), Le(MAX_TOKEN_ID)] | None = None
    min_tokens: Annotated[int, Ge(0), Le(MAX_TOKEN_ID)] | None = None
    stop: Stops | None = None
    stop_token_ids: Annotated[list[TokenId], MaxLen(MAX_STOP_TOKENS), FailFast()] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: NumTop | None = None
    truncate_prompt_tokens: Annotated[int, Ge(-1), Le(MAX_PROMPT_TOKENS)] | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_metrics: bool | None = None
    cache_salt: Annotated[str, MinLen(1), MaxLen(1024)] | None = None
    priority: Annotated[int, Ge(-(2**31)), Le(2**31 - 1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, MaxLen(512)] | None = None
    safety_identifier: Annotated[str, MaxLen(512)] | None = None
    prompt_cache_key: Annotated[str, MaxLen(512)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None


class CompletionRequest(SamplingFields):
    prompt: Prompt
    echo: bool | None = None
    logprobs: NumTop | None = None


class TextPart(RequestModel):
    type: Literal["text"]
    text: Text


Content = Annotated[Annotated[Text, Tag("#text")] | Annotated[list[TextPart], MaxLen(MAX_PARTS), FailFast(), Tag("#list")], TEXT_OR_LIST]


class FunctionCall(RequestModel):
    """A call of an earlier turn; `arguments` is a JSON object, as text."""

    name: ToolName
    arguments: Text | None = None


class ToolCall(RequestModel):
    id: Annotated[str, MinLen(1), MaxLen(256)] | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class ChatMessage(RequestModel):
    role: Annotated[str, MinLen(1), MaxLen(64)]
    content: Content | None = None
    name: Annotated[str, MaxLen(256)] | None = None
    tool_calls: Annotated[list[ToolCall], MaxLen(MAX_TOOL_CALLS), FailFast()] | None = None
    tool_call_id: Annotated[str, MinLen(1), MaxLen(256)] | None = None
    reasoning: Text | None = None
    reasoning_content: Text | None = None
    refusal: Text | None = None
    annotations: Annotated[list[JsonObject], MaxLen(MAX_PARTS), FailFast()] | None = None  # of an earlier answer; no template reads them


class FunctionDefinition(RequestModel):
    name: ToolName
    description: Text | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(RequestModel):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(RequestModel):
    name: ToolName


class NamedTool(RequestModel):
    type: Literal["function"]
    function: FunctionName


Tools = Annotated[list[Tool], MaxLen(MAX_TOOLS), FailFast()]
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("#word")] | Annotated[NamedTool, Tag("#tool")],
    WORD_OR_TOOL,
]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


Messages = Annotated[list[ChatMessage], MinLen(1), MaxLen(MAX_MESSAGES), FailFast()]


Scalar = (
    bool
    | Annotated[int, Ge(-(2**53)), Le(2**53)]
    | Annotated[float, Ge(-1e300), Le(1e300)]
    | Annotated[str, MaxLen(4096)]
    | Annotated[list[Annotated[str, MaxLen(4096)]], MaxLen(64), FailFast()]
    | None
)
TemplateVariables = Annotated[dict[Annotated[str, MinLen(1), MaxLen(64)], Scalar], MaxLen(MAX_TEMPLATE_VARIABLES)]


class ChatCompletionRequest(SamplingFields):
    messages: Messages
    max_completion_tokens: Annotated[int, Ge(1), Le(MAX_TOKEN_ID)] | None = None
    logprobs: bool | None = None
    top_logprobs: NumTop | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: bool | None = None
    echo: bool | None = None


class TokenizeRequest(RequestModel):
    """Either `prompt` or `messages`."""

    model: ModelName | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    tools: Tools | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(RequestModel):
    model: ModelName | None = None
    tokens: Annotated[list[TokenId], MaxLen(MAX_PROMPT_TOKENS), FailFast()]


RESPONSE_FORMATS = "only the types text, json_object and json_schema are accepted"
_GUIDED = "vLLM replaced it; use structured_outputs"
NOT_BUILT: dict[str, str] = {
    "best_of": "only `n` samples are drawn; use n",
    "dimensions": "vectors have the model's own size; leave it out",
    "suffix": "inserting text between a prompt and a suffix is not built yet",
    "functions": "OpenAI replaced it by tools; use tools",
    "function_call": "OpenAI replaced it by tool_choice and tool_calls; use those",
    "guided_json": f'{_GUIDED}: {{"json": ...}}',
    "guided_regex": f'{_GUIDED}: {{"regex": ...}}',
    "guided_choice": f'{_GUIDED}: {{"choice": ...}}',
    "guided_grammar": f'{_GUIDED}: {{"grammar": ...}}',
    "guided_decoding_backend": "grammars are followed by llguidance alone; leave it out",
    "guided_whitespace_pattern": "white space in JSON is up to the model; leave it out",
    "whitespace_pattern": "white space in JSON is up to the model; leave it out",
    "disable_any_whitespace": "white space in JSON is up to the model; leave it out",
    "disable_additional_properties": "not built; say additionalProperties false in the schema",
    "disable_fallback": "grammars are followed by llguidance alone; leave it out",
    "structural_tag": "not built; use json, regex, choice or grammar",
    "chat_template": "the chat template is fixed in the artifact; its operator may change it with --chat-template",
    "documents": "not built yet",
    "use_beam_search": "beam search is not built; use n",
    "length_penalty": "beam search is not built",
    "early_stopping": "beam search is not built",
    "spaces_between_special_tokens": "not built yet",
    "modalities": "this server is for text",
    "audio": "this server is for text",
    "prediction": "not built yet",
    "web_search_options": "nothing is fetched for a client",
    "store": "nothing is stored; leave it out",
    "metadata": "nothing is stored; leave it out",
    "service_tier": "there are no tiers here; use priority",
    "request_id": "request ids are made by the server; send X-Request-Id to have one echoed",
    "kv_transfer_params": "not built",
    "logits_processors": "code from a request is never run",
    "verbosity": "no model here is trained on it; say in the prompt how long the answer is to be",
    "mm_processor_kwargs": "this server is for text",
    "media_io_kwargs": "this server is for text",
    "vllm_xargs": "it is for vLLM's plugins, and there are none here",
    "background": "nothing is stored, so there would be no answer to come back for; leave it out",
    "previous_response_id": "nothing is stored; send the whole conversation as input",
    "conversation": "nothing is stored; send the whole conversation as input",
    "include": "there is nothing beside the answer to be included; leave it out",
    "max_tool_calls": "no tool is called here; count the calls where they are made",
}
# Values of those fields that ask for nothing, as clients that write out their defaults send them.
ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none",),
    "disable_any_whitespace": (False,),
    "disable_additional_properties": (False,),
    "disable_fallback": (False,),
    "documents": ([],),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "spaces_between_special_tokens": (True,),
    "modalities": (["text"],),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "logits_processors": ([],),
    "verbosity": ("medium",),
    "background": (False,),
    "include": ([],),
}


def is_absent(name: str, value: Any) -> bool:
    """Whether a field that is not built might as well have been left out."""
    # equal is not enough: 1 equals true
    return value is None or any(
        value == nothing and (type(value) is bool) == (type(nothing) is bool) for nothing in ASKS_NOTHING.get(name, ())
    )
