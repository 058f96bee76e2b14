"""Which edge each client of a simulation reports through."""

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
        groups: How clients are grouped behind edges: how many edges there are, each with as many clients, in the population's
            order; or a function that names the edge of a client. 0 if there are no edges.
    """

    def __init__(self, population: Population, groups: int | Callable[[Any], Hashable]) -> None:
        self._population, self._groups = population, groups

    @property
    def identity(self) -> str | None:
        """A hash of which edge each client reports through; None if there are no edges."""
        if not self._groups:
            return None
        return key(*(str(self.edge_of(position)) for position in range(len(self._population)))).hex()

    def edge_of(self, position: int) -> Hashable:
        """The edge of the client at this place of the population."""
        if callable(self._groups):
            client = self._population.pick(position)
            with (
                at_client(client),
                own_code("the function", "edge_groups=", "it must name an edge, which can be a key, for every client"),
            ):
                edge = self._groups(client)
                hash(edge)
            return edge
        return position * self._groups // len(self._population)

    def grouped(self, counted: Sequence[CountedReport]) -> Mapping[tuple[Hashable, int], list[CountedReport]]:
        """Group reports by the edge that they come through, and the sum that they go into."""
        found = defaultdict[tuple[Hashable, int], list[CountedReport]](list)
        for report in counted:
            found[self.edge_of(report.position), report.into].append(report)
        return found

    def bytes_above(self, counted: Sequence[CountedReport], first_hop: FirstHop) -> int:
        """Bytes of the leaves of the sums that edges send up for these reports; 0 if there are no edges."""
        if not self._groups:
            return 0
        return sum(first_hop.sum_nbytes(len(members)) for members in self.grouped(counted).values())
