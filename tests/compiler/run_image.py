"""Run a model image the way a runtime does: ctypes and numpy, no torch in the interpreter. Started as a script by test_lower.py.

    python run_image.py FOLDER

FOLDER/job.json names the libraries in load order, the image, its constants, the caches and the steps; arrays are .npy files
beside it, bf16 as uint16. Each step's logits go to out_<index>.npy.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

_SCALAR_TYPE = {"int32": 3, "int64": 4, "float32": 6, "bfloat16": 15}  # c10::ScalarType
_NUMPY = {"int32": np.int32, "int64": np.int64, "float32": np.float32, "bfloat16": np.uint16}


class ConstantEntry(ctypes.Structure):
    """AOTInductorConstantMapEntry."""

    _fields_: ClassVar = [("name", ctypes.c_char_p), ("handle", ctypes.c_void_p)]


class Image:
    """A loaded image with its constants bound."""

    def __init__(self, job: dict[str, Any], folder: Path) -> None:
        everybody = ctypes.RTLD_GLOBAL | os.RTLD_NOW
        self.libraries = [ctypes.CDLL(path, mode=everybody) for path in job["libraries"]]
        self.torch = next(library for library in self.libraries if hasattr(library, "aoti_torch_get_data_ptr"))
        descriptor = os.open(job["image"], os.O_RDONLY)
        self.image = ctypes.CDLL(f"/proc/self/fd/{descriptor}", mode=os.RTLD_NOW)  # as a runtime loads what it has verified
        self.kept: list[Any] = []
        self.container = ctypes.c_void_p()
        self.call("AOTInductorModelContainerCreateWithDevice", ctypes.byref(self.container), ctypes.c_size_t(1), b"cpu", None)
        self.bind({name: (np.load(folder / file), dtype) for name, (file, dtype) in job["constants"].items()})

    def call(self, name: str, *arguments: Any) -> None:
        """Call the image; raise with its own message."""
        if getattr(self.image, name)(*arguments):
            message = ctypes.c_char_p()
            self.image.AOTInductorGetLastError(ctypes.byref(message))
            raise RuntimeError(f"{name}: {(message.value or b'').decode()}")

    def tensor(self, array: np.ndarray, dtype: str) -> ctypes.c_void_p:
        """A handle over the array's memory, which is kept alive."""
        array = np.ascontiguousarray(array, dtype=_NUMPY[dtype])
        self.kept.append(array)
        dims = ctypes.c_int64 * array.ndim
        strides = dims(*(stride // array.itemsize for stride in array.strides))
        handle = ctypes.c_void_p()
        status = self.torch.aoti_torch_create_tensor_from_blob(
            ctypes.c_void_p(array.ctypes.data), ctypes.c_int64(array.ndim), dims(*array.shape), strides, ctypes.c_int64(0),
            ctypes.c_int32(_SCALAR_TYPE[dtype]), ctypes.c_int32(0), ctypes.c_int32(0), ctypes.byref(handle),
        )  # fmt: skip
        if status:
            raise RuntimeError("aoti_torch_create_tensor_from_blob failed")
        return handle

    def bind(self, arrays: dict[str, tuple[np.ndarray, str]]) -> None:
        """Give the image its constants by the names it asks for."""
        count = ctypes.c_size_t()
        self.call("AOTInductorModelContainerGetNumConstants", self.container, ctypes.byref(count))
        entries = []
        for index in range(count.value):
            name, fqn = ctypes.c_char_p(), ctypes.c_char_p()
            self.call("AOTInductorModelContainerGetConstantName", self.container, ctypes.c_size_t(index), ctypes.byref(name))
            self.call("AOTInductorModelContainerGetConstantOriginalFQN", self.container, ctypes.c_size_t(index), ctypes.byref(fqn))
            entries.append(ConstantEntry(name.value, self.tensor(*arrays.pop((fqn.value or b"").decode()))))
        assert not arrays, f"constants the image does not ask for: {sorted(arrays)}"
        pairs = (ConstantEntry * len(entries))(*entries)
        self.call(
            "AOTInductorModelContainerUpdateUserManagedConstantBufferPairs",
            self.container, pairs, ctypes.c_size_t(len(entries)), ctypes.c_bool(False), ctypes.c_bool(True),
        )  # fmt: skip

    def run(self, inputs: list[tuple[np.ndarray, str]], dtype: str, width: int) -> np.ndarray:
        """One step. Returns logits [N, width]."""
        handles = (ctypes.c_void_p * len(inputs))(*(self.tensor(*item) for item in inputs))
        output = (ctypes.c_void_p * 1)()
        size = ctypes.c_size_t
        self.call("AOTInductorModelContainerRunSingleThreaded", self.container, handles, size(len(inputs)), output, size(1), None, None)
        pointer = ctypes.c_void_p()
        self.torch.aoti_torch_get_data_ptr(ctypes.c_void_p(output[0]), ctypes.byref(pointer))
        rows = inputs[2][0].shape[0]
        items = rows * width
        raw = ctypes.string_at(pointer.value or 0, items * np.dtype(_NUMPY[dtype]).itemsize)
        self.torch.aoti_torch_delete_tensor_object(ctypes.c_void_p(output[0]))
        return np.frombuffer(raw, dtype=_NUMPY[dtype]).reshape(rows, width).copy()


def main(folder: Path) -> None:
    """Run the job."""
    job = json.loads((folder / "job.json").read_text())
    image = Image(job, folder)
    openmp = ctypes.CDLL("libgomp.so.1")
    worlds: dict[int, list[np.ndarray]] = {}
    for index, step in enumerate(job["steps"]):
        if step["world"] not in worlds:
            worlds[step["world"]] = [np.zeros(shape, dtype=_NUMPY[job["dtype"]]) for shape in job["caches"]]
        openmp.omp_set_num_threads(step["threads"])
        inputs = [(np.load(folder / file), dtype) for file, dtype in step["inputs"]]
        inputs += [(cache, job["dtype"]) for cache in worlds[step["world"]]]
        np.save(folder / f"out_{index}.npy", image.run(inputs, job["dtype"], job["width"]))
    assert "torch" not in sys.modules
    print("ran", len(job["steps"]), "steps without torch")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
