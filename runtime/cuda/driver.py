"""The NVIDIA driver through ctypes: found, new enough, and every failure one sentence."""

from __future__ import annotations

import ctypes
from typing import Any

from llmc.errors import ConfigError, DeviceLost, InternalError
from llmc.runtime.cuda.api import FUNCTIONS, LIBRARY, LOST, NO_DEVICE, OLDEST_DRIVER

_HINTS = {
    NO_DEVICE: "the driver finds no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES",
    3: "the driver is not initialised; check nvidia-smi",
    803: "the driver's library and its kernel module are of different versions; restart the machine",
    804: "the compatibility libraries do not support this GPU; remove them from the library path",
    999: "the driver failed for a reason it does not tell; check nvidia-smi and the system's log",
}


class Driver:
    """libcuda, found where the system's loader finds it, and initialised.

    Args:
        needed: the oldest driver that will do, as `cuDriverGetVersion` counts (12040 is CUDA 12.4).

    Raises:
        ConfigError: no driver, one that is too old, or no GPU.
    """

    def __init__(self, *, needed: int = OLDEST_DRIVER) -> None:
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise ConfigError(
                f"{LIBRARY} cannot be opened ({error}): this artifact runs on an NVIDIA GPU and needs its driver, "
                f"version for CUDA {_version(needed)} or newer; install it, or compile with --target cpu:native"
            ) from error
        self._functions: dict[str, Any] = {}
        for name in ("cuInit", "cuDriverGetVersion", "cuGetErrorName"):
            self._bind(name)
        status = self._functions["cuInit"](0)
        if status:
            hint = _HINTS.get(status, "check nvidia-smi")
            raise ConfigError(f"the NVIDIA driver cannot be used: cuInit gave {self.error_name(status)} ({status}); {hint}")
        self.version = self.get("cuDriverGetVersion", ctypes.c_int)
        needed = max(needed, OLDEST_DRIVER)
        if self.version < needed:
            raise ConfigError(
                f"the NVIDIA driver supports CUDA {_version(self.version)}, this artifact needs {_version(needed)}; install a newer driver"
            )
        for name in FUNCTIONS:
            self._bind(name)

    def call(self, name: str, *args: Any) -> None:
        """Call a function of `api.FUNCTIONS`.

        Raises:
            DeviceLost: a kernel failed; nothing on this GPU can go on in this process.
            InternalError: any other failure.
        """
        status = self._functions[name](*args)
        if status:
            raise self.failure(name, status)

    def status(self, name: str, *args: Any) -> int:
        """Call a function and give its CUresult, for those whose failure means something to the caller."""
        return int(self._functions[name](*args))

    def get(self, name: str, kind: Any, *args: Any) -> Any:
        """Call a function that writes one value through its first argument."""
        value = kind()
        self.call(name, ctypes.byref(value), *args)
        return value.value

    def failure(self, name: str, status: int) -> Exception:
        """What a CUresult other than 0 becomes."""
        told = f"{name} gave {self.error_name(status)} ({status})"
        if status in LOST:
            return DeviceLost(f"{LOST[status]} ({told}); its memory is lost and the engine has to start again, please report this")
        return InternalError(f"the NVIDIA driver failed: {told}; please report this")

    def error_name(self, status: int) -> str:
        """CUDA_ERROR_ILLEGAL_ADDRESS of 700."""
        name = ctypes.c_char_p()
        if self._functions["cuGetErrorName"](status, ctypes.byref(name)) or not name.value:
            return "an unknown error"
        return name.value.decode(errors="replace")

    def _bind(self, name: str) -> None:
        try:
            function = getattr(self._library, name)
        except AttributeError as error:
            raise ConfigError(f"{LIBRARY} has no {name}; install a driver for CUDA {_version(OLDEST_DRIVER)} or newer") from error
        function.argtypes, function.restype = FUNCTIONS[name], ctypes.c_int
        self._functions[name] = function


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
