"""Finds reasons why a valid plan cannot start: its demands exceed the limits to which devices consent by default.

hurdles(plan)                                     judged by the plan alone
hurdles(plan, steps=400, memory=2**30)            also by the cost of a round
missing(plan, clients=3)                          judged by the number of devices
"""

from dataclasses import fields

from sumus.pacing import Conditions
from sumus.plan import Plan
from sumus.protocol.session import Floor
from sumus.text import ago, amount, many

USUAL = Floor()
_DAY = 86400.0


def hurdles(plan: Plan, steps: int = 0, memory: int = 0, floor: Floor = USUAL) -> list[str]:
    """List the reasons why devices would refuse a plan's rounds, or soon reach a limit. Each sentence names the remedy.

    Args:
        plan: The plan, which declares its data.
        steps: The largest number of local steps of a client in a round; 0 if it is not known.
        memory: The memory that a local step needs at least, in bytes; 0 if it is not known.
        floor: The limits of the devices' consent.
    """
    found, rounds = list[str](), plan.edges.rounds
    if plan.min_contributors < floor.contributors:
        found.append(
            f"devices consent to sums of at least {floor.contributors} contributors, but min_contributors is "
            f"{plan.min_contributors}, so they refuse every round: raise min_contributors, or start each device with --floor "
            f"contributors={plan.min_contributors}"
        )
    nbytes = len(plan.to_json()) + plan.broadcast_nbytes + plan.first_hop.nbytes
    for name, takes, most, said in (
        ("steps", steps, floor.steps, (many(steps, "local step"), many(floor.steps, "local step"))),
        ("bytes", nbytes, floor.bytes, (amount(nbytes), amount(floor.bytes))),
        ("memory", memory, floor.memory, (f"{amount(memory)} of memory", amount(floor.memory))),
    ):
        if takes > most:
            found.append(
                f"a round takes {said[0]}, but devices consent to {said[1]}, so they refuse it: start each device with "
                f"--floor {name}={takes}"
            )
    requires = plan.pacing.requires
    if asked := [each.name for each in fields(Conditions) if getattr(requires, each.name)]:
        found.append(
            f"devices take part only if {', '.join(asked)} {'is' if len(asked) == 1 else 'are'} met (Pacing(requires=)); on "
            "machines that cannot detect this, join with --always"
        )
    every = plan.pacing.every or 0.0
    if every * floor.rounds < _DAY * rounds:
        pace = (
            "rounds follow one another as fast as devices train"
            if not every
            else f"a round may begin every {every:g} s"
        )
        found.append(
            f"{pace}, but a device consents to {floor.rounds} rounds a day: a device that is in every round reaches this limit "
            f"{'at once' if not every else f'within {ago(every * floor.rounds)}'}; set Pacing(every="
            f"{_DAY * rounds / floor.rounds:.0f}) to leave time between rounds, or start devices with --floor rounds=N"
        )
    return found


def missing(plan: Plan, clients: int) -> list[str]:
    """List the reasons why a plan cannot start, or is slow, with this number of devices."""
    least = max(plan.min_contributors, plan.pacing.fewest)
    if clients < least:
        return [
            f"there {'is' if clients == 1 else 'are'} {many(clients, 'client')} here, but a sum needs {least} contributors: no "
            f"round begins before {least} devices are enrolled"
        ]
    if clients < plan.pacing.cohort and not plan.pacing.buffered:
        end = "an hour" if plan.pacing.deadline is None else f"{plan.pacing.deadline:g} s"
        return [
            f"there are {many(clients, 'client')} here, but a round waits for {plan.pacing.cohort}: without more devices, each "
            f"round lasts until its deadline ({end}); lower the cohort"
        ]
    return []
