"""llmc: compile a language model ahead of time, run what was compiled.

    import llmc

    with llmc.LLM("artifact/") as llm:
        print(llm.generate("def fibonacci(n):", llmc.SamplingParams(max_tokens=64))[0].outputs[0].text)

Importing this package imports nothing else; each name below is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmc.errors import ArtifactError, ConfigError, InternalError, LlmcError, PassError, RequestRejected, UnsupportedModel
    from llmc.runtime.llm import LLM
    from llmc.runtime.lora.request import LoRARequest
    from llmc.runtime.messages import SamplingParams, StructuredOutputsParams
    from llmc.runtime.outputs import CompletionOutput, Logprob, RequestOutput

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "ArtifactError",
    "CompletionOutput",
    "ConfigError",
    "InternalError",
    "LlmcError",
    "LoRARequest",
    "Logprob",
    "PassError",
    "RequestOutput",
    "RequestRejected",
    "SamplingParams",
    "StructuredOutputsParams",
    "UnsupportedModel",
    "__version__",
]

_HOME = {
    "LLM": "llmc.runtime.llm",
    "LoRARequest": "llmc.runtime.lora.request",
    "SamplingParams": "llmc.runtime.messages",
    "StructuredOutputsParams": "llmc.runtime.messages",
    "CompletionOutput": "llmc.runtime.outputs",
    "Logprob": "llmc.runtime.outputs",
    "RequestOutput": "llmc.runtime.outputs",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'llmc' has no attribute {name!r}")
    value = getattr(import_module(_HOME.get(name, "llmc.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
