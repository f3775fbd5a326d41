"""The artifact's own tensors: its image of role "tensor_runtime", so that serving needs no torch at all."""

from __future__ import annotations

import ctypes

from llmc.runtime.executors.tensor_functions import TensorFunctions


class TensorRuntime(TensorFunctions):
    """Functions of a loaded tensor runtime.

    Raises:
        ConfigError: the image lacks one of them.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library, name="the artifact's tensor runtime", remedy="compile the artifact again")
        library.llmc_tensor_message.restype = ctypes.c_char_p

    def set_num_threads(self, count: int) -> None:
        self._library.llmc_tensor_set_num_threads(ctypes.c_int32(count))

    def message(self) -> str:
        return bytes(self._library.llmc_tensor_message() or b"").decode(errors="replace")

    def pool_counts(self) -> tuple[int, int, int]:
        """Blocks of memory ever asked of the system, blocks in use, bytes of free blocks that are kept."""
        counts = (ctypes.c_int64 * 3)()
        self._library.llmc_tensor_pool_counts(counts)
        return counts[0], counts[1], counts[2]
