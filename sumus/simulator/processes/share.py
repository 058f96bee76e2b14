"""A share of a round: some of the round's clients train, and their reports are added to sums.

    trainer = Trainer(setting, program)
    sums = Sums()
    for result in trainer.train(number, public, broadcast, groups, sums): ...

A `Trainer` works the same in the simulator's own process, in another process and on a cluster. Sums are integers, and
everything random is keyed by seed, round and client. So the result does not depend on where and in which order clients train.

A `Crew` is all trainers of a run. A *group* of clients trains together, in one call of the executor.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal, Protocol, TypeAlias

from sumus.aggregate import Aggregate, RunningSum
from sumus.errors import ParticipantError, SumusError
from sumus.executors.executor import ClientAssignment, Executor, Trained
from sumus.executors.witness import Witness
from sumus.plan import Plan
from sumus.rng import generator_of, key
from sumus.simulator.populations.population import Population
from sumus.simulator.surprises import clip_to_measure
from sumus.training.program import Program
from sumus.tree import sha256
from sumus.types import Broadcast
from sumus.update.clip import global_norm
from sumus.work import ClientState, ClientWork

ELSEWHERE = (
    "another process computes different results: does the code keep state that sumus does not see, or use settings that "
    "only this process has made, outside the task?"
)
"""The message if proofs differ. Causes: module variables set by a script, torch's settings, a model= that is not seeded."""


@dataclass(frozen=True, slots=True)
class ClientJob:
    """The work of one client in a round, whose report is counted.

    Attributes:
        client: The client's id.
        state: The state that the client kept from earlier rounds.
        again: The number of times that the client had trained in this round before.
        most_steps: The number of local steps that the client has time for; None for all.
        into: The number of the sum to which the report is added.
        staleness: The number of models published since the model on which the client trains.
    """

    client: Any
    state: ClientState = field(default_factory=dict[str, Any])
    again: int = 0
    most_steps: int | None = None
    into: int = 0
    staleness: int = 0


Group: TypeAlias = Sequence[ClientJob]
"""Clients that train together."""


class Sums(defaultdict[int, RunningSum]):
    """The sums to which reports are added, by number."""

    def __init__(self) -> None:
        super().__init__(RunningSum)

    @property
    def totals(self) -> dict[int, Aggregate]:
        """The totals of all sums, by number, as another process can receive them."""
        return {number: running.total for number, running in self.items()}

    def add(self, totals: Mapping[int, Aggregate]) -> None:
        """Add the totals of sums from another process."""
        for number, total in totals.items():
            self[number].add(total)


@dataclass(frozen=True)
class RunSetting:
    """The values with which a process trains its share of a run's rounds. They are the same in every process.

    Attributes:
        plan: The plan, with its data declared, and its task with its code.
        population: The clients.
        seed: The seed of everything random.
        executor: Function that creates an executor from a program and the clients' work.
        skips: Whether a client that fails in a round is left out of that round.
        first: The position of the client whose examples show the format of the data.
        clients: The expected number of client trainings in each process; 0 if unknown.
    """

    plan: Plan
    population: Population
    seed: int
    executor: Callable[[Program, ClientWork], Executor]
    skips: bool = False
    first: int = 0
    clients: int = 0


@dataclass(frozen=True)
class ClientResult:
    """The outcome of one client's training.

    Attributes:
        client: The client's id.
        into: The number of the sum that holds the report.
        examples: The number of examples that the client holds.
        metrics: (sum, count) by name.
        nbytes: Bytes of the report.
        became: "counted"; "refused" if the report was an attacker's; "failed" if an error left no report.
        state: The state that the client keeps once the report is counted.
        alone: The report as an aggregate of one, if the aggregator needs each update; else the report is in the share's sum.
        why: The reason of a failure.
        moved: `Program.moved` of the process in which the client was trained.
        length: The L2 norm of the update as the chain's clip gets it, measured in round 1; None if it was not measured.
    """

    client: Any
    into: int
    examples: int
    metrics: Mapping[str, tuple[float, int]]
    nbytes: int
    became: Literal["counted", "refused", "failed"]
    state: ClientState
    alone: Aggregate | None = None
    why: str = ""
    moved: tuple[str, ...] = ()
    length: float | None = None

    @property
    def settled(self) -> "ClientResult":
        """The result without the client's state, which `ClientStates` keeps."""
        return replace(self, state={}) if self.state else self


class CannotTravel(Exception):
    """The run cannot be sent to another process, or computes something else there; the message gives the reason."""


