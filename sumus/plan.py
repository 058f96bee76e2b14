"""The plan: a task, an algorithm and a pacing that go together, as data. A server runs a plan.

    plan = Plan(task, fedavg(sgd(lr=0.1)), Pacing(cohort=64))
    plan.id                                     # SHA-256 of plan.to_json()
    Plan.from_json(plan.to_json()) == plan

The constructor checks a plan against the rules in `RULES`. Each rule has a name, and its message says what to do
instead. Some rules hold `anywhere`. Others hold only for plans that are `deployed` (packed or served): there, code
cannot be sent to other machines, and no sum may have a single contributor.
"""

import fnmatch
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np

from sumus.aggregate import BUFFERS, WIDEST, Part
from sumus.algorithm import Algorithm
from sumus.errors import PlanError, expect
from sumus.first_hop import SLACK, FirstHop
from sumus.fixed_point import FixedPoint
from sumus.influence import Influence, influence_of
from sumus.json_names import repeated
from sumus.pacing import Pacing
from sumus.site import Edges
from sumus.spec import call_with, canonical_json, is_custom, read_as, to_json
from sumus.task import Data, Description, Task, description_of
from sumus.tree import nbytes
from sumus.types import Json, hold_plain_numbers
from sumus.update.transform import Context, walk

FORMAT = 1
_MAX_JSON = 16 * 2**20
ADDING = Edges()
MOST_VALUE = 2.0**8
"""The default of the largest absolute value that the sums of a plan can hold."""
MOST_WEIGHT = 2**16
"""The largest weight of one client in a plan that names no cap."""
OVER_SELECT = 1.3
"""The number of devices that get work in a deployed round for each report that it needs, since some devices never answer."""
FITTED = FixedPoint(0, 1.0, 1, 1)
"""A placeholder for a conversion that is as precise as the overflow rule allows for all clients that the pacing chooses."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A task, an algorithm, a pacing, and the limits of a sum.

    Attributes:
        task: A `Task`; or only its description, on a server that does not have the code.
        algorithm: The algorithm.
        pacing: The rules that say who takes part, and when.
        min_contributors: The smallest number of people whose sum a deployed server publishes, as a model or a metric.
            The simulator does not check this.
        sums: The conversion of floats into integers at the first hop. By default, the integers are as precise as the
            overflow rule allows for all chosen clients, since an edge's sum may have more contributors than the cohort.
        edges: The work of edges, if devices report through edges.
        trusts_devices: False if the plan bounds what one device can do to a sum, by a clip and by a cap of its weight.
            True if the plan sets no such bound, because one owner controls all devices. None until `for_devices` is
            called, as in simulations.
    """

    task: Task | Description
    algorithm: Algorithm
    pacing: Pacing
    min_contributors: int = 10
    sums: FixedPoint = FITTED
    edges: Edges = ADDING
    trusts_devices: bool | None = None

    def __post_init__(self) -> None:
        hold_plain_numbers(self)
        expect(self.task, (Task, Description), "task=")
        expect(self.algorithm, Algorithm, "algorithm=")
        expect(self.pacing, Pacing, "pacing=")
        expect(self.edges, Edges, "edges=")
        expect(self.trusts_devices, (bool, type(None)), "trusts_devices=")
        if self.sums is FITTED:
            object.__setattr__(self, "sums", self._fitted())
        for rule, message in self.violations("anywhere"):
            raise PlanError(rule, message)

    def violations(self, where: Literal["anywhere", "deployed"]) -> Iterator[tuple[str, str]]:
        """Yield (rule name, message) for every rule of this kind that the plan breaks."""
        for rule in RULES:
            if rule.where == where and (message := rule.broken(self)):
                yield rule.name, message

    def check_deployable(self, spools: bool = False) -> None:
        """Check that the plan may run on real devices.

        Args:
            spools: Whether the server keeps each update, sealed, until its round is over.

        Raises:
            PlanError: The plan breaks a rule of deployed plans; the error names the first.
        """
        for rule, message in self.violations("deployed"):
            if not (spools and rule == "needs-each-update"):
                raise PlanError(rule, message)

    def with_data(self, data: Data) -> "Plan":
        """Return the same plan with this form of the examples in its task."""
        return replace(self, task=replace(self.task, data=data))

    def for_devices(self) -> "Plan":
        """Return the plan that is sent to devices: values that a simulation leaves open are fixed.

        A plan that leaves `trusts_devices` open becomes a plan that does not trust its devices.
        """
        pacing = self.pacing
        if pacing.over_select is None and not pacing.buffered:
            pacing = replace(pacing, over_select=OVER_SELECT)
        sums, own = self.sums, FixedPoint.fit(self.sums.max_count, self.sums.max_weight, self.sums.bound)
        if sums == self._fitted():
            sums = FITTED
        elif sums == own and sums.max_count < pacing.chosen:  # an edge's sum may hold every chosen device
            sums = FixedPoint.fit(pacing.chosen, sums.max_weight, sums.bound)
        return replace(self, pacing=pacing, sums=sums, trusts_devices=bool(self.trusts_devices))

    @property
    def first_hop(self) -> FirstHop:
        """The first hop: all that an edge or a server needs from the plan in order to check and add updates."""
        return self.algorithm.first_hop(self.description, self.sums, self.edges.rounds, self.metric_cap)

    @property
    def metric_cap(self) -> int | None:
        """The largest number of predictions that counts in a client's metrics; None for any number.

        Only a plan that does not trust its devices has such a cap.
        """
        return self.example_cap if self.trusts_devices is False else None

    @property
    def example_cap(self) -> int | None:
        """The largest number of examples that counts towards a client's weight: 1 if all weights are equal; None
        without a cap.
        """
        caps = [self._cap(part) for part in self.algorithm.aggregator.parts]
        return None if None in caps else max(cap for cap in caps if cap is not None)

    def _cap(self, part: Part) -> int | None:
        """Return the largest number of examples that counts towards a weight in a part; None if only the sums limit it."""
        if part.weight != "examples":
            return 1
        on_device = self.algorithm.update.weight_cap if part.in_chain else None
        cap = on_device or (part.cap and min(part.cap, self.sums.max_weight))
        return cap if cap is not None and cap < MOST_WEIGHT else None

    @property
    def influence(self) -> Influence:
        """The most that one dishonest device can do to a sum of this plan."""
        least = max(
            self.min_contributors, 1 if self.edges.rounds > 1 else self.pacing.fewest
        )  # a site may run rounds with few devices
        fewest = min(self.pacing.cohort, least)
        trusted = bool(self.trusts_devices)
        return influence_of(self.algorithm, self.description, self.sums, fewest, self.edges.rounds, trusted)

    def _fitted(self) -> FixedPoint:
        """Return a conversion that is as precise as 64 bits allow for the largest weights, and for the largest values
        that the clip and the bounds of the parts permit.
        """
        algorithm, shapes = self.algorithm, self.description.trained_layout
        cap, parts = algorithm.update.weight_cap, algorithm.parts(self.description)
        weighed = [part for part in parts if cap is None or not part.in_chain]  # devices multiply the others
        largest = max((part.largest_weight(cap or MOST_WEIGHT) for part in weighed), default=1)
        length, _ = algorithm.update.reach(shapes)
        alone = algorithm.update.code_bits is None and all(part.in_chain or part.bound is not None for part in parts)
        # A site's sum covers several rounds, so it exceeds the bounds of its parts. The bounds of other sums are considered in
        # `FixedPoint.bits`.
        own = (
            max((part.bound or 0.0 for part in parts), default=0.0) * self.edges.rounds
            if self.edges.rounds > 1
            else 0.0
        )
        if length is None or not alone:  # `alone` is False for integer codes, which need no fraction bits
            return FixedPoint.fit(self.pacing.chosen, largest, max(MOST_VALUE, own))
        reach = math.frexp(length * self.edges.rounds * (1 + SLACK))[1]  # the norm is below this power of two
        return FixedPoint.fit(self.pacing.chosen, largest, max(min(2.0**reach, MOST_VALUE), own))

    @property
    def broadcast_nbytes(self) -> int:
        """The number of bytes that a server sends to each device of a round."""
        leaves = {leaf.name: leaf for leaf in self.description.leaves}
        shapes = {**self.description.trained_layout, **self.description.buffer_layout}
        zeros = {name: np.zeros(shape, leaves[name].sum_dtype) for name, shape in shapes.items()}
        state = self.algorithm.start(zeros, self.description)
        return sum(nbytes(tree) for tree in state.broadcast.values())

    @property
    def keeps_state(self) -> bool:
        """Whether a client must keep a state from round to round: a control variate, or personal leaves."""
        return self.algorithm.client.keeps_state or bool(self.description.named("personal"))

    @property
    def description(self) -> Description:
        """The part of the task that can be sent to other machines."""
        return description_of(self.task)

    def to_json(self) -> str:
        """Return the canonical JSON of the plan. Two plans have the same text if and only if they are equal."""
        return canonical_json(
            {
                "sumus": FORMAT,
                "task": to_json(self.description),
                "algorithm": to_json(self.algorithm),
                "pacing": to_json(self.pacing),
                "min_contributors": to_json(self.min_contributors),
                "sums": to_json(self.sums),
                "edges": to_json(self.edges),
                "trusts_devices": to_json(self.trusts_devices),
            }
        )

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Read a plan from its JSON. The text may come from another machine: only registered functions are called, and
        only with JSON.

        Raises:
            PlanError: The text is too long, or is not a plan that this version of sumus can read.
        """
        if len(text) > _MAX_JSON:
            raise PlanError("malformed", f"a plan of {len(text)} characters is over the limit of {_MAX_JSON}")
        with read_as("a plan"):
            fields = cast(dict[str, Json], json.loads(text))
            if (twice := repeated(text.encode("utf-8", "surrogatepass"))) is not None:
                raise PlanError(
                    "malformed", f"a plan in which {twice[0]!r:.80} appears twice in one object (line {twice[1]})"
                )
            if fields.pop("sumus") != FORMAT:
                raise PlanError(
                    "plan-format", f"this version of sumus reads plans of format {FORMAT}; upgrade the older side"
                )
            plan = cast(Plan, call_with(Plan, "plan", fields))
            _ = plan.id  # refuses infinite numbers and text that is not Unicode, which JSON lets through
            _ = plan.first_hop  # refuses codes whose sums need more than 64 bits
            return plan

    @property
    def id(self) -> str:
        """SHA-256 of the canonical JSON, in hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.id)


