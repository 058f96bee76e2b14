"""The effect of one dishonest person on the demo: `make demo` in the simulator, with one of its seven devices as the
attacker.

    python -m benchmarks.one_attacker            about 30 minutes on one core

The task, the plan and the people are those of the demo (`sumus.demos.health`). With seed s, person s + 1 of the seven
is the attacker, so seeds 0 to 6 let each person attack once. The attacker takes part in every round. Its update is
exactly as long as the plan's clip norm, it claims a million examples, and it knows the others' updates of the same
round: no device can do more at the first hop. Accuracy is that of the last model on the three people who never train.
Each run with an attacker is compared with two honest runs of the same seed: in one all seven people train, and in the
other the attacker's person is missing. The control shows the effect of the check at the first hop: the attacker's
update is a hundred times as long as the clip norm, and nobody refuses it.
"""

import argparse
import dataclasses
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

import sumus
from benchmarks.results import write_table
from sumus import attacks
from sumus.demos import health
from sumus.executors.executor import Trained
from sumus.types import Tree
from sumus.update.clip import global_norm

CLASSES, EXAMPLES = 7, 10**6
TIMES = 100
"""How many clip norms long the attacker's update is if nobody checks its length."""
HONEST, MISSING = "none: all seven are honest", "none: the person is missing"
CONTROL = f"control: nobody checks the clip, and the update is {TIMES} times as long"

Direction = Callable[[Tree, Sequence[Tree]], Tree]
"""(what the attacker trained, what the others send after their clip) → the direction of the attacker's update."""


class OneAttacker(sumus.Population):
    """A population in which one person sends an update in a direction of its choice, and all others clip theirs.

    Attributes:
        attacker: The person's id.
        direction: The direction of its update.
        clip: The longest L2 norm of an honest update, in parameters.
        length: The L2 norm of the attacker's update.
    """

    def __init__(
        self, people: sumus.Population, attacker: Any, direction: Direction, clip: float, length: float
    ) -> None:
        super().__init__(people.ids, people.__getitem__)
        self.attackers = frozenset({attacker})
        self._direction, self._clip, self._length = direction, clip, length

    @property
    def described(self) -> str:
        return f"{super().described}, one of which attacks"

    def sent(self, results: Iterator[Trained]) -> Iterator[Trained]:
        """Yield the honest reports first, then the attacker's, which depends on them."""
        others: list[Tree] = []
        mine: Trained | None = None
        for trained in results:
            if trained.client in self.attackers:
                mine = trained
                continue
            params = trained.parts["params"]
            clipped = _of_length(params, min(self._clip, global_norm(params)))
            others.append(clipped)
            yield _with_params(trained, clipped)
        if mine is not None:
            params = _of_length(self._direction(mine.parts["params"], others), self._length)
            yield dataclasses.replace(_with_params(mine, params), examples=EXAMPLES)


def _with_params(trained: Trained, params: Tree) -> Trained:
    return dataclasses.replace(trained, parts={**trained.parts, "params": params})


def _of_length(tree: Tree, length: float) -> Tree:
    """Return the same direction with another L2 norm."""
    factor = length / global_norm(tree)
    return {name: (leaf * factor).astype(leaf.dtype) for name, leaf in tree.items()}


def _as_trained(mine: Tree, others: Sequence[Tree]) -> Tree:
    return mine


def _sign_flip(mine: Tree, others: Sequence[Tree]) -> Tree:
    return {name: -leaf for name, leaf in mine.items()}


def _against_the_others(mine: Tree, others: Sequence[Tree]) -> Tree:
    """Go against the sum of the honest updates. [Xie et al. 2019, arXiv:1903.03936, inner product manipulation]"""
    return {name: -np.sum([one[name] for one in others], axis=0) for name in mine}


def _all_alike(sign: float) -> Direction:
    """Make all numbers equal. A server subtracts the update, so a negative update moves the model up."""
    return lambda mine, others: {name: np.full_like(leaf, sign) for name, leaf in mine.items()}


def _random_direction(mine: Tree, others: Sequence[Tree]) -> Tree:
    """Use the same random direction in every round: directions that change would cancel."""
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(mine[name].shape).astype(mine[name].dtype) for name in sorted(mine)}


def _one_class(mine: Tree, others: Sequence[Tree]) -> Tree:
    """Put all of the length into one number: the bias of the first class, upwards."""
    direction = {name: np.zeros_like(leaf) for name, leaf in mine.items()}
    direction["head.bias"][0] = -1
    return direction


