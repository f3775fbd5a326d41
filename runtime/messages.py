"""What crosses between the front process, which knows text, and the engine, which knows token ids.

msgspec structs, tagged unions, no pickle. The engine's input is a `EngineRequest`, its output a list of `EngineEvent`.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from llmc.errors import RequestRejected
from llmc.runtime.lora.modules import AdapterPath

FinishReason = Literal["stop", "length", "abort", "error"]


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of every message; the tag is the class name."""


class StructuredOutputsParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an output must be; exactly one field is given. Checked by `runtime.grammar.spec.grammar_of`."""

    json: dict[str, Any] | str | None = None  # a JSON schema
    json_object: bool | None = None  # any JSON object
    regex: str | None = None  # matched by the whole output
    choice: list[str] | None = None
    grammar: str | None = None  # Lark, or GBNF as in llama.cpp


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to choose tokens, named as vLLM's and OpenAI's users know them. Checked by `runtime.sampling_params.check`.

    Everything the engine needs is here in token ids; what needs text (`stop`) is done where text is known.
    """

    n: int = 1
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1 = all
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words_token_ids: list[list[int]] | None = None
    seed: int | None = None
    max_tokens: int | None = 16  # None: up to max_model_len
    min_tokens: int = 0
    stop: list[str] | None = None  # matched by the text side, which aborts the sequence
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None  # None = none; 0 = the chosen token's only; n = top n too
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None


class GenerateRequest(_Message, frozen=True):
    """One sequence to generate. A request with n > 1 is n of these, made by the front (they share the prefix cache)."""

    request_id: str  # made by us, never by the client
    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0  # lower runs earlier, policy "priority"
    arrival_time: float = 0.0  # time.monotonic() of acceptance
    cache_salt: str = ""  # tenant part of the prefix-cache key
    lora: str | None = None  # the adapter it runs with; None: the model itself
    pool: bool = False  # wants the prompt's vector and no token, from an artifact that embeds


class AbortRequest(_Message, frozen=True):
    """Stop a sequence and free its blocks within one step. Unknown ids are ignored: it may just have finished."""

    request_id: str
    reason: FinishReason = "abort"


class AdapterChange(_Message, frozen=True):
    """Read a LoRA adapter, or take no more requests for one. Answered by one TokenEvent: finish_reason "stop", or "error" and why."""

    request_id: str
    load: AdapterPath | None = None
    unload: str | None = None


class Shutdown(_Message, frozen=True):
    """Finish nothing more and exit."""


EngineRequest = GenerateRequest | AbortRequest | AdapterChange | Shutdown


class TokenLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log-probabilities at one position: the chosen token's, and the top ones asked for, highest first."""

    token_id: int
    logprob: float
    rank: int  # 1 = most likely
    top: list[tuple[int, float]]  # (token id, logprob)


class TokenEvent(_Message, frozen=True, gc=False, omit_defaults=True):  # one per sequence and step; never part of a cycle
    """New tokens of one sequence; the last event of a sequence has a finish_reason. Every accepted request ends exactly once."""

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None  # one per token id, when asked for
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # sent once, with the first token
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the eos or stop token that ended it
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache; told with the first token
    scheduled_at: float = 0.0  # time.monotonic() when it first left the queue; told with the first token
    embedding: bytes | None = None  # float32, little-endian [hidden], of a request that pools
    error: str | None = None  # with finish_reason "error": one sentence for the client
    error_status: int = 500
    error_param: str | None = None  # the field of the request that is at fault, in the words of SamplingParams and GenerateRequest
    error_code: str | None = None


def refusal(request_id: str, error: RequestRejected) -> TokenEvent:
    """The only event of a request that cannot run."""
    return TokenEvent(
        request_id=request_id,
        token_ids=[],
        finish_reason="error",
        error=str(error),
        error_status=error.status,
        error_param=error.param,
        error_code=error.code,
    )


class EngineReady(_Message, frozen=True):
    """Weights verified, canaries passed, first step possible."""

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    startup_ms: dict[str, float]  # stage -> milliseconds, in order
    max_loras: int = 0  # adapters that one step may use; 0: serves none


class EngineFailed(_Message, frozen=True):
    """The engine could not start, or cannot go on. `message` is one sentence."""

    message: str


class EngineStats(_Message, frozen=True):
    """Sent after each step that changed something, at most every 100 ms; source of /metrics, /load and readiness."""

    step: int
    time: float  # time.monotonic() of the engine's last progress
    num_running: int
    num_waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    prefix_queries_tokens: int
    prefix_hits_tokens: int
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int
    spec_num_drafts: int = 0  # steps of a sequence that had guesses, with speculative decoding
    spec_draft_tokens: int = 0  # guesses computed
    spec_accepted_tokens: int = 0  # of those, right ones
    steps_sampled_on_device: int = 0  # on a GPU: steps whose tokens were chosen there
    steps_sampled_on_host: int = 0  # on a GPU: steps whose logits came to the host, because no plan holds what was asked for
    running_loras: list[str] = []  # adapters that running sequences use
    waiting_loras: list[str] = []
    steps_ahead: int = 0  # of those sampled on the device, begun before the host knew the tokens of the step before


EngineEvent = TokenEvent | EngineReady | EngineFailed | EngineStats
