"""A table of a state machine: the rule that decides about an event in a state, and the states to which it may lead.

The tables of a server's round (`round.py`), an edge's round (`edge.py`) and a site's rounds (`site.py`) are such tables.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

S = TypeVar("S", bound=StrEnum)
F = TypeVar("F")
D = TypeVar("D")


@dataclass(frozen=True)
class Entry(Generic[S, F, D]):
    """The effect of an event in a state.

    Attributes:
        rule: The function that decides. Its arguments are the facts and the event.
        to: The other states to which the event may lead.
    """

    rule: Callable[[F, Any], D]
    to: tuple[S, ...] = ()


@dataclass(frozen=True)
class EventTable(Mapping[tuple[S, type], Entry[S, F, D]], Generic[S, F, D]):
    """The entries of a table, by state and type of event. A table is a value: `on` returns a new one.

    Attributes:
        entries: The entries, in the order in which they were first set.
    """

    entries: Mapping[tuple[S, type], Entry[S, F, D]]

    def __getitem__(self, at: tuple[S, type]) -> Entry[S, F, D]:
        return self.entries[at]

    def __iter__(self) -> Iterator[tuple[S, type]]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def on(self, states: tuple[S, ...], event: type, rule: Callable[[F, Any], D], *to: S) -> "EventTable[S, F, D]":
        """Return the table with an entry for the event in each of the states. It replaces earlier entries.

        Args:
            states: The states in which the event is allowed.
            event: The type of the event.
            rule: The function that decides.
            *to: The states to which the event may lead. A state that is also in `states` is left out of its own entry.
        """
        new = {(state, event): Entry(rule, tuple(other for other in to if other is not state)) for state in states}
        return EventTable({**self.entries, **new})

    def rule(self, state: S, event: object) -> Callable[[F, Any], D] | None:
        """Return the function that decides about an event in a state; None if the table does not allow the event."""
        entry = self.entries.get((state, type(event)))
        return None if entry is None else entry.rule

    def illegal(self, state: S, event: object) -> str | None:
        """Return the name of an event that the table does not allow in this state; None if it allows the event."""
        return None if (state, type(event)) in self.entries else type(event).__name__