DIRECTIONS: Mapping[str, Direction] = {
    "sign flip": _sign_flip,
    "label flip": _as_trained,
    "against the sum of the others": _against_the_others,
    "all numbers alike, up": _all_alike(-1.0),
    "all numbers alike, down": _all_alike(1.0),
    "one random direction": _random_direction,
    "the bias of one class": _one_class,
    CONTROL: _all_alike(-1.0),
}


def experiment(attack: str, seed: int, rounds: int = health.ROUNDS) -> sumus.Experiment:
    """Return the demo in the simulator with an attack by its name, HONEST or MISSING; person seed + 1 of the seven is
    the attacker."""
    demo = dataclasses.replace(health.experiment(), seed=seed, rounds=rounds)
    demo = dataclasses.replace(demo, evaluate=dataclasses.replace(demo.evaluate, every=rounds))
    people, plan = sumus.Population(demo.population, demo.population.__getitem__), demo.plan
    attacker = health.PEOPLE.training[seed % len(health.PEOPLE.training)]
    if attack == HONEST:
        return demo
    if attack == MISSING:
        pacing = dataclasses.replace(plan.pacing, cohort=plan.pacing.cohort - 1)
        return dataclasses.replace(
            demo, plan=dataclasses.replace(plan, pacing=pacing), population=people.without([attacker])
        )
    clip = length = plan.influence.length
    assert clip is not None, "the demo's plan clips"
    if attack == CONTROL:
        length = TIMES * clip
        unchecked = dataclasses.replace(plan.algorithm, update=sumus.chain())
        plan = sumus.Plan(plan.task, unchecked, plan.pacing, min_contributors=plan.min_contributors)
    if attack == "label flip":
        flipped = attacks.label_flip(people.subset([attacker]), CLASSES, share=0.9)
        people = sumus.Population(people.ids, lambda who: (flipped if who == attacker else demo.population)[who])
    attacked = OneAttacker(people, attacker, DIRECTIONS[attack], clip, length)
    return dataclasses.replace(demo, plan=plan, population=attacked)


def one_run(job: tuple[str, int, int]) -> float:
    """Run (attack, seed, rounds), and return the accuracy of the last model on the people who never train."""
    attack, seed, rounds = job
    accuracy = sumus.run(
        experiment(attack, seed, rounds), compute=sumus.Compute(workers=1), out=sumus.Output(progress=False)
    ).metrics["accuracy"]
    print(f"{attack}, seed {seed}: {accuracy:.3f}", flush=True)
    return accuracy


def points(with_attacker: Sequence[float], without: Sequence[float]) -> str:
    """Return the mean and the worst difference of accuracy over seeds, in percentage points."""
    differences = [100 * (a - b) for a, b in zip(with_attacker, without, strict=True)]
    return f"{statistics.mean(differences):+.1f} (worst {min(differences):+.1f})"


def rows(figures: Mapping[str, Sequence[float]]) -> list[list[str]]:
    """Return a row for each attack: its accuracy, and the differences from both honest runs."""
    return [
        [
            attack,
            f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})",
            "" if attack == HONEST else points(values, figures[HONEST]),
            "" if attack in (HONEST, MISSING) else points(values, figures[MISSING]),
        ]
        for attack, values in figures.items()
    ]


def main() -> None:
    """Run, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--rounds", type=int, default=health.ROUNDS)
    parser.add_argument("--processes", type=int, default=1, help="runs side by side, one thread each")
    args = parser.parse_args()
    names = [HONEST, MISSING, *DIRECTIONS]
    jobs = [(attack, seed, args.rounds) for seed in args.seeds for attack in names]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        runs = dict(zip(jobs, pool.map(one_run, jobs, chunksize=1), strict=True))
    figures = {attack: [runs[attack, seed, args.rounds] for seed in args.seeds] for attack in names}
    caption = (
        f"`python -m benchmarks.one_attacker`: {args.rounds} rounds, {len(args.seeds)} seeds; accuracy on three people "
        "never seen, mean (lowest to highest); differences in points, mean (worst seed)."
    )
    header = ["attack", "accuracy", "against all seven honest", "against the person missing"]
    write_table("one-attacker", caption, header, rows(figures), write=False)


if __name__ == "__main__":
    main()
