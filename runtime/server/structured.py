"""`response_format` and `structured_outputs` become the engine's StructuredOutputsParams."""

from __future__ import annotations

from llmc.errors import RequestRejected
from llmc.runtime.messages import StructuredOutputsParams
from llmc.runtime.server.schemas import JsonObjectFormat, JsonSchemaFormat, SamplingFields


def structured_outputs(request: SamplingFields) -> StructuredOutputsParams | None:
    """What the output must be; None: anything.

    Raises:
        RequestRejected: both fields ask for something.
    """
    wanted, given = _from_format(request), request.structured_outputs
    if given is None:
        return wanted
    if wanted is not None:
        raise RequestRejected("response_format and structured_outputs both say what the output must be; send one", param="response_format")
    return StructuredOutputsParams(
        json=given.json_, json_object=given.json_object, regex=given.regex, choice=given.choice, grammar=given.grammar
    )


def structured_field(request: SamplingFields) -> str:
    """The field that says what the output must be."""
    return "response_format" if _from_format(request) is not None else "structured_outputs"


def _from_format(request: SamplingFields) -> StructuredOutputsParams | None:
    wanted = request.response_format
    if isinstance(wanted, JsonObjectFormat):
        return StructuredOutputsParams(json_object=True)
    if isinstance(wanted, JsonSchemaFormat):
        return StructuredOutputsParams(json=wanted.json_schema.schema_)
    return None
