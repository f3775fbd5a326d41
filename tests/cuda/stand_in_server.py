"""The other end of stand_in.c: reads images, and runs kernels as Python functions over the stand-in's memory.

In a thread of the test that brings its own kernels, or as `TRITON_INTERPRET=1 python -m tests.cuda.stand_in_server SOCKET SOURCES`,
which runs the kernels of a plan in Triton's interpreter; SOURCES is a JSON list of {"sha256", "entry", "source"}.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc.artifacts.cubin import read_cubin
from llmc.errors import ArtifactError

INVALID_IMAGE, NO_BINARY, ILLEGAL_ADDRESS, LAUNCH_FAILED = 200, 209, 700, 719


class IllegalAccess(Exception):
    """A kernel went outside of what is allocated."""


@dataclass(frozen=True)
class Argument:
    """The bytes a kernel was given, and for an address what it leads to: uint8 up to the end of its allocation, None if to nothing."""

    data: bytes
    memory: np.ndarray | None

    @property
    def number(self) -> int:
        return int.from_bytes(self.data, "little", signed=True)

    def array(self, dtype: str, count: int) -> np.ndarray:
        """The first elements at the address.

        Raises:
            IllegalAccess: there are not so many.
        """
        nbytes = np.dtype(dtype).itemsize * count
        if self.memory is None or len(self.memory) < nbytes:
            raise IllegalAccess(f"{nbytes} bytes at {self.number:#x}")
        return self.memory[:nbytes].view(dtype)


@dataclass(frozen=True)
class KernelLaunch:
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    arguments: list[Argument]


Kernel = Callable[[KernelLaunch], None]
Find = Callable[[str, str], Kernel]  # SHA-256 of an image, entry


def serve(connection: socket.socket, find: Find, architecture: int = 90) -> None:
    """Answer one stand-in until it goes."""
    facts, descriptors, _, _ = socket.recv_fds(connection, 16, 1)
    base, size = struct.unpack("<QQ", facts)
    shared = mmap.mmap(descriptors[0], size)
    memory = np.frombuffer(shared, dtype=np.uint8)
    modules: list[str] = []
    while head := _read(connection, 8):
        kind, length = struct.unpack("<II", head)
        data = _read(connection, length)
        try:
            if kind == 1:
                answer = _load(data, modules, architecture)
            else:
                _launch(data, modules, find, base, memory)
                answer = b""
            status = 0
        except ArtifactError:
            status, answer = INVALID_IMAGE, b""
        except _ForeignImage:
            status, answer = NO_BINARY, b""
        except IllegalAccess:
            status, answer = ILLEGAL_ADDRESS, b""
        except Exception:
            traceback.print_exc()
            status, answer = LAUNCH_FAILED, b""
        connection.sendall(struct.pack("<II", status, len(answer)) + answer)


class _ForeignImage(Exception):
    pass


def _read(connection: socket.socket, size: int) -> bytes:
    parts = b""
    while len(parts) < size and (part := connection.recv(size - len(parts))):
        parts += part
    return parts


def _load(image: bytes, modules: list[str], architecture: int) -> bytes:
    cubin = read_cubin(image, "an image")
    if cubin.architecture != architecture:
        raise _ForeignImage
    modules.append(hashlib.sha256(image).hexdigest())
    answer = struct.pack("<II", len(modules) - 1, len(cubin.kernels))
    for entry, kernel in cubin.kernels.items():
        sizes = [size for _, size in kernel.parameters]
        answer += struct.pack("<I", len(entry)) + entry.encode() + struct.pack(f"<I{len(sizes)}I", len(sizes), *sizes)
    return answer


def _launch(data: bytes, modules: list[str], find: Find, base: int, memory: np.ndarray) -> None:
    module, *numbers, shared_bytes, length = struct.unpack_from("<9I", data)
    at = 36 + length
    entry = data[36:at].decode()
    arguments = []
    while at < len(data):
        size, rest = struct.unpack_from("<IQ", data, at)
        value = data[at + 12 : at + 12 + size]
        start = int.from_bytes(value, "little") - base
        arguments.append(Argument(value, memory[start : start + rest] if rest else None))
        at += 12 + size
    find(modules[module], entry)(
        KernelLaunch((numbers[0], numbers[1], numbers[2]), (numbers[3], numbers[4], numbers[5]), shared_bytes, arguments)
    )


class KernelServer:
    """Kernels of a test, served from a thread. Any number of stand-ins may connect, one after the other or at once."""

    def __init__(self, folder: Path, kernels: Mapping[str, Kernel], architecture: int = 90) -> None:
        self.path = folder / "kernels.socket"
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(self.path))
        self._socket.listen()
        self._find = lambda _, entry: kernels[entry]
        self._architecture = architecture
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            threading.Thread(target=serve, args=(connection, self._find, self._architecture), daemon=True).start()

    def close(self) -> None:
        self._socket.close()


def interpreted(sources: list[dict[str, Any]], folder: Path) -> Find:
    """Kernels by what they were compiled from, in Triton's interpreter."""
    import torch

    from tests.cuda.run_plan import DTYPES, load_kernel

    one_at_a_time = threading.Lock()
    functions: dict[tuple[str, str], Kernel] = {}
    by_key = {(record["sha256"], record["entry"]): record["source"] for record in sources}

    def make(key: tuple[str, str]) -> Kernel:
        source = by_key[key]
        function = load_kernel(source, folder / f"kernel_{len(functions)}.py")

        def run(launch: KernelLaunch) -> None:
            arguments = dict(source["constants"])
            for given, (name, kind) in zip(launch.arguments, source["types"].items(), strict=False):
                if kind.startswith("*"):
                    if given.memory is None:
                        raise IllegalAccess(f"{name} at {given.number:#x}")
                    dtype = DTYPES[kind]
                    raw = torch.frombuffer((ctypes.c_ubyte * len(given.memory)).from_address(given.memory.ctypes.data), dtype=torch.uint8)
                    arguments[name] = raw[: raw.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
                elif kind.startswith("fp"):
                    arguments[name] = struct.unpack({4: "<f", 8: "<d"}[len(given.data)], given.data)[0]
                else:
                    arguments[name] = given.number
            with one_at_a_time:  # the interpreter changes Triton's modules while it runs a kernel
                function[launch.grid](**arguments)

        return run

    def find(sha256: str, entry: str) -> Kernel:
        key = (sha256, entry)
        if key not in functions:
            functions[key] = make(key)
        return functions[key]

    return find


def main(path: str, sources: Path) -> None:
    find = interpreted(json.loads(sources.read_text()), sources.parent)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    print("ready", flush=True)
    while True:
        connection, _ = listening.accept()
        threading.Thread(target=serve, args=(connection, find), daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
