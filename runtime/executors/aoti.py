"""Runs a model image with the AOTInductor C interface, without Python's torch. Levels -O1 and above.

The image takes tensors as handles and steals them: what stays (KV cache, arrays whose address and shape repeat) keeps a base
handle here, and each step makes cheap copies of those.

Source: torch/csrc/inductor/aoti_runtime/interface.h.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any, ClassVar

import numpy as np

from llmc.artifacts.dtypes import NUMPY
from llmc.artifacts.manifest import Entry, KVFacts
from llmc.errors import ArtifactError, InternalError
from llmc.runtime.executors.kv_cache import KVCache, cache_input
from llmc.runtime.executors.logits import Logits, LogitsBuffer
from llmc.runtime.executors.tensor_functions import OutputReader, TensorFunctions
from llmc.runtime.step import DeviceBatch
from llmc.runtime.weights import Weights

_HANDLE = ctypes.c_void_p
_SIZE_STEP = 64  # AOTInductor rounds the sizes it states of constants up to this
_MAX_CACHED_SHAPES = 512  # per input; decode steps repeat a few, prefill chunks rarely do
_Handles = dict[tuple[int, tuple[int, ...]], _HANDLE]  # by address and shape
_Placed = tuple[_HANDLE, _HANDLE]  # a base handle, and the address of its place in the input array


class _ConstantPair(ctypes.Structure):
    """AOTInductorConstantMapEntry."""

    _fields_: ClassVar = [("name", ctypes.c_char_p), ("handle", _HANDLE)]


class AotiExecutor:
    """An `Executor` over one AOTInductor entry.

    Args:
        entry: the program's inputs, outputs and constants.
        kv: how the KV cache is cut.
        image: the loaded model image; the kernels, and the tensor runtime or libtorch and the shim, are loaded before it.
        tensors: the C interface that the image calls.
        weights: stays alive as long as this object, which gives the program their addresses.
        num_threads: of every parallel region.

    Raises:
        ArtifactError: the image and the manifest disagree.
        InternalError: the image refuses its constants.
    """

    def __init__(
        self, *, entry: Entry, kv: KVFacts, image: ctypes.CDLL, tensors: TensorFunctions, weights: Weights, num_threads: int
    ) -> None:
        self._entry = entry
        self._kv_facts = kv
        self._image = image
        self._tensors = tensors
        self._weights = weights
        self._num_threads = num_threads
        self._thread: int | None = None
        self._container = _HANDLE()
        self._constants: list[_HANDLE] = []
        self._cache: KVCache | None = None
        self._lora_pool: np.ndarray | None = None
        self._fixed: list[_Placed] = []
        self._varying: list[tuple[str, str, _HANDLE, _Handles]] = []  # name, dtype, place, handles
        self._placed: tuple[DeviceBatch, list[_Placed]] | None = None  # the batch placed last and every input's handle with it
        if len(entry.outputs) != 1:
            raise ArtifactError(f"entry {entry.name}: {len(entry.outputs)} outputs where the logits alone are expected; compile again")
        self._logits = LogitsBuffer(entry.outputs[0].dtype)
        self._reader = OutputReader(tensors, entry.outputs[0].dtype)
        self._inputs = (_HANDLE * len(entry.inputs))()
        self._output = _HANDLE()  # the logits returned last are a view of it
        self._run = self._function("AOTInductorModelContainerRunSingleThreaded", 7)
        self._use_threads()
        self._call("AOTInductorModelContainerCreateWithDevice", ctypes.byref(self._container), ctypes.c_size_t(1), b"cpu", None)
        outputs = _HANDLE(ctypes.addressof(self._output))
        self._arguments = (self._container, self._inputs, ctypes.c_size_t(len(self._inputs)), outputs, ctypes.c_size_t(1), None, None)
        self._check_arity()
        self._bind_constants()

    def bind_lora(self, pool: np.ndarray) -> None:
        """Use this pool of adapters, bfloat16 as uint16, at every step. Before `allocate_kv`."""
        self._lora_pool = pool

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocate K and V of every layer, zeroed, in huge pages, and bind them to the program's inputs."""
        if self._cache is not None:
            raise InternalError("the KV cache was allocated twice; please report this")
        self._cache = KVCache(self._kv_facts, num_blocks)
        base = ctypes.addressof(self._inputs)
        for index, spec in enumerate(self._entry.inputs):
            place = _HANDLE(base + index * ctypes.sizeof(_HANDLE))
            owner = cache_input(spec.name)
            if spec.name == "lora_pool":
                if self._lora_pool is None or list(self._lora_pool.shape) != spec.shape:
                    raise InternalError("the program takes adapters and was given no pool of its shape; please report this")
                self._fixed.append((self._tensors.tensor(self._lora_pool.ctypes.data, self._lora_pool.shape, spec.dtype), place))
            elif owner is None:
                self._varying.append((spec.name, spec.dtype, place, {}))
            else:
                array = self._cache.tensor(*owner)
                self._fixed.append((self._tensors.tensor(array.ctypes.data, array.shape, spec.dtype), place))

    def run(self, batch: DeviceBatch) -> Logits:
        """One step. Returns logits [N, vocab_size], valid until the next call.

        Raises:
            InternalError: the program failed; its own message is in the error.
            DeviceLost: weights that were mapped at the start were changed on disk before they had moved into memory.
        """
        if self._weights.mover is not None:
            self._weights.mover.check()
        if threading.get_ident() != self._thread:
            self._use_threads()  # OpenMP keeps the number of threads per starting thread
        self._release_output()
        self._place_inputs(batch)
        status = self._run(*self._arguments)
        if status:
            self._output.value = None
            raise InternalError(f"the compiled program failed in a step of {len(batch.input_ids)} tokens: {self._last_error()}")
        logits = self._reader.read(self._output)
        if len(logits) != len(batch.logits_indices):
            raise InternalError(f"the program gave {len(logits)} rows of logits for {len(batch.logits_indices)}; please report this")
        return Logits(logits, self._logits)

    def close(self) -> None:
        """Free the container, every handle and the KV cache. The images stay mapped until the process ends."""
        self._release_output()
        if self._weights.mover is not None:
            self._weights.mover.close()
        if self._container.value:
            self._call("AOTInductorModelContainerDelete", self._container)
            self._container = _HANDLE()
        for handle in self._constants:
            self._tensors.delete(handle)
        for handle, _ in self._fixed:
            self._tensors.delete(handle)
        for _, _, _, handles in self._varying:
            for handle in handles.values():
                self._tensors.delete(handle)
        self._constants, self._fixed, self._varying, self._placed, self._cache = [], [], [], None, None

    def _place_inputs(self, batch: DeviceBatch) -> None:
        """A fresh handle for every input, which the program will free."""
        if self._cache is None:
            raise InternalError("a step ran before the KV cache was allocated; please report this")
        if self._placed is None or self._placed[0] is not batch:
            self._placed = None  # handles may be deleted meanwhile
            self._reader.forget()
            varying = [(self._base(getattr(batch, name), name, dtype, handles), place) for name, dtype, place, handles in self._varying]
            self._placed = batch, [*self._fixed, *varying]
        copy = self._tensors.new_handle
        for base, place in self._placed[1]:
            copy(base, place)

    def _base(self, array: np.ndarray, name: str, dtype: str, handles: _Handles) -> _HANDLE:
        """The base handle of an array at its address and with its shape."""
        key = (array.__array_interface__["data"][0], array.shape)
        if key not in handles:
            handles[key] = self._new_base(name, array, dtype, handles)
        return handles[key]

    def _new_base(self, name: str, array: np.ndarray, dtype: str, handles: _Handles) -> _HANDLE:
        """A base handle for an array not seen before. The program reads inputs as contiguous, so nothing else may pass."""
        if array.dtype != NUMPY[dtype] or not array.flags.c_contiguous:
            raise InternalError(f"input {name} is {array.dtype}, contiguous: {array.flags.c_contiguous}; contiguous {dtype} is expected")
        if len(handles) >= _MAX_CACHED_SHAPES:
            for handle in handles.values():
                self._tensors.delete(handle)
            handles.clear()
        return self._tensors.tensor(array.ctypes.data, array.shape, dtype)

    def _release_output(self) -> None:
        if self._output.value:
            self._tensors.delete(self._output)
            self._output.value = None

    def _use_threads(self) -> None:
        self._tensors.set_num_threads(self._num_threads)
        self._thread = threading.get_ident()

    def _check_arity(self) -> None:
        found = ctypes.c_size_t()
        self._call("AOTInductorModelContainerGetNumInputs", self._container, ctypes.byref(found))
        if found.value != len(self._entry.inputs):
            raise ArtifactError(
                f"entry {self._entry.name}: the image takes {found.value} inputs, the manifest names {len(self._entry.inputs)}"
            )
        known = {"input_ids", "positions", "logits_indices", "slot_mapping", "block_tables", "seq_lens", "query_start_loc"}
        known |= {"lora_slots", "lora_pool"}
        unknown = [spec.name for spec in self._entry.inputs if spec.name not in known and cache_input(spec.name) is None]
        if unknown:
            raise ArtifactError(f"entry {self._entry.name}: this runtime has no input named {unknown[0]!r}; upgrade llmc or compile again")

    def _bind_constants(self) -> None:
        """Give the program the addresses of its weights, without copying."""
        count = ctypes.c_size_t()
        self._call("AOTInductorModelContainerGetNumConstants", self._container, ctypes.byref(count))
        pairs: list[tuple[bytes, _HANDLE]] = []
        for index in range(count.value):
            name, original, folded = ctypes.c_char_p(), ctypes.c_char_p(), ctypes.c_bool()
            place = ctypes.c_size_t(index)
            self._call("AOTInductorModelContainerGetConstantName", self._container, place, ctypes.byref(name))
            self._call("AOTInductorModelContainerGetConstantOriginalFQN", self._container, place, ctypes.byref(original))
            self._call("AOTInductorModelContainerGetConstantFromFolded", self._container, place, ctypes.byref(folded))
            if folded.value:
                continue
            pairs.append((name.value or b"", self._constant(name.value or b"", original.value or b"", index)))
        if not pairs:
            return
        array = (_ConstantPair * len(pairs))(*[_ConstantPair(name, handle) for name, handle in pairs])
        self._call(
            "AOTInductorModelContainerUpdateUserManagedConstantBufferPairs",
            self._container,
            array,
            ctypes.c_size_t(len(pairs)),
            ctypes.c_bool(False),
            ctypes.c_bool(True),
        )

    def _constant(self, name: bytes, original: bytes, index: int) -> _HANDLE:
        """A handle over the weight a constant of the program stands for, after comparing sizes."""
        tensor = self._entry.constants.get(original.decode()) or self._entry.constants.get(name.decode())
        view = self._weights.views.get(tensor) if tensor is not None else None
        if view is None:
            raise ArtifactError(
                f"entry {self._entry.name}: no weight is bound to the program's constant {original.decode()!r}; compile again"
            )
        size = ctypes.c_size_t()
        self._call("AOTInductorModelContainerGetConstantDataSize", self._container, ctypes.c_size_t(index), ctypes.byref(size))
        if size.value != -(-view.array.nbytes // _SIZE_STEP) * _SIZE_STEP:
            raise ArtifactError(f"tensor {tensor}: {view.array.nbytes} bytes where the program expects {size.value}; compile again")
        handle = self._tensors.tensor(view.address, view.shape, view.dtype)
        self._constants.append(handle)
        return handle

    def _function(self, name: str, num_args: int | None = None) -> Any:  # a ctypes function
        try:
            function = getattr(self._image, name)
        except AttributeError as error:
            raise ArtifactError(f"entry {self._entry.name}: the model image has no {name}; compile the artifact again") from error
        function.restype = ctypes.c_int32
        if num_args == 7:
            size, pointer = ctypes.c_size_t, ctypes.c_void_p
            function.argtypes = [pointer, pointer, size, pointer, size, pointer, pointer]
        return function

    def _call(self, name: str, *args: object) -> None:
        if self._function(name)(*args):
            raise InternalError(f"{name} failed for entry {self._entry.name}: {self._last_error()}")

    def _last_error(self) -> str:
        message = ctypes.c_char_p()
        self._function("AOTInductorGetLastError")(ctypes.byref(message))
        text = (message.value or b"").decode(errors="replace").strip() or "no message"
        why = self._tensors.message()
        return text.splitlines()[0] + (f" ({why})" if why else "")  # the lines after the first are a C++ stack
