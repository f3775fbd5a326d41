"""Cubins -> functions a graph node can name. An image is loaded once, whichever plans use it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping

from llmc.artifacts.plan import Plan, PlanKernel
from llmc.errors import ArtifactError
from llmc.runtime.cuda.api import (
    FUNCTION_MAX_DYNAMIC_SHARED_BYTES,
    FUNCTION_NON_PORTABLE_CLUSTER,
    NO_BINARY_FOR_GPU,
    OUT_OF_MEMORY,
    PORTABLE_CLUSTER,
    SHARED_BYTES_WITHOUT_OPTIN,
)
from llmc.runtime.cuda.device import Device

_REFUSED = (200, NO_BINARY_FOR_GPU, 218, 300, 500)  # invalid image, no binary, invalid PTX, invalid source, entry not found


class Modules:
    """The images of an artifact on a device.

    Args:
        device: which runs them.
        plans: checked; `images` holds every image they name, by SHA-256.

    Raises:
        ArtifactError: a kernel needs more than the device has, or the driver refuses an image.
    """

    def __init__(self, device: Device, plans: Iterable[Plan], images: Mapping[str, bytes]) -> None:
        self._device = device
        self._modules: dict[str, int] = {}
        self._functions: dict[tuple[str, str], int] = {}
        self._shared: dict[tuple[str, str], int] = {}
        for plan in plans:
            for kernel in plan.kernels:
                self._add(plan.images[kernel.image].sha256, kernel, images)

    def function(self, plan: Plan, kernel: PlanKernel) -> int:
        """The CUfunction of a kernel of a plan."""
        return self._functions[plan.images[kernel.image].sha256, kernel.entry]

    def close(self) -> None:
        """Unload every image."""
        for module in self._modules.values():
            self._device.release("cuModuleUnload", module)
        self._modules, self._functions = {}, {}

    def _add(self, sha256: str, kernel: PlanKernel, images: Mapping[str, bytes]) -> None:
        driver, where = self._device.driver, f"image {sha256}: {kernel.entry}"
        if kernel.shared_bytes > self._device.shared_bytes:
            raise ArtifactError(
                f"{where} needs {kernel.shared_bytes} bytes of shared memory, a block of {self._device.name} has "
                f"{self._device.shared_bytes}; compile again for this GPU"
            )
        if sha256 not in self._modules:
            self._modules[sha256] = self._load("cuModuleLoadData", where, images[sha256])
        key = (sha256, kernel.entry)
        if key not in self._functions:
            self._functions[key] = self._load("cuModuleGetFunction", where, self._modules[sha256], kernel.entry.encode())
        if kernel.shared_bytes > max(SHARED_BYTES_WITHOUT_OPTIN, self._shared.get(key, 0)):
            driver.call("cuFuncSetAttribute", self._functions[key], FUNCTION_MAX_DYNAMIC_SHARED_BYTES, kernel.shared_bytes)
            self._shared[key] = kernel.shared_bytes
        if kernel.cluster > PORTABLE_CLUSTER:
            driver.call("cuFuncSetAttribute", self._functions[key], FUNCTION_NON_PORTABLE_CLUSTER, 1)

    def _load(self, name: str, where: str, *args: object) -> int:
        """Call a function whose failure may be the image's fault."""
        handle = ctypes.c_void_p()
        status = self._device.driver.status(name, ctypes.byref(handle), *args)
        if status in _REFUSED:
            told = f"{name} gave {self._device.driver.error_name(status)}"
            raise ArtifactError(f"{where}: the driver refuses it for {self._device.name} ({told}); compile again for this GPU")
        if status == OUT_OF_MEMORY:
            raise ArtifactError(f"{where}: no GPU memory is left for its code on {self._device.name}; free memory there")
        if status or not handle.value:
            raise self._device.driver.failure(name, status)
        return handle.value
