"""The server's own OpenAPI description, made when first asked for: from the routes and the models their bodies are checked against."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pydantic.json_schema import models_json_schema
from starlette.routing import BaseRoute

from llmc.runtime.server.routes import DescribedRoute
from llmc.runtime.server.schemas import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from llmc.runtime.server.schemas_adapters import LoadAdapterRequest, UnloadAdapterRequest
from llmc.runtime.server.schemas_embeddings import EmbeddingsRequest, RerankRequest, ScoreRequest
from llmc.runtime.server.schemas_messages import CountTokensRequest, MessagesRequest
from llmc.runtime.server.schemas_responses import ResponsesRequest
from llmc.runtime.server.schemas_weights import WeightsRequest
from llmc.runtime.server.version import installed_version

_BODIES = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/v1/embeddings": EmbeddingsRequest,
    **dict.fromkeys(("/v1/score", "/score"), ScoreRequest),
    **dict.fromkeys(("/v1/rerank", "/v2/rerank", "/rerank"), RerankRequest),
    "/v1/weights": WeightsRequest,
    "/v1/load_lora_adapter": LoadAdapterRequest,
    "/v1/unload_lora_adapter": UnloadAdapterRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_ERROR_STATUSES = ("400", "401", "404", "413", "429", "500", "503")


def describe(routes: Iterable[BaseRoute], root_path: str) -> dict[str, Any]:
    """The OpenAPI document of a server's routes, with request bodies and error answers."""
    document: dict[str, Any] = {"openapi": "3.1.0", "info": {"title": "llmc", "version": installed_version()}, "paths": {}}
    if root_path:
        document["servers"] = [{"url": root_path}, {"url": "/"}]
    for route in routes:
        if isinstance(route, DescribedRoute) and route.include_in_schema:
            document["paths"].setdefault(re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path), {}).update(_operations(route))
    bodies: list[Any] = [(model, "validation") for model in _BODIES.values()]  # pydantic's own type for this is not exported
    _, definitions = models_json_schema(bodies, ref_template="#/components/schemas/{model}")
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(definitions["$defs"])
    schemas["Error"] = {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    }
    error = {"description": "An error.", "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"] |= dict.fromkeys(_ERROR_STATUSES, error)
            if path in _BODIES:
                reference = {"$ref": f"#/components/schemas/{_BODIES[path].__name__}"}
                operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
    return document


def _operations(route: DescribedRoute) -> dict[str, Any]:
    """One operation per method; HEAD goes without saying."""
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in route.param_convertors]
    return {
        method.lower(): {
            "operationId": f"{route.name}_{method.lower()}",
            "summary": route.name.replace("_", " "),
            **({"description": route.about} if route.about else {}),
            **({"parameters": parameters} if parameters else {}),
            "responses": {"200": {"description": "Success."}},
        }
        for method in sorted((route.methods or set()) - {"HEAD"})
    }
