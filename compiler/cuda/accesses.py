"""Which pointers a kernel of ours reads and writes, from the intermediate code that Triton makes of it.

torch parses that code (torch._higher_order_ops.triton_kernel_wrap). What it makes of it differs: 2.11 says what is written alone, and
takes numbers for constants. So values are followed here, from the address of every load and store back to the parameters it is made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from llmc.errors import InternalError

# Operation -> place of its address. Atomic ones do both.
_READS = {"tt.load": 0, "tt.descriptor_load": 0, "tt.atomic_cas": 0, "tt.atomic_rmw": 0}
_WRITES = {"tt.store": 0, "tt.descriptor_store": 0, "tt.atomic_cas": 0, "tt.atomic_rmw": 0}
_UNKNOWN = "tt.elementwise_inline_asm"
# Of these the first operand is memory, the others are sizes and places.
_ADDRESS_FIRST = ("tt.make_tensor_ptr", "tt.advance", "tt.make_tensor_descriptor")

Functions = Mapping[str, Mapping[Any, Iterable[Any]]]


def pointer_accesses(launch: Any) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the pointers that a launch (`kernels.launch.Launch`) reads, and that it writes.

    Raises:
        InternalError: an operation's effect is not known.
    """
    from torch._higher_order_ops.triton_kernel_wrap import ttir_to_functions

    from llmc.kernels.aot import intermediate_code

    given = [p.name for p in launch.kernel.params if p.name not in launch.constants]
    code = intermediate_code(launch)  # what is touched is no matter of the architecture
    functions: Functions = ttir_to_functions(code)
    entry = next(iter(functions))
    if launch.kernel.fn.__name__ not in entry:
        raise InternalError(f"the code of kernel {launch.kernel.__name__} begins with {entry}; please report this")
    reads, writes = _accesses(functions, entry)
    pointers = {number: name for number, name in enumerate(given) if isinstance(launch.args[name], Tensor)}
    return frozenset(pointers[n] for n in reads & pointers.keys()), frozenset(pointers[n] for n in writes & pointers.keys())


def _accesses(functions: Functions, name: str) -> tuple[set[int], set[int]]:
    """Numbers of the parameters through which a function reads, and writes; numbers that go into an address are among them."""
    reads: list[Any] = []
    writes: list[Any] = []
    for made in functions[name].values():
        for op in made:
            if op.name == _UNKNOWN and not op.is_pure:
                raise InternalError(f"a kernel holds assembly ({name}), of which a plan cannot tell what it touches; please report this")
            if op.name == "tt.call":
                inner = _accesses(functions, op.fn_call_name)
                for found, numbers in zip((reads, writes), inner, strict=True):
                    found.extend(arg for number, arg in enumerate(op.args) if number in numbers)
            if op.name in _READS:
                reads.append(op.args[_READS[op.name]])
            if op.name in _WRITES:
                writes.append(op.args[_WRITES[op.name]])
    return _parameters(functions[name], reads, through_loads=True), _parameters(functions[name], writes, through_loads=False)


def _parameters(made: Mapping[Any, Iterable[Any]], addresses: list[Any], *, through_loads: bool) -> set[int]:
    """Numbers of the parameters that addresses are made of. through_loads: also of what was loaded to make them."""
    from torch._higher_order_ops.triton_kernel_wrap import Intermediate, Param

    found: set[int] = set()
    seen: set[Any] = set()
    pending = list(addresses)
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        if isinstance(value, Param):
            found.add(value.idx)
        elif isinstance(value, Intermediate) and not value.fake():
            for op in made[value]:
                if op.name in _ADDRESS_FIRST:
                    pending.append(op.args[0])
                elif through_loads or op.name != "tt.load":
                    pending.extend(op.args)
    return found
