"""A described GPU in the shapes that torch and Triton ask for one.

Every answer comes from a `CudaTarget`; anything that would need the device itself raises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from llmc.artifacts.cubin import read_cubin
from llmc.errors import InternalError
from llmc.kernels.cuda_targets import CudaTarget

WARP_SIZE = 32
_MAX_THREADS_PER_BLOCK = 1024  # of every architecture since 2.0
_SHARED_WITHOUT_OPT_IN = 48 * 1024  # bytes; likewise
_MAX_REGISTERS_PER_THREAD = 255


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceFacts:
    """What `torch.cuda.get_device_properties` returns, under torch's names."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    total_memory: int
    L2_cache_size: int
    shared_memory_per_block: int
    shared_memory_per_block_optin: int
    shared_memory_per_multiprocessor: int
    regs_per_multiprocessor: int
    max_threads_per_multi_processor: int
    max_threads_per_block: int = _MAX_THREADS_PER_BLOCK
    warp_size: int = WARP_SIZE
    gcnArchName: str = ""  # asked of every device, filled for AMD's


def device_facts(target: CudaTarget) -> DeviceFacts:
    """A target in torch's words."""
    major, minor = target.compute_capability
    return DeviceFacts(
        name=target.device_name,
        major=major,
        minor=minor,
        multi_processor_count=target.num_sms,
        total_memory=target.memory_bytes,
        L2_cache_size=target.l2_bytes,
        shared_memory_per_block=_SHARED_WITHOUT_OPT_IN,
        shared_memory_per_block_optin=target.shared_memory_per_block_bytes,
        shared_memory_per_multiprocessor=target.shared_memory_per_sm_bytes,
        regs_per_multiprocessor=target.registers_per_sm,
        max_threads_per_multi_processor=target.max_threads_per_sm,
    )


class NoGuard:
    """Stands in for `torch.cuda.device`: there is no device to switch to."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> NoGuard:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def static_interface(target: CudaTarget) -> type:
    """torch._dynamo's view of CUDA for a described GPU."""
    from torch._dynamo.device_interface import CudaInterface

    facts = device_facts(target)
    base: Any = CudaInterface  # its methods name an index "device" or "i"; callers pass it by position

    class StaticCuda(base):
        device = NoGuard
        is_available = staticmethod(lambda: True)
        device_count = staticmethod(lambda: 1)
        current_device = staticmethod(lambda: 0)
        set_device = staticmethod(lambda index: None)
        exchange_device = staticmethod(lambda index: 0)
        maybe_exchange_device = staticmethod(lambda index: 0)
        synchronize = staticmethod(lambda device=None: None)
        get_raw_stream = staticmethod(lambda index: 0)
        get_device_properties = staticmethod(lambda device=None: facts)
        get_compute_capability = staticmethod(lambda device=None: target.capability_number)
        is_bf16_supported = staticmethod(lambda including_emulation=True: True)
        is_triton_capable = staticmethod(lambda device=None: True)
        raise_if_triton_unavailable = staticmethod(lambda device=None: None)

        class Worker:
            set_device = staticmethod(lambda index: None)
            current_device = staticmethod(lambda: 0)
            get_device_properties = staticmethod(lambda device=None: facts)

    return StaticCuda


def _nothing_runs(what: str) -> NoReturn:
    raise InternalError(f"{what} was asked for while compiling without a GPU; please report this model")


def static_driver(target: CudaTarget) -> type:
    """Triton's driver class for a described GPU. `load_binary` loads nothing: registers and stack come from the cubin."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Utils:
        def get_device_properties(self, device: int) -> dict[str, int]:
            return {
                "max_shared_mem": target.shared_memory_per_block_bytes,
                "max_num_regs": target.registers_per_sm,
                "multiprocessor_count": target.num_sms,
                "warpSize": WARP_SIZE,
                "sm_clock_rate": 0,  # only benchmarks read the clocks
                "mem_clock_rate": 0,
                "mem_bus_width": 0,
            }

        def load_binary(self, name: str, image: bytes, shared: int, device: int) -> tuple[object, object, int, int, int]:
            kernel = read_cubin(image, name).kernels[name]
            threads = min(_MAX_THREADS_PER_BLOCK, target.registers_per_sm // max(kernel.registers, 1) // WARP_SIZE * WARP_SIZE)
            return object(), object(), kernel.registers, kernel.frame_bytes // 4, threads

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            pass

        def __call__(self, *_: object, **__: object) -> NoReturn:
            _nothing_runs("a kernel launch")

    class StaticDriver(DriverBase):
        launcher_cls = Launcher

        def __init__(self) -> None:
            self.utils = Utils()

        @staticmethod
        def is_active() -> bool:
            return True

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", target.capability_number, WARP_SIZE)

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, index: int) -> None:
            pass

        def get_device_capability(self, index: int = 0) -> tuple[int, int]:
            return target.compute_capability

        def get_current_stream(self, index: int = 0) -> int:
            return 0

        def get_device_interface(self) -> Any:
            return torch.cuda

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def map_python_to_cpp_type(self, name: str) -> str:
            from triton.backends.nvidia.driver import ty_to_cpp

            return str(ty_to_cpp(name))

        def get_benchmarker(self) -> NoReturn:
            _nothing_runs("a benchmark")

    return StaticDriver