@dataclass(frozen=True)
class Rule:
    """A rule that every plan, or every deployed plan, must follow.

    Attributes:
        name: The name, which errors quote.
        where: Whether the rule holds "anywhere", or only for "deployed" plans.
        broken: (plan) → what is wrong and what to do instead; None if the plan follows the rule.
    """

    name: str
    where: Literal["anywhere", "deployed"]
    broken: Callable[[Plan], str | None]


def _sums_too_few(plan: Plan) -> str | None:
    if plan.sums.max_count < plan.pacing.cohort:
        return (
            f"sums are planned for {plan.sums.max_count} contributors, but the cohort is {plan.pacing.cohort}: "
            "raise max_count, which costs fraction bits, or lower the cohort"
        )
    return None


def _part_fits(plan: Plan) -> str | None:
    return next((misfit for part in plan.algorithm.aggregator.parts if (misfit := plan.sums.misfit(part))), None)


def _chain_unused(plan: Plan) -> str | None:
    algorithm = plan.algorithm
    links = [
        stage for stage in algorithm.update.links if stage.props.buffer_bound is None
    ]  # clip_buffers acts on buffers, which do not pass through the chain
    if links and not any(part.in_chain for part in algorithm.aggregator.parts):
        return f"no part of this algorithm may be transformed, so {algorithm.update!r} would do nothing: leave it out"
    return None


