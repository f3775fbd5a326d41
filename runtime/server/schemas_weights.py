"""The body of POST /v1/weights."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from llmc.runtime.server.schemas import RequestModel


class WeightsRequest(RequestModel):
    artifact: Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")]  # folder, as this server sees it
