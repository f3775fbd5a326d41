"""The adapters an engine knows, by number: each number is one reading of one folder and is never given again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from llmc.artifacts.manifest import LoraFacts
from llmc.errors import ConfigError, InternalError, RequestRejected
from llmc.runtime.lora.adapter import read_adapter
from llmc.runtime.lora.modules import MAX_ADAPTERS, AdapterPath, check_name
from llmc.runtime.lora.pool import LoraPool


class AdapterStore:
    """Adapters in the host's memory, and the pool that steps read.

    Args:
        facts: of the artifact.
        max_kept: how many stay in memory; others are read again when they are needed. None: all.
        adapters: known from the start; each is read, so that a bad one is found now.

    Raises:
        ConfigError: an adapter is missing, wrong or not built.
    """

    def __init__(self, facts: LoraFacts, adapters: Sequence[AdapterPath] = (), *, max_kept: int | None = None) -> None:
        self.pool = LoraPool(facts)
        self._facts = facts
        self._max_kept = max_kept
        self._number_of: dict[str, int] = {}
        self._paths: dict[int, AdapterPath] = {}
        self._digests: dict[int, bytes] = {}  # of those that may have to be read again
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()  # the one used last is at the end
        self._next = 1  # 0 is the model itself
        for adapter in adapters:
            self.add(adapter)

    def number_of(self, name: str) -> int:
        """The number requests for `name` run under.

        Raises:
            RequestRejected: there is no such adapter.
        """
        number = self._number_of.get(name)
        if number is None:
            raise RequestRejected(f"there is no adapter {name[:140]!r}", status=404, param="model", code="model_not_found")
        return number

    def name_of(self, number: int) -> str:
        """What clients call, or called, an adapter."""
        return self._paths[number].name

    def names(self) -> list[str]:
        return list(self._number_of)

    def add(self, adapter: AdapterPath) -> int:
        """Read an adapter. Returns its number.

        Raises:
            ConfigError: it cannot be served, or its name is taken.
        """
        check_name(adapter.name)
        if adapter.name in self._number_of:
            raise ConfigError(f"there is an adapter {adapter.name!r} already; unload it first, or take another name")
        if len(self._number_of) >= MAX_ADAPTERS:
            raise ConfigError(f"{MAX_ADAPTERS} adapters are loaded, as many as are kept; unload one first")
        try:
            elements = read_adapter(adapter.path, self._facts)
        except ConfigError as error:
            raise ConfigError(f"adapter {adapter.name}: {error}") from error
        number, self._next = self._next, self._next + 1
        self._number_of[adapter.name], self._paths[number] = number, adapter
        if self._max_kept is not None:
            self._digests[number] = _digest(elements)
        self._keep(number, elements)
        return number

    def remove(self, name: str) -> int:
        """Take no more requests for an adapter; those accepted before go on. Returns its number.

        Raises:
            RequestRejected: there is no such adapter.
        """
        number = self.number_of(name)
        del self._number_of[name]
        return number

    def forget(self, number: int) -> None:
        """Free what is kept of an adapter that was removed and that no request uses any more."""
        if number in self._number_of.values():
            raise InternalError(f"adapter {number} is forgotten while requests may name it; please report this")
        self._kept.pop(number, None)
        self._paths.pop(number, None)
        self._digests.pop(number, None)

    def bring(self, slot: int, number: int) -> None:
        """Write an adapter into a slot of the pool, between steps.

        Raises:
            ConfigError: it had to be read again and its files have changed for the worse.
        """
        elements = self._kept.get(number)
        if elements is None:
            adapter = self._paths[number]
            elements = read_adapter(adapter.path, self._facts)
            if _digest(elements) != self._digests[number]:
                raise ConfigError(f"adapter {adapter.name}: {adapter.path} holds other weights than when it was loaded; load it again")
        self._keep(number, elements)
        self.pool.write(slot, elements)

    def _keep(self, number: int, elements: np.ndarray) -> None:
        self._kept[number] = elements
        self._kept.move_to_end(number)
        while self._max_kept is not None and len(self._kept) > self._max_kept:
            self._kept.popitem(last=False)


def _digest(elements: np.ndarray) -> bytes:
    return hashlib.blake2b(elements.data, digest_size=16).digest()
