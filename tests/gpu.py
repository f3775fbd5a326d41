"""The GPU of tests marked `gpu`: whether there is one, and what to compile for; from the driver, since llmc needs no torch for CUDA."""

from __future__ import annotations

import ctypes
import functools

import pytest

MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@functools.cache
def found() -> tuple[str, str]:
    """(target of this machine's first GPU, ""), or ("", why there is none)."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return "", f"no NVIDIA driver: {error}"
    if status := library.cuInit(0):
        return "", f"no NVIDIA GPU: cuInit gave {status}"
    device, parts = ctypes.c_int(), [ctypes.c_int(), ctypes.c_int()]
    statuses = [library.cuDeviceGet(ctypes.byref(device), 0)]
    statuses += [library.cuDeviceGetAttribute(ctypes.byref(part), what, device) for part, what in zip(parts, (MAJOR, MINOR), strict=True)]
    if any(statuses):
        return "", f"no usable NVIDIA GPU: the driver gave {statuses}"
    return f"cuda:sm_{parts[0].value}{parts[1].value}", ""


def target() -> str:
    """What to compile for so that it runs here; the test is skipped where nothing would."""
    name, why = found()
    if why:
        pytest.skip(why)
    return name