class Crew(Protocol):
    """Trains the clients of a round, in one process or in many, with the same results."""

    def train(
        self, number: int, public: bytes, broadcast: Broadcast, groups: Iterable[Group], sums: Sums
    ) -> Iterator[ClientResult]:
        """Train clients on the model of a round, and add up their reports.

        Args:
            number: The round, from 0.
            public: The seed that all reports of the round share (`public_seed`).
            broadcast: The broadcast of the server.
            groups: The groups that train together. A group is taken from the iterable when a trainer is free. No client is in
                two groups.
            sums: The sums to which reports are added. They are complete when the iterator ends.

        Yields:
            The result of each client, in any order.

        Raises:
            SumusError: The error of a client's training, with the same message wherever it was trained.
        """
        ...

    def sizes(self, clients: Sequence[Any]) -> list[int]:
        """Return the number of examples of each of these clients, as the model sees them."""
        ...

    def look_again(self) -> Iterable[str]:
        """Train the first client of each process again (`Witness`).

        Returns:
            `Program.moved` of all processes.
        """
        ...

    def close(self) -> None:
        """Stop everything that was started for the crew."""
        ...


def public_seed(plan: Plan, seed: int, number: int) -> bytes:
    """Return the seed that all reports of one sum share.

    It is the round's seed. In asynchronous rounds a sum holds reports on several models, and the seed is that of the run.
    """
    return key(seed, "round", 0 if plan.pacing.buffered else number, "public")


def _failed(errand: ClientJob, error: SumusError, examples: int = 0) -> ClientResult:
    """Return the result of a client that failed in the round: no report, and the reason."""
    why = str(error).removeprefix(f"client {errand.client!r}: ")
    return ClientResult(errand.client, errand.into, examples, {}, 0, "failed", {}, None, why[:300])


def _without_failed(results: Iterable[Trained | ClientResult], failed: list[ClientResult]) -> Iterator[Trained]:
    """Yield the results of clients that trained; append those that failed to `failed`."""
    for one in results:
        if isinstance(one, ClientResult):
            failed.append(one)
        else:
            yield one


