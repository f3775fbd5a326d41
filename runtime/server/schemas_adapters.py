"""The bodies of POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from llmc.runtime.server.schemas import RequestModel

_Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:/-]*$")]


class LoadAdapterRequest(RequestModel):
    lora_name: _Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")]  # folder, as this server sees it


class UnloadAdapterRequest(RequestModel):
    lora_name: _Name
    lora_int_id: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None  # vLLM's clients send it; names decide here
