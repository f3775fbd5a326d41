"""Which adapter is in which slot of the pool, and which slots running sequences use. Plain Python; the scheduler owns it."""

from __future__ import annotations

from collections import OrderedDict

from llmc.errors import InternalError


class LoraSlots:
    """A slot is given to an adapter while sequences of it run, and stays its own afterwards until another needs it, the one unused
    longest first.

    Args:
        num_slots: adapters that a step may use.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._slot_of: OrderedDict[int, int] = OrderedDict()  # adapter -> slot; the one used last is at the end
        self._users: dict[int, int] = {}  # adapter -> running sequences
        self._pending: list[tuple[int, int]] = []

    # Asking changes nothing.

    def can_acquire(self, adapter: int) -> bool:
        """Whether a sequence of `adapter` may start now."""
        return adapter in self._slot_of or len(self._users) < self.num_slots

    def running(self) -> list[int]:
        """Adapters that running sequences use."""
        return list(self._users)

    def check(self, adapters: list[int]) -> None:
        """Recount: `adapters` are those of the running sequences.

        Raises:
            InternalError: the books are wrong.
        """
        counted = {adapter: adapters.count(adapter) for adapter in adapters if adapter}
        slots = list(self._slot_of.values())
        if counted != self._users or len(set(slots)) != len(slots) or len(slots) > self.num_slots or not set(counted) <= set(self._slot_of):
            raise InternalError(f"scheduler: slots {dict(self._slot_of)} and users {self._users} of adapters, counted {counted}")

    # Doing.

    def acquire(self, adapter: int) -> int:
        """The slot for one more running sequence of `adapter`. Ask `can_acquire` first."""
        slot = self._slot_of.get(adapter)
        if slot is None:
            slot = self._free_slot()
            self._pending.append((slot, adapter))
        self._slot_of[adapter] = slot
        self._slot_of.move_to_end(adapter)
        self._users[adapter] = self._users.get(adapter, 0) + 1
        return slot

    def release(self, adapter: int) -> None:
        """A running sequence of `adapter` has ended, or gave way."""
        self._users[adapter] -= 1
        if not self._users[adapter]:
            del self._users[adapter]

    def forget(self, slot: int) -> None:
        """What was to be brought into a slot is not there; the next sequence that wants it brings it again."""
        for adapter in [one for one, its in self._slot_of.items() if its == slot]:
            if adapter in self._users:
                raise InternalError(f"scheduler: adapter {adapter} was lost while sequences of it run")
            del self._slot_of[adapter]

    def clear(self) -> None:
        """No sequence runs any more, and nothing is said about what the slots hold."""
        self._slot_of.clear()
        self._users.clear()
        self._pending.clear()

    def take_loads(self) -> tuple[tuple[int, int], ...]:
        """(slot, adapter) of those that must be brought in before the step that is being planned. Asked once a step."""
        loads, self._pending = tuple(self._pending), []
        return loads

    def _free_slot(self) -> int:
        taken = set(self._slot_of.values())
        if len(taken) < self.num_slots:
            return min(set(range(self.num_slots)) - taken)
        for adapter in self._slot_of:
            if adapter not in self._users:
                return self._slot_of.pop(adapter)
        raise InternalError("scheduler: a sequence started without a free slot for its adapter")
