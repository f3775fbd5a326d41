"""Where a step's tensors live: regions from outside by name, everything else at an offset of one arena.

While a schedule is walked, a value is a fake tensor, and the memory behind it is told by its storage: views share it, whatever their
shape, and a tensor that an op of ours allocates on the way is new memory by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from llmc.artifacts.plan import Region, RegionKind
from llmc.artifacts.plan_check import REGION_ALIGNMENT


@dataclass(slots=True)
class Memory:
    """One piece of memory. `first` and `last`: the launches between which an arena piece is needed, both included."""

    tensor: Tensor  # keeps the storage, so that its identity stays its own
    name: str | None  # of a region; None: in the arena
    kind: RegionKind
    nbytes: int
    open_size: bool = False
    first: int = -1
    last: int = -1


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes [start, stop) of a piece of memory."""

    memory: int
    start: int
    stop: int


@dataclass
class MemoryTable:
    """All memory of a schedule, by storage."""

    pieces: list[Memory] = field(default_factory=list)
    _by_storage: dict[int, int] = field(default_factory=dict)

    def add(self, tensor: Tensor, name: str | None, kind: RegionKind, *, open_size: bool = False) -> None:
        """Register the storage of a tensor."""
        storage = tensor.untyped_storage()
        self._by_storage[storage._cdata] = len(self.pieces)
        self.pieces.append(Memory(tensor=tensor, name=name, kind=kind, nbytes=storage.nbytes(), open_size=open_size))

    def place(self, tensor: Tensor) -> Place:
        """The bytes of a tensor, from its first to its last; its memory becomes a new arena piece if nobody has seen it."""
        if tensor.untyped_storage()._cdata not in self._by_storage:
            self.add(tensor, None, "arena")
        start = int(tensor.storage_offset()) * tensor.itemsize
        return Place(self._by_storage[tensor.untyped_storage()._cdata], start, start + span_bytes(tensor))

    def use(self, place: Place, launch: int) -> None:
        """Note that a launch touches a place."""
        piece = self.pieces[place.memory]
        piece.first = launch if piece.first < 0 else piece.first
        piece.last = max(piece.last, launch)


def span_bytes(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to its last, both included."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (int(last) + 1) * tensor.itemsize


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Final regions; `index` and `base` of each piece of memory."""

    regions: list[Region]
    index: list[int]
    base: list[int]


def lay_out(table: MemoryTable) -> Layout:
    """Give every piece its region, arena pieces an offset where they overlap none that lives at the same time. Deterministic."""
    regions: list[Region] = []
    index, base = [-1] * len(table.pieces), [0] * len(table.pieces)
    for number, piece in enumerate(table.pieces):
        if piece.name is not None:
            index[number] = len(regions)
            regions.append(Region(name=piece.name, kind=piece.kind, size_bytes=None if piece.open_size else piece.nbytes))
    inner = [(n, p) for n, p in enumerate(table.pieces) if p.name is None and p.first >= 0]
    offsets, size = pack([(p.nbytes, p.first, p.last) for _, p in inner])
    for (number, _), offset in zip(inner, offsets, strict=True):
        index[number], base[number] = len(regions), offset
    if inner:
        regions.append(Region(name="arena", kind="arena", size_bytes=size))
    return Layout(regions=regions, index=index, base=base)


def pack(lives: list[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Offsets for pieces of memory given as (bytes, first use, last use), and the size of the whole.

    Largest first, each at the lowest offset that is free during its life; offsets are multiples of REGION_ALIGNMENT.
    """
    offsets = [0] * len(lives)
    placed: list[tuple[int, int, int, int]] = []  # offset, bytes, first, last
    for number in sorted(range(len(lives)), key=lambda n: (-lives[n][0], lives[n][1], n)):
        nbytes, first, last = lives[number]
        nbytes = -(-max(nbytes, 1) // REGION_ALIGNMENT) * REGION_ALIGNMENT
        offset = 0
        for start, length, begin, end in sorted(placed):
            if begin <= last and first <= end:
                if offset + nbytes <= start:
                    break
                offset = max(offset, start + length)
        offsets[number] = offset
        placed.append((offset, nbytes, first, last))
    return offsets, max((offset + length for offset, length, *_ in placed), default=0)