class Trainer:
    """A `Crew` of one process: it trains in this process, on one program."""

    def __init__(self, setting: RunSetting, program: Program) -> None:
        self.program = program
        self.executor = setting.executor(program, setting.plan.algorithm.client)
        self.witness = Witness(program, setting.clients, self.read_anew)
        self._setting = setting
        self._hop = setting.plan.first_hop
        self._most = (
            setting.plan.algorithm.update.weight_cap or setting.plan.example_cap or setting.plan.sums.max_weight
        )
        algorithm = setting.plan.algorithm
        for name, part in (
            ("update", algorithm.update),
            ("aggregator", algorithm.aggregator),
            ("server", algorithm.server),
        ):
            program.look_at(name, part)

    def train(
        self, number: int, public: bytes, broadcast: Broadcast, groups: Iterable[Group], sums: Sums
    ) -> Iterator[ClientResult]:
        """Train clients, and yield their results.

        Each group is one call of the executor. If the executor does not use groups, all groups together are one call.
        """
        errands: dict[Any, ClientJob] = {}
        trained: Iterator[Trained | ClientResult]
        if self._setting.skips:
            trained = self._skipping(broadcast, number, groups, errands)
        else:
            runs = groups if self.executor.needs_sizes else (chain.from_iterable(groups),)
            trained = chain.from_iterable(
                self._run(broadcast, number, self._assignments(number, run, errands)) for run in runs
            )
        failed: list[ClientResult] = []
        if type(self._setting.population).sent is not Population.sent:  # attackers, who cooperate in this process
            trained = self._setting.population.sent(_without_failed(trained, failed))
        for one in trained:
            yield (
                one
                if isinstance(one, ClientResult)
                else self._result(one, number, public, errands.pop(one.client), sums)
            )
        yield from failed

    def _run(self, broadcast: Broadcast, number: int, assignments: Iterable[ClientAssignment]) -> Iterator[Trained]:
        return self.witness.run(self.executor, broadcast, number, assignments)

    def read_anew(self, client: Any) -> tuple[Any, Any]:
        """Return a client's (inputs, targets), read and prepared once more."""
        return self.program.reader.convert(client, self._setting.population[client])

    def look_again(self) -> tuple[str, ...]:
        """Train the first client again; return `Program.moved` after it."""
        self.witness.look()
        return tuple(self.program.moved)

    def _skipping(
        self, broadcast: Broadcast, number: int, groups: Iterable[Group], errands: dict[Any, ClientJob]
    ) -> Iterator[Trained | ClientResult]:
        """Train each group, without the clients that fail: if a group fails, each of its clients is trained alone.

        All results of a group are yielded before the next group is taken.
        """
        for group in groups:
            try:
                trained = list(self._run(broadcast, number, self._assignments(number, group, errands)))
            except SumusError as error:
                if len(group) == 1:
                    yield _failed(group[0], error)
                else:
                    yield from self._skipping(broadcast, number, [[errand] for errand in group], errands)
            else:
                yield from trained

    def _result(self, one: Trained, number: int, public: bytes, errand: ClientJob, sums: Sums) -> ClientResult:
        """Return the result of a client that trained."""
        try:
            return self._counted(one, number, public, errand, sums[errand.into])
        except SumusError as error:
            if not self._setting.skips:
                raise
            return _failed(errand, error, one.examples)

    def sizes(self, clients: Sequence[Any]) -> list[int]:
        """Read these clients, and return the number of examples of each; 0 if that fails and failures are skipped."""
        return [self._size(client) for client in clients]

    def _size(self, client: Any) -> int:
        try:
            return len(self.program.reader.read(self._setting.population, client)[0])
        except SumusError:
            if not self._setting.skips:
                raise
            return 0  # the error is reported when the client trains

    def proof(self, step: bool = True) -> str:
        """Hash the initial model, other state that the task's code can read, the first client's examples, and its first step.

        Two processes that compute the same results have the same hash.

        Args:
            step: Whether to include the first step; False for machines that may round differently.
        """
        setting, program = self._setting, self.program
        client = setting.population.pick(setting.first)
        inputs, targets = program.reader.read(setting.population, client)
        one = ClientAssignment(client, inputs, targets, {}, key("proof"), most_steps=1)
        state = setting.plan.algorithm.start(program.initial_shared, setting.plan.description)
        (trained,) = self.executor.run(state.broadcast, 0, [one])
        program.begin_anew()
        trees = [program.initial, {"inputs": inputs.cpu().numpy(), "targets": targets.cpu().numpy()}]
        if step:
            trees += [*trained.parts.values(), *trained.state.values()]
        return key(program.hidden.digest, *map(sha256, trees)).hex()

    def close(self) -> None:
        """Do nothing: nothing was started."""

    def _assignments(
        self, number: int, group: Iterable[ClientJob], errands: dict[Any, ClientJob]
    ) -> Iterator[ClientAssignment]:
        """Yield each client's work. The method adds the jobs that were begun to `errands`, by client."""
        for errand in group:
            errands[errand.client] = errand
            inputs, targets = self.program.reader.read(self._setting.population, errand.client)
            own_key = self._key(number, errand, "training")
            yield ClientAssignment(errand.client, inputs, targets, errand.state, own_key, errand.most_steps)

    def _key(self, number: int, errand: ClientJob, purpose: str) -> bytes:
        """Return the key from which a job's random numbers are drawn; it differs each time a client repeats a round's work."""
        again = [errand.again] if errand.again else []
        return key(self._setting.seed, "round", number, "client", errand.client, purpose, *again)

    def _counted(self, one: Trained, number: int, public: bytes, errand: ClientJob, total: RunningSum) -> ClientResult:
        """Turn a training result into a report, and add the report to a sum."""
        setting, algorithm = self._setting, self._setting.plan.algorithm
        alone, size = None, 0
        became: Literal["counted", "refused"] = "counted"
        rng = None
        if algorithm.update.links:
            rng = generator_of(self._key(number, errand, "transform"))
        weight = setting.population.participation.weight_of(one.client, one.examples, self._most)
        try:
            update = algorithm.report(one.client, one.parts, weight, one.metrics, public, rng)
            size = update.nbytes
            if algorithm.aggregator.needs_each_update:
                alone = self._hop.count_in(update)
            else:
                self._hop.count_in(update, into=total, staleness=errand.staleness)
        except ParticipantError:
            if one.client not in setting.population.attackers:
                raise
            became = "refused"
        moved, length = tuple(self.program.moved), self._length(one, weight) if number == 0 else None
        return ClientResult(
            one.client, errand.into, one.examples, one.metrics, size, became, one.state, alone, "", moved, length
        )

    def _length(self, one: Trained, weight: int) -> float | None:
        """Return the L2 norm of an update as the chain's clip gets it; None if there is no clip."""
        update, params = self._setting.plan.algorithm.update, one.parts.get("params")
        if params is None or clip_to_measure(update) is None:
            return None
        return global_norm(params) * min(weight, update.weight_cap or 1)