def _leaf_options(plan: Plan) -> str | None:
    groups = plan.algorithm.client.groups
    trained = [leaf.name for leaf in plan.description.leaves if leaf.trained]
    for group in groups:
        if not fnmatch.filter(trained, group.pattern):
            return (
                f"leaves= names {group.pattern!r}, which matches no trained leaf; the model trains {', '.join(trained)}"
            )
    for name in trained:
        matching = [group.pattern for group in groups if fnmatch.fnmatchcase(name, group.pattern)]
        if len(matching) > 1:
            return (
                f"the patterns {' and '.join(map(repr, matching))} of leaves= both match `{name}`, but a plan stores no order of "
                "patterns: let each leaf match one"
            )
    return None


def _cohort_too_small(plan: Plan) -> str | None:
    aggregator = plan.algorithm.aggregator
    if plan.pacing.cohort < aggregator.least:
        return (
            f"{aggregator!r} needs {aggregator.least} contributors, but the cohort is {plan.pacing.cohort}: every round would "
            "fail; enlarge the cohort, or count on fewer attackers"
        )
    return None


def _needs_each(plan: Plan) -> str | None:
    if plan.algorithm.aggregator.needs_each_update:
        return (
            f"{plan.algorithm.aggregator!r} needs each update separately, but a server keeps only their sum: "
            "simulate it, use mean "
            "with clip_by_global_norm, or serve it with --spool, which keeps each update sealed on the disk until its round ends"
        )
    return None


