"""Notes on runs that do something else than their author may expect. Each note names a parameter and a remedy."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sumus.experiment import Evaluation
from sumus.metrics import IGNORED
from sumus.plan import Plan
from sumus.simulator.populations.attacks import AttackedPopulation
from sumus.simulator.populations.population import Population
from sumus.simulator.records import RoundRecord
from sumus.task import Description
from sumus.update.transform import Transform

FAR = 10.0
"""The ratio of a clip's norm C to the updates' lengths, or of these lengths to C, from which a note proposes another C."""
_ROUGH = 0.25
"""The relative error of a quantized update from which a note proposes another C."""
_STEP = 1.84
"""4.5 / √6: the relative error of an update of length ‖u‖ is 1.84 · C / (‖u‖ · (2^(bits−1) − 1)) (`sumus.quantize`)."""


def notes_on_attackers(population: Population) -> Iterator[str]:
    """Yield a note if a population is to hold attackers, and none of its clients is one."""
    if isinstance(population, AttackedPopulation) and population.share and not population.attackers:
        yield (
            f"nobody attacks: share={population.share:g} of {len(population)} clients is no whole client; raise share= of the "
            f"attack to {1 / len(population):.2g} or more, or give more clients"
        )


def notes_on_personal(evaluate: Evaluation, description: Description) -> Iterator[str]:
    """Yield a note if an evaluation measures personal leaves that nobody has trained."""
    sources = [
        f"{name}=" for name, given in (("central", evaluate.central), ("unseen", evaluate.unseen)) if given is not None
    ]
    if sources and (leaves := [leaf.name for leaf in description.named("personal")]):
        more = f" and {len(leaves) - 1} more" if len(leaves) > 1 else ""
        yield (
            f"Evaluation({', '.join(sources)}) measures `{leaves[0]}`{more} with the first values, since these leaves are "
            "personal and only clients that train have trained ones: give Evaluation(seen=) to measure the models that clients "
            "really have"
        )


def notes_on_held_out(targets: Any) -> Iterator[str]:
    """Yield a note if central held-out data are of one class. targets: a tensor, as the model gets it."""
    is_classes = targets.dim() == 1 and not targets.is_floating_point() and len(targets) > 1
    if is_classes and int(targets[0]) != IGNORED and bool((targets == targets[0]).all()):
        yield (
            f"all {len(targets)} targets of Evaluation(central=) are {int(targets[0])}, so its figures are of one class: if the "
            "data are sorted by class, shuffle them before you hold some out"
        )


def notes_on_contributors(plan: Plan, rounds: Sequence[RoundRecord]) -> Iterator[str]:
    """Yield a note if a plan names the fewest contributors, and a round was counted with fewer."""
    fewest = min((record.clients for record in rounds if record.clients), default=plan.min_contributors)
    if plan.min_contributors != Plan.min_contributors and fewest < plan.min_contributors:
        yield (
            f"a round was counted with {fewest} contributors, and the plan says min_contributors={plan.min_contributors}: the "
            "simulator does not enforce min_contributors, and a server makes no model of such a round; raise Pacing(cohort=) to "
            f"{plan.min_contributors} or more, or lower min_contributors"
        )


def clip_to_measure(update: Transform) -> float | None:
    """Return the norm C of a chain's clip; None if the chain has no clip, or if the length before the clip is not known."""
    for stage in update.links:
        if stage.props.clips_to is not None:
            return stage.props.clips_to
        if stage.props.weight_cap is None and not stage.props.keeps_norm:
            return None
    return None


def notes_on_lengths(update: Transform, lengths: Iterable[float]) -> Iterator[str]:
    """Yield a note if the norm C of a clip is far from the lengths of updates.

    Args:
        update: The chain.
        lengths: The L2 norms of a round's updates, as the clip gets them.
    """
    limit, known = clip_to_measure(update), sorted(lengths)
    if limit is None or not known or not (middle := statistics.median(known)):
        return
    if known[len(known) // 10] > limit and middle > FAR * limit:
        yield (
            f"clip_by_global_norm({limit:g}) shortens nearly all updates: in the first round half of them were longer than "
            f"{middle:.3g}, so that all clients move the model by the same small length; raise the norm towards {middle:.2g} "
            "(`sumus check` proposes one)"
        )
    quantizer = update.links[-1].props
    if quantizer.code_bits is None or quantizer.has_range:
        return
    error = _STEP * limit / middle / (2 ** (quantizer.code_bits - 1) - 1)
    if limit > FAR * middle and error > _ROUGH:
        yield (
            f"quantize rounds most of an update away: its step follows clip_by_global_norm({limit:g}), and in the first round "
            f"half of the updates were shorter than {middle:.3g}, with a rounding error of {error:.2g} times their length; lower "
            f"the norm towards {2 * middle:.2g} (`sumus check` proposes one)"
        )
