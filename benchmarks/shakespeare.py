"""Prediction of the next character: 141 roles of Shakespeare with at least 1,000 characters, one client for each role.

    python -m benchmarks.shakespeare           three seeds (about 20 minutes on two cores)
    python -m benchmarks.shakespeare --write   also put the table into docs/results.md

The last fifth of every role is held out, and figures are measured on it. Centralised training of such a network reaches
0.535. The recipe was found on these figures (in research before this code), so their last digit may be too good.
"""

from functools import cache

import torch
from torch import nn

import sumus
from benchmarks import data, learning
from sumus import optimizers, schedules

ROW = 80
VOCABULARY = 65


class CharacterNet(nn.Module):
    """An embedding of 8, an LSTM of 160, and a linear layer: 120 thousand parameters. (B, 80) → (B, 80, 65)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.lstm = nn.LSTM(8, 160, batch_first=True)
        self.head = nn.Linear(160, VOCABULARY)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        """Return the scores of the next character at each position."""
        return self.head(self.lstm(self.embedding(characters))[0])


CLIENT = sumus.sgd(lr=schedules.exponential(2.0, 0.996), epochs=1, batch_size=8, clip_norm=5.0)
SERVER = optimizers.averaged(optimizers.adam(0.02, bias_correction=True), 0.9)


@cache
def roles() -> tuple[sumus.Population, sumus.Population]:
    """Return rows of 80 characters and what follows each: the first four fifths by role, and the last fifth by role."""
    first, last = data.shakespeare(ROW, at_least=1000)
    return (
        sumus.Population(list(first), first.__getitem__),
        sumus.Population(
            [f"{role}, last fifth" for role in last], lambda name: last[name.removesuffix(", last fifth")]
        ),
    )


def recipe(what: str, rounds: int, algorithm: sumus.Algorithm) -> learning.Recipe:
    """Return the recipe of an algorithm on this task."""

    def experiment(seed: int, rounds: int) -> sumus.Experiment:
        task = sumus.Task(
            CharacterNet, sumus.losses.cross_entropy, {"accuracy": sumus.metrics.accuracy}, name="shakespeare"
        )
        training, held_out = roles()
        plan = sumus.Plan(task, algorithm, sumus.Pacing(cohort=20))
        return sumus.Experiment(plan, training, rounds, sumus.Evaluation(unseen=held_out, every=50), seed)

    return learning.Recipe(what, rounds, experiment)


RECIPES = {
    "fedadam": recipe("FedAdam 0.02, mean of models 0.9", 300, sumus.fedavg(CLIENT, server=SERVER)),
}

if __name__ == "__main__":
    learning.main(
        "benchmarks.shakespeare",
        __doc__,
        "shakespeare",
        RECIPES,
        "`python -m benchmarks.shakespeare`: 141 roles, cohort 20, SGD 2.0 falling by 0.4 % a round, clipped "
        "at 5, one epoch, batch 8",
        client="role",
        data_set="shakespeare",
    )