def _buffer_of_each(plan: Plan) -> str | None:
    aggregator = plan.algorithm.aggregator
    if plan.pacing.buffered and (aggregator.needs_each_update or aggregator.one_by_one or aggregator.least > 1):
        return (
            f"{aggregator!r} needs the reports of a round together, but with concurrency= they come from several models: use "
            "mean, or synchronous rounds"
        )
    return None


def _one_by_one(plan: Plan) -> str | None:
    if plan.algorithm.aggregator.one_by_one:
        return (
            f"{plan.algorithm.aggregator!r} passes each client's model unchanged to the next client: simulate it, or use "
            "fedavg, where a model holds many people's work"
        )
    return None


def _quantize_range(plan: Plan) -> str | None:
    mixed = False
    for stage, before, _ in walk(plan.algorithm.update.links, Context(plan.description.trained_layout, b"")):
        if stage.props.code_bits is not None and not stage.props.has_range and not (mixed and before.norm_bound):
            between = ", with only stages between them that have Props(keeps_norm=True)"
            return f"{stage!r} has no range: put clip_by_global_norm and rotate before it{between}; or give it range="
        mixed = mixed or stage.props.mixes
    return None


def _weight_first(plan: Plan) -> str | None:
    seen: str | None = None
    for stage in plan.algorithm.update.links:
        if stage.props.weight_cap is not None and seen is not None:
            return f"{stage!r} comes after {seen}: a weight after the clip undoes the clip; put weight first, and only once"
        seen = repr(stage)
    return None


def _weight_twice(plan: Plan) -> str | None:
    uniform = [p.name for p in plan.algorithm.aggregator.parts if p.in_chain and (p.weight != "examples" or p.cap)]
    if plan.algorithm.update.weight_cap is not None and uniform:
        return (
            f"the chain weighs by examples and part {uniform[0]!r} is weighted otherwise, or has a cap of its own: drop the "
            'weight stage, or let the part count weight="examples" without cap='
        )
    return None


def _too_few_people(plan: Plan) -> str | None:
    if plan.min_contributors < 2:
        return (
            f"min_contributors={plan.min_contributors}: a sum over one person is that person's update; give at least 2"
        )
    if plan.pacing.cohort < plan.min_contributors:
        return (
            f"a cohort of {plan.pacing.cohort} never reaches min_contributors={plan.min_contributors}: enlarge the cohort, or "
            "lower min_contributors (at least 2)"
        )
    return None


