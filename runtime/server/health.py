"""What operators and load balancers ask: health, metrics, load, version, models."""

from __future__ import annotations

from typing import Any

import prometheus_client
from starlette.requests import Request
from starlette.responses import Response

from llmc.errors import RequestRejected
from llmc.runtime.engine_client import EngineState
from llmc.runtime.server.answers import json_answer
from llmc.runtime.server.errors import error_response
from llmc.runtime.server.front import Front
from llmc.runtime.server.logs import log
from llmc.runtime.server.routes import Router
from llmc.runtime.server.version import installed_version

_WHY_NOT = {
    EngineState.LOADING: "the model is being loaded",
    EngineState.RESTARTING: "the engine ended and is being restarted",
    EngineState.SLEEPING: "the server sleeps; POST /wake_up wakes it",
    EngineState.DRAINING: "the server is shutting down",
    EngineState.FAILED: "the engine ended and could not be restarted",
    EngineState.READY: "the engine made no progress lately",
}


def operator_router(front: Front) -> Router:
    """The routes that run no model."""
    router = Router()

    @router.get("/health/live")
    async def live(_request: Request) -> Any:
        """This process answers."""
        return json_answer({"status": "live"})

    @router.get("/health/ready")
    @router.get("/health")
    async def ready(_request: Request) -> Any:
        """A request sent now would be worked on: the engine made progress lately, or is idle and answering."""
        if front.client.is_ready(front.settings.stall_timeout_s):
            return json_answer({"status": "ready"})
        return error_response(_WHY_NOT[front.client.state], status=503, code=f"not_ready_{front.client.state.value}")

    @router.get("/metrics")
    async def metrics(_request: Request) -> Any:
        return Response(front.metrics.text(), headers={"content-type": prometheus_client.CONTENT_TYPE_LATEST})

    @router.get("/load")
    async def load(_request: Request) -> Any:
        """How busy the server is. `server_load` counts open sequences, as vLLM's clients read it."""
        stats = front.client.stats
        return json_answer(
            {
                "server_load": front.client.num_open,
                "num_requests_running": stats.num_running if stats else 0,
                "num_requests_waiting": stats.num_waiting if stats else 0,
                "kv_cache_usage": stats.kv_blocks_used / max(1, stats.kv_blocks_total) if stats else 0.0,
                "state": front.client.state.value,
            }
        )

    @router.get("/version")
    async def version(_request: Request) -> Any:
        return json_answer({"version": installed_version()})

    @router.get("/v1/models")
    async def models(_request: Request) -> Any:
        return json_answer({"object": "list", "data": [_model_card(front, name) for name in (*front.model.names, *front.adapters)]})

    @router.get("/v1/models/{model:path}")
    async def model(request: Request) -> Any:
        model = request.path_params["model"]
        if model not in front.model.names and model not in front.adapters:
            raise RequestRejected("the model does not exist here; GET /v1/models lists what does", status=404, code="model_not_found")
        return json_answer(_model_card(front, model))

    if front.settings.enable_sleep_mode:
        _add_sleep(router, front)
    return router


def _add_sleep(router: Router, front: Front) -> None:
    """Give the memory back for a while, as vLLM's sleep mode does. Sleeping ends the engine process; waking starts one."""

    @router.post("/sleep")
    async def sleep(_request: Request) -> Any:
        """Let running requests finish, then free the engine's memory. Answers when that is done."""
        await front.client.sleep(front.settings.shutdown_timeout_s)
        log("asleep")
        return json_answer({"is_sleeping": True})

    @router.post("/wake_up")
    async def wake_up(_request: Request) -> Any:
        """Load the model again. Answers when the first request can be worked on."""
        await front.client.wake_up()
        log("awake")
        return json_answer({"is_sleeping": False})

    @router.get("/is_sleeping")
    async def is_sleeping(_request: Request) -> Any:
        return json_answer({"is_sleeping": front.client.state is EngineState.SLEEPING})


def _model_card(front: Front, name: str) -> dict[str, Any]:
    ready, adapter = front.client.ready, front.adapters.get(name)
    return {
        "id": name,
        "object": "model",
        "created": front.created,
        "owned_by": "llmc",
        "root": front.model.name if adapter is None else adapter.path,
        "parent": None if adapter is None else adapter.base_model_name or front.model.name,
        "max_model_len": ready.max_model_len if ready is not None else None,
    }
