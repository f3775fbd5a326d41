"""What rank 0 tells the others, over a socket pair: a length, then msgpack. Steps go one way; nothing comes back but readiness."""

from __future__ import annotations

import socket
from typing import Any

import msgspec
import numpy as np

from llmc.runtime.step import DeviceBatch

_LENGTH_BYTES = 8
_FIELDS = ("input_ids", "positions", "logits_indices", "slot_mapping", "block_tables", "seq_lens", "query_start_loc")


class Array(msgspec.Struct, frozen=True, array_like=True):
    """One array of a batch."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class AllocateKV(msgspec.Struct, frozen=True, tag=True):
    """Allocate the caches."""

    num_blocks: int


class Step(msgspec.Struct, frozen=True, tag=True):
    """Run one step, on the arrays of a DeviceBatch in the order of its fields."""

    arrays: list[Array]


class Ready(msgspec.Struct, frozen=True, tag=True):
    """From a rank: it has its program and its weights."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """From a rank: it ends, with one sentence why."""

    message: str


Message = AllocateKV | Step | Ready | Failed


def step_of(batch: DeviceBatch) -> Step:
    """A batch, ready to be sent."""
    arrays = [np.ascontiguousarray(getattr(batch, name)) for name in _FIELDS]
    return Step(arrays=[Array(array.dtype.str, array.shape, array.tobytes()) for array in arrays])


def batch_of(step: Step) -> DeviceBatch:
    """The batch again."""
    arrays = [np.frombuffer(array.data, dtype=np.dtype(array.dtype)).reshape(array.shape) for array in step.arrays]
    return DeviceBatch(**dict(zip(_FIELDS, arrays, strict=True)))


def send(connection: socket.socket, message: Message) -> None:
    """Send one message. Raises OSError when the other end is gone."""
    data = msgspec.msgpack.encode(message)
    connection.sendall(len(data).to_bytes(_LENGTH_BYTES, "little") + data)


def receive(connection: socket.socket) -> Any:
    """The next `Message`; None when the other end is gone."""
    head = _exactly(connection, _LENGTH_BYTES)
    if head is None:
        return None
    data = _exactly(connection, int.from_bytes(head, "little"))
    return None if data is None else msgspec.msgpack.decode(data, type=Message)


def _exactly(connection: socket.socket, count: int) -> bytes | None:
    whole = bytearray()
    while len(whole) < count:
        part = connection.recv(count - len(whole))
        if not part:
            return None
        whole += part
    return bytes(whole)
