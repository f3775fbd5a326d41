"""`response_format` and `structured_outputs` become the engine's StructuredOutputsParams."""

from __future__ import annotations

from llmc.errors import RequestRejected
from llmc.runtime.messages import StructuredOutputsParams
from llmc.runtime.server.schemas import JsonObjectFormat, JsonSchemaFormat, SamplingFields


def structured_outputs(request: SamplingFields) -> StructuredOutputsParams | None:
    """What the output must be; None: anything.

    Raises:
        RequestRejected: both fields ask for something, or what they ask is too large or too deep.
    """
    wanted, param = _from_format(request), "response_format"
    given = request.structured_outputs
    if given is not None:
        if wanted is not None:
            raise RequestRejected("response_format and structured_outputs both say what the output must be; send one", param=param)
        wanted, param = (
            StructuredOutputsParams(
                json=given.json_, json_object=given.json_object, regex=given.regex, choice=given.choice, grammar=given.grammar
            ),
            "structured_outputs",
        )
    if wanted is None:
        return None
    from llmc.runtime.grammar.spec import grammar_of  # most requests ask for nothing

    try:
        grammar_of(wanted)
    except RequestRejected as error:
        raise RequestRejected(str(error), param=param, code=error.code) from None
    return wanted


def _from_format(request: SamplingFields) -> StructuredOutputsParams | None:
    wanted = request.response_format
    if isinstance(wanted, JsonObjectFormat):
        return StructuredOutputsParams(json_object=True)
    if isinstance(wanted, JsonSchemaFormat):
        return StructuredOutputsParams(json=wanted.json_schema.schema_)
    return None