def _cannot_travel(plan: Plan) -> str | None:
    algorithm = plan.algorithm
    if (loop := algorithm.client.loop) is not None and is_custom(algorithm.client):
        return (
            f"the plan names a client's own code, so that devices find it in their own files, and `{loop.train}`"
            f"{f' or `{loop.evaluate}`' if loop.evaluate else ''} is a lambda, a method, an object, or inside another function: "
            "define it at the top of a module, with def"
        )
    for value in (algorithm.client, algorithm.update, algorithm.aggregator, algorithm.server):
        if found := is_custom(value):
            return (
                f"{found[0]} has no registered name, and code is not sent to devices: decorate its factory with "
                "@sumus.registered"
            )
    return None


def _undeclared_data(plan: Plan) -> str | None:
    if plan.description.data is None:
        return "the task does not say what its examples look like: give Task(data=), or `examples` in the file to pack"
    return None


def _site_parts(plan: Plan) -> str | None:
    algorithm = plan.algorithm
    if plan.edges.rounds == 1:
        return None
    sent, down = [part.name for part in algorithm.aggregator.parts], algorithm.client.rules.receives
    if sent != ["params"] or tuple(down) != ("params",):
        return (
            f"a site sends how far its model has moved, but this algorithm sends {sorted(sent)} and broadcasts {sorted(down)}: "
            "let edges add, with Edges(rounds=1), or use fedavg, fedprox or a server optimizer of params"
        )
    if not isinstance(denominator := algorithm.aggregator.parts[0].denominator, str) or denominator == "population":
        return (
            f"params are divided by {denominator!r}, which does not depend on who takes part, but a site has its own clients: "
            "divide by weight or count, or let edges add, with Edges(rounds=1)"
        )
    return None


def _site_sum(plan: Plan) -> str | None:
    aggregator = plan.algorithm.aggregator
    if plan.edges.rounds > 1 and (aggregator.needs_each_update or aggregator.one_by_one):
        return f"{aggregator!r} cannot work on a sum, but a site sends one: use mean, or Edges(rounds=1)"
    return None


def _site_state(plan: Plan) -> str | None:
    if plan.edges.rounds > 1 and plan.keeps_state:
        return (
            "clients keep a state between rounds of the server, but a site runs rounds of its own: let edges add, with "
            "Edges(rounds=1), or use an algorithm without client state and no personal leaves"
        )
    return None


def _site_buffer(plan: Plan) -> str | None:
    if plan.edges.rounds > 1 and plan.pacing.buffered:
        return (
            "a site's rounds start from one model of the server, but with concurrency= devices work on several "
            "models: use synchronous "
            "rounds, or Edges(rounds=1)"
        )
    return None


def _site_codes(plan: Plan) -> str | None:
    update, parts = plan.algorithm.update, plan.algorithm.aggregator.parts
    multiplies = update.weight_cap is None and all(part.weight == "examples" for part in parts if part.in_chain)
    if plan.edges.rounds > 1 and update.code_bits is not None and not multiplies:
        return (
            f"codes that no weight multiplies leave no room for a sum over {plan.edges.rounds} rounds: weigh by "
            "examples, without a weight stage; or leave out quantize, or use Edges(rounds=1)"
        )
    return None


def _site_lifts(plan: Plan) -> str | None:
    if plan.edges.rounds > 1 and not plan.algorithm.update.lifts:
        stage = next(stage for stage in plan.algorithm.update.links if not stage.lifts)
        return f"{stage!r} can be inverted but not lifted, as a site's sum must be: give its Transform a lift="
    return None


def _noise_at_sites(plan: Plan) -> str | None:
    if plan.edges.rounds > 1 and plan.edges.noise_at == "edges":
        return (
            "no privacy ledger of this version of sumus accounts for noise that sites add in each of their rounds: "
            "use noise_at='top', or "
            "Edges(rounds=1)"
        )
    return None


def _noise_at_edges(plan: Plan) -> str | None:
    if plan.edges.noise_at == "edges":
        return (
            "no edge of this version of sumus adds noise, and no privacy ledger accounts for it: take "
            "noise_at='top', which is only displayed so far"
        )
    return None


