"""A share of a round: some of its clients train, and what they send is counted in.

    trainer = Trainer(setting, program)
    total = RunningSum()
    for result in trainer.train(number, broadcast, groups, total): ...

It is the same in the simulator's own process, in a process beside it and on a cluster. Sums are integers, and everything random
is keyed by seed, round and client: who trains whom, where and in which order changes nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, Protocol, TypeAlias

from sumus.aggregate import Aggregate, RunningSum
from sumus.errors import ParticipantError
from sumus.fleet import PERFECT, Fate, Fleet
from sumus.plan import Plan
from sumus.rng import generator, key
from sumus.simulator.population import Population
from sumus.training.executor import Assignment, Executor, Trained
from sumus.training.graph import leaving_no_trace
from sumus.training.program import Program
from sumus.training.rewrite import NotCapturable
from sumus.tree import sha256
from sumus.types import Broadcast
from sumus.work import ClientState, ClientWork

ELSEWHERE = "another process computes something else: are there settings that only this one has made, outside the task?"
"""Said where proofs differ: a module's variables that a script set, torch's settings, a model= that is not seeded."""

Group: TypeAlias = Sequence[tuple[Any, ClientState]]
"""Clients that train together, each with what it kept from earlier rounds."""


@dataclass(frozen=True)
class Setting:
    """What it takes to train shares of a run's rounds: the same in every process.

    plan: with its data declared, and its task with its code.  executor: makes one, of a program and the clients' work.
    """

    plan: Plan
    population: Population
    seed: int
    fleet: Fleet
    executor: Callable[[Program, ClientWork], Executor]


@dataclass(frozen=True)
class Result:
    """What came of one client's training.

    metrics: (sum, count) by name.  nbytes: of its report.  became: whether that is counted, was lost on its way, or was an
    attacker's and refused.  state: what it is to keep once it is counted.  alone: its aggregate of one, where the aggregator
    needs each update; else it is in the share's sum.
    """

    client: Any
    examples: int
    metrics: Mapping[str, tuple[float, int]]
    nbytes: int
    became: Literal["counted", "lost", "refused"]
    state: ClientState
    alone: Aggregate | None = None

    @property
    def settled(self) -> "Result":
        """The same without the state, which is kept elsewhere."""
        return replace(self, state={}) if self.state else self


class CannotTravel(Exception):
    """A run cannot be taken up by another process; the message says why."""


class Crew(Protocol):
    """Where the clients of a round are trained: in one process or in many, with the same results."""

    def train(self, number: int, broadcast: Broadcast, groups: Iterable[Group], total: RunningSum) -> Iterator[Result]:
        """Train clients in round `number`, from 0. What is summed goes into `total`, whole when the iterator ends.

        groups: taken one by one, as there is room for them. Results come in any order; who was late has none.
        Raises what a client's training raises, in the same words wherever it was.
        """
        ...

    def sizes(self, clients: Sequence[Any]) -> list[int]:
        """How many examples each of these clients holds, as the model sees them."""
        ...

    def close(self) -> None:
        """End everything that was begun for it."""
        ...


class Trainer:
    """A `Crew` of one: trains in this process, on one program."""

    def __init__(self, setting: Setting, program: Program) -> None:
        self.program = program
        self.executor = setting.executor(program, setting.plan.algorithm.client)
        self._setting = setting
        self._hop = setting.plan.first_hop
        self._perfect = setting.fleet == PERFECT

    def train(self, number: int, broadcast: Broadcast, groups: Iterable[Group], total: RunningSum) -> Iterator[Result]:
        """Train clients; a group is one call of the executor, and where groups do not matter to it, all of them are."""
        lost: dict[Any, bool] = {}
        runs = groups if self.executor.needs_sizes else (chain.from_iterable(groups),)
        trained = chain.from_iterable(
            self.executor.run(broadcast, number, self._assignments(number, run, lost)) for run in runs
        )
        public = key(self._setting.seed, "round", number, "public")
        for one in self._setting.population.sent(trained):
            yield self._counted(one, number, public, lost[one.client], total)

    def sizes(self, clients: Sequence[Any]) -> list[int]:
        """How many examples each of these clients holds: reads them."""
        return [len(self.program.reader.read(self._setting.population, client)[0]) for client in clients]

    def proof(self, step: bool = True) -> str:
        """A hash of the initial model and the first client's examples, and of its first step: equal where the same is computed.

        step: without it, for machines that may round otherwise.
        CannotTravel for a model that draws from Python or numpy, or keeps count: what it does depends on what it did before.
        """
        setting, program = self._setting, self.program
        client = setting.population.pick(0)
        inputs, targets = program.reader.read(setting.population, client)
        one = Assignment(client, inputs, targets, {}, key("proof"), most_steps=1)
        state = setting.plan.algorithm.start(program.initial_shared, setting.plan.description)
        try:
            with leaving_no_trace(program):
                (trained,) = self.executor.run(state.broadcast, 0, [one])
        except NotCapturable as reason:
            raise CannotTravel(str(reason)) from reason
        trees = [program.initial, {"inputs": inputs.cpu().numpy(), "targets": targets.cpu().numpy()}]
        if step:
            trees += [*trained.parts.values(), *trained.state.values()]
        return key(*map(sha256, trees)).hex()

    def close(self) -> None:
        """Nothing was begun."""

    def _assignments(
        self, number: int, clients: Iterable[tuple[Any, ClientState]], lost: dict[Any, bool]
    ) -> Iterator[Assignment]:
        """Each client's work, drawing what becomes of it; whoever will be late need not begin."""
        setting = self._setting
        for client, state in clients:
            inputs, targets = self.program.reader.read(setting.population, client)
            fate = self._fate(number, client, len(inputs))
            if not fate.late:
                lost[client] = fate.lost
                own_key = key(setting.seed, "round", number, "client", client, "training")
                yield Assignment(client, inputs, targets, state, own_key, fate.most_steps)

    def _fate(self, number: int, client: Any, examples: int) -> Fate:
        if self._perfect:
            return Fate()
        rng = generator(self._setting.seed, "round", number, "client", client, "fleet")
        return self._setting.fleet.fate(self._setting.plan.algorithm.client.step_count(examples), rng)

    def _counted(self, one: Trained, number: int, public: bytes, lost: bool, total: RunningSum) -> Result:
        """Report what was trained, and count it in unless it is lost."""
        setting, algorithm = self._setting, self._setting.plan.algorithm
        alone, size = None, 0
        became: Literal["counted", "lost", "refused"] = "lost" if lost else "counted"
        rng = None
        if algorithm.update.links:
            rng = generator(setting.seed, "round", number, "client", one.client, "transform")
        try:
            update = algorithm.report(one.client, one.parts, one.examples, one.metrics, public, rng)
            size = update.nbytes
            if not lost:
                if algorithm.aggregator.needs_each_update:
                    alone = self._hop.count_in(update)
                else:
                    self._hop.count_in(update, into=total)
        except ParticipantError:
            if one.client not in setting.population.attackers:
                raise
            became = "refused"
        return Result(one.client, one.examples, one.metrics, size, became, one.state, alone)
