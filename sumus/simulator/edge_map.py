"""The edge through which each client of a simulation reports."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from sumus.errors import at_client, own_code
from sumus.first_hop import FirstHop
from sumus.rng import key
from sumus.simulator.populations.population import Population
from sumus.simulator.virtual_time.account import CountedReport


class EdgeMap:
    """The edges of a population.

    Args:
        population: The clients.
        groups: The assignment of clients to edges: a number of edges, among which the population is divided equally and in
            order; or a function from a client to the name of its edge. 0 if there are no edges.
    """

    def __init__(self, population: Population, groups: int | Callable[[Any], Hashable]) -> None:
        self._population, self._groups = population, groups

    @property
    def identity(self) -> str | None:
        """A hash of the assignment of clients to edges; None if there are no edges."""
        if not self._groups:
            return None
        return key(*(str(self.edge_of(position)) for position in range(len(self._population)))).hex()

    def edge_of(self, position: int) -> Hashable:
        """Return the edge of the client at this position of the population."""
        if callable(self._groups):
            client = self._population.pick(position)
            with (
                at_client(client),
                own_code("the function", "edge_groups=", "it must return a hashable name of an edge for every client"),
            ):
                edge = self._groups(client)
                hash(edge)
            return edge
        return position * self._groups // len(self._population)

    def grouped(self, counted: Sequence[CountedReport]) -> Mapping[tuple[Hashable, int], list[CountedReport]]:
        """Group reports by edge, and by the sum in which they are counted."""
        found = defaultdict[tuple[Hashable, int], list[CountedReport]](list)
        for report in counted:
            found[self.edge_of(report.position), report.into].append(report)
        return found

    def bytes_above(self, counted: Sequence[CountedReport], first_hop: FirstHop) -> int:
        """Return the bytes of the leaves of the sums that edges send to the server for these reports; 0 without edges."""
        if not self._groups:
            return 0
        return sum(first_hop.sum_nbytes(len(members)) for members in self.grouped(counted).values())
