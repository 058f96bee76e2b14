"""Checks every promise: rows and models are compared with what devices have recorded, and with a separate computation."""

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from benchmarks.kills.fleet import Book
from sumus.aggregate import RunningSum
from sumus.errors import SumusError
from sumus.protocol.round import State
from sumus.storage.blobs import Blobs
from sumus.storage.store import Model, Store
from sumus.tree import unnested
from sumus.wire.bundle import Bundle
from sumus.wire.tensors import encode_tree


@dataclass
class Found:
    """The result of an audit.

    Attributes:
        lost: Acknowledged reports that are not counted.
        twice: Reports that are counted twice.
        equal: Models that equal the recomputed ones.
        models: All models.
        most: The most models of one round.
        acknowledged: Acknowledged reports.
        rounds: Rounds.
        wrong: Descriptions of everything that is wrong.
    """

    lost: int = 0
    twice: int = 0
    equal: int = 0
    models: int = 0
    most: int = 0
    acknowledged: int = 0
    rounds: int = 0
    wrong: list[str] = field(default_factory=list[str])

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        right = self.lost == self.twice == 0 and self.equal == self.models and self.most <= 1
        return right and not self.wrong

    def plus(self, other: "Found") -> "Found":
        """Return the sum of two results."""
        return Found(
            self.lost + other.lost,
            self.twice + other.twice,
            self.equal + other.equal,
            self.models + other.models,
            max(self.most, other.most),
            self.acknowledged + other.acknowledged,
            self.rounds + other.rounds,
            self.wrong + other.wrong,
        )

    def __str__(self) -> str:
        return (
            f"{self.lost} acknowledged updates lost, {self.twice} counted twice, {self.equal} of {self.models} models equal to "
            f"the recomputed ones, {self.most} published per round"
        )


class Ledger:
    """Everything that a server's rows have held, over all its lives. The rows forget old rounds, and the ledger does
    not.

    Attributes:
        late: By session, how many versions late it was counted, if a model may be made while others count for the next
            one.
    """

    def __init__(self) -> None:
        self.counted: dict[int, list[str]] = {}
        self.states: dict[int, State] = {}
        self.models: dict[int, Model] = {}
        self.late: dict[str, int] = {}
        self.wrong: list[str] = []

    def read(self, store: Store) -> None:
        """Read the present rows, and check that nothing final has changed."""
        with store.transaction() as rows:
            for row in rows.rounds():
                counted, before = list(rows.counted_in(row.number)), self.states.get(row.number)
                if len(counted) != row.counted:
                    self._wrong(f"round {row.number} has {len(counted)} sessions and counts {row.counted}")
                if before in (State.PUBLISHED, State.ABANDONED) and row.state is not before:
                    self._wrong(f"round {row.number} was {before} and is {row.state}")
                if self.counted.get(row.number, []) != counted[: len(self.counted.get(row.number, []))]:
                    self._wrong(f"sessions of round {row.number} are not those that were in it")
                self.counted[row.number], self.states[row.number] = counted, row.state
            for model in rows.models():
                if self.models.setdefault(model.version, model) != model:
                    self._wrong(f"model {model.version} has changed")

    def _wrong(self, what: str) -> None:
        if what not in self.wrong:
            self.wrong.append(what)

    def audit(self, bundle: Bundle, book: Book, people: int, blobs: Blobs | None = None) -> Found:
        """Check every promise.

        Args:
            bundle: The plan and the first model.
            book: What devices have recorded.
            people: The number of enrolled devices.
            blobs: The blobs of the models.
        """
        found = Found(acknowledged=len(book.acknowledged), rounds=len(self.counted), wrong=list(self.wrong))
        places = Counter(id.partition("#")[0] for those in self.counted.values() for id in those)
        found.lost = len(book.acknowledged - set(places))
        found.twice = sum(number - 1 for number in places.values())
        if strange := set(places) - set(book.sent):
            found.wrong.append(f"{len(strange)} sessions are counted that nobody sent: {min(strange)}")
        if told := book.discarded & set(places):
            found.wrong.append(f"{len(told)} sessions are counted, and their devices were told that they are not")
        of_rounds = Counter(model.round for model in self.models.values() if model.round is not None)
        found.most = max(of_rounds.values(), default=0)
        published = {number for number, state in self.states.items() if state is State.PUBLISHED}
        if published != set(of_rounds):
            found.wrong.append(
                f"rounds {sorted(published ^ set(of_rounds))} are published without a model, or the reverse"
            )
        if waiting := sorted(number for number, state in self.states.items() if state is State.CLOSING):
            found.wrong.append(f"rounds {waiting} have closed, and no model came of them")
        self._recompute(bundle, book, people, found)
        for version, hashes in book.broadcasts.items():
            if len(hashes) > 1 or (version in self.models and hashes != {self.models[version].broadcast}):
                found.wrong.append(f"devices were given other models {version} than the one that is published")
        for model in () if blobs is None else sorted(self.models.values(), key=lambda one: one.version)[-50:]:
            for name in (model.broadcast, model.memory, model.model):
                blobs.get(name)
        return found

    def _recompute(self, bundle: Bundle, book: Book, people: int, found: Found) -> None:
        """Recompute all models from the first one on, from the updates that devices have recorded."""
        plan, hop = bundle.plan, bundle.plan.first_hop
        state = plan.algorithm.start(bundle.model, plan.description)
        for version in range(max(self.models, default=-1) + 1):
            model = self.models.get(version)
            if model is None:
                found.wrong.append(f"there is no model {version}")
                return
            if version > 0:
                total, seeds = RunningSum(), dict[str, None]()
                for id in self.counted.get(-1 if model.round is None else model.round, []):
                    sent = book.sent[id.partition("#")[0]]
                    most = version - 1 - sent.work.version if plan.pacing.buffered else 0
                    late = self.late.get(id, most)
                    if not 0 <= late <= most:
                        found.wrong.append(f"{id} was counted as {late} versions late, of {most}")
                    hop.count_in(sent.update, total, late)
                    seeds[sent.work.seed] = None
                if len(seeds) != 1 or model.contributors != int(total.total.count) or model.parent != version - 1:
                    found.wrong.append(f"model {version} is of {len(seeds)} seeds and {model.contributors} people")
                    seeds.setdefault("00" * 32)
                seed = bytes.fromhex(next(iter(seeds)))
                try:
                    combined = plan.algorithm.combine(total.total, plan.description, plan.sums, seed, people)
                    state = plan.algorithm.step(combined, state, plan.description)
                except SumusError as error:
                    found.wrong.append(f"model {version} cannot be made again: {error}")
            mine = [unnested(state.broadcast), unnested(state.memory), plan.algorithm.release(state)]
            hashes = [hashlib.sha256(encode_tree(tree)).hexdigest() for tree in mine]
            found.models += 1
            found.equal += hashes == [model.broadcast, model.memory, model.model]


def left_behind(store: Store) -> list[str]:
    """Return the keys of sums that are no longer needed. There must be none."""
    left = defaultdict[str, list[int]](list)
    with store.transaction() as rows:
        for row in rows.rounds():
            if row.state in (State.PUBLISHED, State.ABANDONED) and rows.note(row.number, "key") is not None:
                left["keys"].append(row.number)
    return [f"{what} of rounds {numbers} are left behind" for what, numbers in left.items()]