def _trusts_devices(plan: Plan) -> str | None:
    if plan.trusts_devices:
        return None
    found = plan.influence
    if found.step is not None and found.length is not None and plan.example_cap is not None and not found.open:
        return None
    steps: list[str] = []
    remedies: list[str] = []
    params = next(part for part in plan.algorithm.aggregator.parts if part.name == "params")
    if found.length is None:
        steps.append("nothing limits the norm of its update")
        if not params.in_chain:
            remedies.append(
                "the update of this algorithm does not pass through the chain, so nothing can clip it: use another algorithm"
            )
        elif (stage := plan.algorithm.update.lengthening) is not None:
            remedies.append(
                f"{stage!r} does not say that it keeps norms: give it Props(keeps_norm=True) if neither `apply` nor "
                "`invert` makes a "
                "norm larger; or give it longest= and unit=, which bound the norm"
            )
        else:
            remedies.append("put clip_by_global_norm(...) into the update's chain, before any rotate and quantize")
    elif found.step is None:
        steps.append("nothing says how far that moves the model")
        remedies.append(
            f"give {plan.algorithm.aggregator!r} an Aggregator(longest=), which bounds this, or Aggregator(chosen=) if it "
            "chooses among updates"
        )
    if plan.example_cap is None:
        steps.append("nothing bounds its weight further")
        remedies.append(
            'give all clients the same weight (weight="uniform", if the algorithm has it), or set the largest number of examples '
            f"that counts (cap=, below {MOST_WEIGHT})"
        )
    for name in found.open:
        steps.append(f"it can move each number of `{name}` by {found.others[name]:.4g}")
        remedies.append(_BOUNDS.get(name, f"give Part({name!r}, bound=) a bound below {WIDEST:g}"))
    return (
        f"one device that lies can have {found.share:.2%} of a sum of {found.contributors}, and {', and '.join(steps)}: "
        f"{'; '.join(remedies)}. `sumus check FILE.py` proposes values from the examples at hand. If all devices are your own, "
        "give Plan(trusts_devices=True)"
    )


_BOUNDS = {
    BUFFERS: "put clip_buffers(...) into the update's chain, or use a model without averaged buffers (GroupNorm in place of "
    "BatchNorm)",
    "steps": f"bound the steps of a round: fednova(most_steps=), with ‖a‖₁ below {WIDEST:g}",
    "control": f"bound the control below {WIDEST:g}: scaffold(control_bound=)",
}
"""How to bound the parts of sumus's own algorithms that do not pass through the chain."""


RULES: tuple[Rule, ...] = (
    Rule("sum-count", "anywhere", _sums_too_few),
    Rule("chain-unused", "anywhere", _chain_unused),
    Rule("cohort-too-small", "anywhere", _cohort_too_small),
    Rule("buffer-needs-sum", "anywhere", _buffer_of_each),
    Rule("leaf-options", "anywhere", _leaf_options),
    Rule("quantize-range", "anywhere", _quantize_range),
    Rule("weight-first", "anywhere", _weight_first),
    Rule("weight-twice", "anywhere", _weight_twice),
    Rule("part-fits", "anywhere", _part_fits),
    Rule("site-parts", "anywhere", _site_parts),
    Rule("site-sum", "anywhere", _site_sum),
    Rule("site-state", "anywhere", _site_state),
    Rule("site-buffer", "anywhere", _site_buffer),
    Rule("site-codes", "anywhere", _site_codes),
    Rule("site-lifts", "anywhere", _site_lifts),
    Rule("noise-at-sites", "anywhere", _noise_at_sites),
    Rule("noise-at-edges", "deployed", _noise_at_edges),
    Rule("needs-each-update", "deployed", _needs_each),
    Rule("one-by-one", "deployed", _one_by_one),
    Rule("min-contributors", "deployed", _too_few_people),
    Rule("custom-name", "deployed", _cannot_travel),
    Rule("undeclared-data", "deployed", _undeclared_data),
    Rule("trusts-devices", "deployed", _trusts_devices),
)
"""The rules that are checked when a plan is built or deployed.

Further rules are checked where a value itself is made: sum-overflow, parts-match, quantize-last, epochs-or-steps,
part-words, pacing-buffer, positive, own-loop.
"""
