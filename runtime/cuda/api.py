"""The functions, structures and numbers of the CUDA driver API that are used here, as ctypes needs them.

Source: cuda.h of CUDA 12. A name with `_v2` is the symbol that cuda.h maps the plain name to.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any, ClassVar

LIBRARY = "libcuda.so.1"
OLDEST_DRIVER = 12000  # cuGraphAddKernelNode_v2, and images of CUDA 12's tools

# CUresult
OUT_OF_MEMORY = 2
NO_DEVICE = 100
NO_BINARY_FOR_GPU = 209
# The context is gone: every later call gives the same error, until the process ends.
LOST = {
    214: "the GPU's memory has an uncorrectable error",
    220: "the link between GPUs has an uncorrectable error",
    700: "a kernel accessed memory that it must not",
    702: "a kernel took longer than the system allows",
    710: "a kernel stopped at a failed assertion",
    714: "a kernel's call stack was corrupted",
    715: "a kernel ran into an illegal instruction",
    716: "a kernel accessed memory at a misaligned address",
    717: "a kernel accessed an address space that it must not",
    718: "a kernel jumped to an invalid address",
    719: "a kernel failed",
}

# CUdevice_attribute
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
MAX_SHARED_BYTES_OPTIN = 97
MULTIPROCESSOR_COUNT = 16

# CUfunction_attribute, CUlaunchAttributeID and flags
FUNCTION_MAX_DYNAMIC_SHARED_BYTES = 8
FUNCTION_NON_PORTABLE_CLUSTER = 14
ATTRIBUTE_CLUSTER_DIMENSION = 4
STREAM_NON_BLOCKING = 1
EVENT_DISABLE_TIMING = 2
SHARED_BYTES_WITHOUT_OPTIN = 48 * 1024
PORTABLE_CLUSTER = 8


class KernelNodeParams(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_: ClassVar = [
        ("func", c_void_p),
        ("grid_x", c_uint),
        ("grid_y", c_uint),
        ("grid_z", c_uint),
        ("block_x", c_uint),
        ("block_y", c_uint),
        ("block_z", c_uint),
        ("shared_bytes", c_uint),
        ("kernel_params", c_void_p),
        ("extra", c_void_p),
        ("kern", c_void_p),
        ("ctx", c_void_p),
    ]


class LaunchAttributeValue(ctypes.Union):
    """CUlaunchAttributeValue, of which the cluster dimension is used."""

    _fields_: ClassVar = [("pad", ctypes.c_char * 64), ("cluster", c_uint * 3)]


_ADDRESS = c_uint64  # CUdeviceptr
FUNCTIONS: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuDriverGetVersion": [POINTER(c_int)],
    "cuGetErrorName": [c_int, POINTER(c_char_p)],
    "cuDeviceGetCount": [POINTER(c_int)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetName": [c_char_p, c_int, c_int],
    "cuDeviceGetAttribute": [POINTER(c_int), c_int, c_int],
    "cuDevicePrimaryCtxRetain": [POINTER(c_void_p), c_int],
    "cuDevicePrimaryCtxRelease_v2": [c_int],
    "cuCtxSetCurrent": [c_void_p],
    "cuMemGetInfo_v2": [POINTER(c_size_t), POINTER(c_size_t)],
    "cuMemAlloc_v2": [POINTER(_ADDRESS), c_size_t],
    "cuMemFree_v2": [_ADDRESS],
    "cuMemHostAlloc": [POINTER(c_void_p), c_size_t, c_uint],
    "cuMemFreeHost": [c_void_p],
    "cuMemsetD8Async": [_ADDRESS, ctypes.c_ubyte, c_size_t, c_void_p],
    "cuMemcpyHtoDAsync_v2": [_ADDRESS, c_void_p, c_size_t, c_void_p],
    "cuMemcpyDtoHAsync_v2": [c_void_p, _ADDRESS, c_size_t, c_void_p],
    "cuMemcpyDtoDAsync_v2": [_ADDRESS, _ADDRESS, c_size_t, c_void_p],
    "cuStreamCreate": [POINTER(c_void_p), c_uint],
    "cuStreamSynchronize": [c_void_p],
    "cuStreamDestroy_v2": [c_void_p],
    "cuEventCreate": [POINTER(c_void_p), c_uint],
    "cuEventRecord": [c_void_p, c_void_p],
    "cuEventSynchronize": [c_void_p],
    "cuEventDestroy_v2": [c_void_p],
    "cuModuleLoadData": [POINTER(c_void_p), c_char_p],
    "cuModuleUnload": [c_void_p],
    "cuModuleGetFunction": [POINTER(c_void_p), c_void_p, c_char_p],
    "cuFuncSetAttribute": [c_void_p, c_int, c_int],
    "cuGraphCreate": [POINTER(c_void_p), c_uint],
    "cuGraphAddKernelNode_v2": [POINTER(c_void_p), c_void_p, POINTER(c_void_p), c_size_t, POINTER(KernelNodeParams)],
    "cuGraphKernelNodeSetAttribute": [c_void_p, c_int, POINTER(LaunchAttributeValue)],
    "cuGraphInstantiateWithFlags": [POINTER(c_void_p), c_void_p, c_uint64],
    "cuGraphUpload": [c_void_p, c_void_p],
    "cuGraphLaunch": [c_void_p, c_void_p],
    "cuGraphDestroy": [c_void_p],
    "cuGraphExecDestroy": [c_void_p],
}
