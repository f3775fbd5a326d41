"""One GPU: its context, its memory, and pinned memory of the host."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.artifacts.plan_check import REGION_ALIGNMENT
from llmc.errors import ConfigError, DeviceLost, InternalError
from llmc.runtime.cuda.api import (
    CAPABILITY_MAJOR,
    CAPABILITY_MINOR,
    EVENT_DISABLE_TIMING,
    MAX_SHARED_BYTES_OPTIN,
    OUT_OF_MEMORY,
    STREAM_NON_BLOCKING,
)
from llmc.runtime.cuda.driver import Driver


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """A CUstream. What is put into one runs in order."""

    handle: int


class Device:
    """GPU `ordinal` of those the driver shows, through its primary context. Owns everything allocated through it.

    Attributes:
        name: as the driver gives it. capability: (9, 0). shared_bytes: most shared memory of a block, opted in.
    """

    def __init__(self, driver: Driver, ordinal: int = 0) -> None:
        self.driver = driver
        count = driver.get("cuDeviceGetCount", ctypes.c_int)
        if ordinal >= count:
            raise ConfigError(f"GPU {ordinal} was asked for, the driver shows {count}; check CUDA_VISIBLE_DEVICES")
        self._device = driver.get("cuDeviceGet", ctypes.c_int, ordinal)
        name = ctypes.create_string_buffer(256)
        driver.call("cuDeviceGetName", name, len(name), self._device)
        self.name = name.value.decode(errors="replace")
        self.capability = (self._attribute(CAPABILITY_MAJOR), self._attribute(CAPABILITY_MINOR))
        self.shared_bytes = self._attribute(MAX_SHARED_BYTES_OPTIN)
        self._context = driver.get("cuDevicePrimaryCtxRetain", ctypes.c_void_p, self._device)
        self._here = threading.local()
        self._memory: list[int] = []
        self._pinned: list[int] = []
        self._streams: list[int] = []
        self.enter()

    def enter(self) -> None:
        """Make the context this thread's own. Every thread that calls the driver does so first; cheap when repeated."""
        if not getattr(self._here, "entered", False):
            self.driver.call("cuCtxSetCurrent", self._context)
            self._here.entered = True

    def free_bytes(self) -> int:
        """Memory of the GPU that nobody has."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.driver.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate(self, nbytes: int, *, what: str) -> int:
        """Address of new memory, a multiple of REGION_ALIGNMENT.

        Args:
            what: for the error, as in "the weights".

        Raises:
            ConfigError: there is not so much.
        """
        address = ctypes.c_uint64()
        status = self.driver.status("cuMemAlloc_v2", ctypes.byref(address), max(nbytes, REGION_ALIGNMENT))
        if status == OUT_OF_MEMORY:
            raise ConfigError(
                f"{what}: {nbytes / 1e6:.1f} MB of GPU memory are needed, {self.free_bytes() / 1e6:.1f} MB are free on {self.name}; "
                "free memory there, or lower what is asked for"
            )
        if status:
            raise self.driver.failure("cuMemAlloc_v2", status)
        self._memory.append(address.value)
        if address.value % REGION_ALIGNMENT:
            raise InternalError(
                f"the driver gave address {address.value:#x} for {what}, expected a multiple of {REGION_ALIGNMENT}; please report this"
            )
        return address.value

    def pinned(self, nbytes: int, *, what: str) -> np.ndarray:
        """Page-locked memory of the host, uint8 [nbytes], which copies to and from the GPU run beside the host with.

        It lives until `close`, not as long as the array.
        """
        address = ctypes.c_void_p()
        status = self.driver.status("cuMemHostAlloc", ctypes.byref(address), max(nbytes, 1), 0)
        if status == OUT_OF_MEMORY:
            raise ConfigError(f"{what}: {nbytes / 1e6:.1f} MB of page-locked memory are needed, which the system refused; free memory")
        if status or not address.value:
            raise self.driver.failure("cuMemHostAlloc", status)
        self._pinned.append(address.value)
        return np.frombuffer(memoryview((ctypes.c_ubyte * nbytes).from_address(address.value)), dtype=np.uint8)

    def free_pinned(self, buffer: np.ndarray) -> None:
        """Give back what `pinned` gave."""
        if buffer.ctypes.data in self._pinned:  # after a failure nothing is kept to be given back
            self._pinned.remove(buffer.ctypes.data)
            self.release("cuMemFreeHost", buffer.ctypes.data)

    def stream(self) -> Stream:
        """A new stream that waits for no other."""
        handle = self.driver.get("cuStreamCreate", ctypes.c_void_p, STREAM_NON_BLOCKING)
        self._streams.append(handle)
        return Stream(handle=handle)

    def free_stream(self, stream: Stream) -> None:
        """Give back what `stream` gave."""
        if stream.handle in self._streams:  # after a failure nothing is kept to be given back
            self._streams.remove(stream.handle)
            self.release("cuStreamDestroy_v2", stream.handle)

    def synchronize(self, stream: Stream) -> None:
        """Wait until everything put into the stream is done.

        Raises:
            DeviceLost: a kernel in it failed.
        """
        self.driver.call("cuStreamSynchronize", stream.handle)

    def copy_in(self, address: int, source: int, nbytes: int, stream: Stream) -> None:
        """Put a copy from pinned memory into a stream. The source must not change before the stream got there."""
        self.driver.call("cuMemcpyHtoDAsync_v2", address, source, nbytes, stream.handle)

    def copy_out(self, target: int, address: int, nbytes: int, stream: Stream) -> None:
        """Put a copy to pinned memory into a stream."""
        self.driver.call("cuMemcpyDtoHAsync_v2", target, address, nbytes, stream.handle)

    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """Put a copy from one place of the GPU's memory to another into a stream."""
        self.driver.call("cuMemcpyDtoDAsync_v2", target, source, nbytes, stream.handle)

    def zero(self, address: int, nbytes: int, stream: Stream) -> None:
        """Put zeros into memory."""
        self.driver.call("cuMemsetD8Async", address, 0, nbytes, stream.handle)

    def event(self) -> int:
        """A new event; the caller destroys it."""
        return int(self.driver.get("cuEventCreate", ctypes.c_void_p, EVENT_DISABLE_TIMING))

    def release(self, name: str, *handle: Any) -> None:
        """Call a function that frees something. After a kernel failed nothing can be freed, and the process's end does it."""
        try:
            self.driver.call(name, *handle)
        except DeviceLost:
            self._memory, self._pinned, self._streams = [], [], []

    def close(self) -> None:
        """Free all memory and streams and give the context back. May be called again."""
        if self._context is None:
            return
        self.release("cuCtxSetCurrent", self._context)  # of this thread, whichever it is
        for name, handles in (("cuStreamDestroy_v2", self._streams), ("cuMemFree_v2", self._memory), ("cuMemFreeHost", self._pinned)):
            for handle in handles:
                self.release(name, handle)
        self._memory, self._pinned, self._streams, self._context = [], [], [], None
        self.release("cuDevicePrimaryCtxRelease_v2", self._device)

    def _attribute(self, number: int) -> int:
        return int(self.driver.get("cuDeviceGetAttribute", ctypes.c_int, number, self._device))
