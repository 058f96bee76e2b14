"""A keyboard's suggestion model, `nn.Linear(100, 50)`: phones train it, their updates are added, and each phone predicts.

An input holds 100 counts of features of the last words; the target is one of 50 suggestions. Each phone's owner uses
some suggestions more than others. What the owners type never leaves their phones.
"""

import numpy as np
import torch
from torch import nn

import sumus

FEATURES, SUGGESTIONS, PHONES = 100, 50, 30
CONTEXTS = np.random.default_rng(0).normal(size=(SUGGESTIONS, FEATURES)).astype(np.float32)


def phone_data(phone: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what one person typed: 60 to 120 contexts, and the suggestion that the person chose for each."""
    rng = np.random.default_rng(1000 + phone)
    habits = rng.dirichlet(np.full(SUGGESTIONS, 0.3))
    taken = rng.choice(SUGGESTIONS, size=int(rng.integers(60, 120)), p=habits)
    return CONTEXTS[taken] + rng.normal(scale=1.5, size=(len(taken), FEATURES)).astype(np.float32), taken


def suggest(model: nn.Module, context: np.ndarray, count: int = 3) -> list[int]:
    """Return the best suggestions for a context, computed on the phone."""
    with torch.no_grad():
        return model(torch.from_numpy(context)[None]).topk(count).indices[0].tolist()


people = sumus.Population(range(PHONES), phone_data)
task = sumus.Task(
    model=lambda: nn.Linear(FEATURES, SUGGESTIONS),
    loss=sumus.losses.cross_entropy,
    metrics={"top1": sumus.metrics.accuracy, "top3": sumus.metrics.top_k_accuracy(3)},
    name="keyboard-suggestion",
)
algorithm = sumus.fedavg(
    client=sumus.sgd(lr=0.1, epochs=2, batch_size=16),
    update=sumus.clip_by_global_norm(2.5),  # no phone moves the model further than a tenth of this
    weight="uniform",
)
experiment = sumus.Experiment(
    plan=sumus.Plan(task, algorithm, sumus.Pacing(cohort=10)),
    population=people.without(range(25, 30)),
    rounds=20,
    evaluate=sumus.Evaluation(unseen=people.subset(range(25, 30)), every=5),
)

if __name__ == "__main__":
    history = sumus.run(experiment)
    phone = nn.Linear(FEATURES, SUGGESTIONS)  # a phone that never trained, with the summed model
    phone.load_state_dict(history.model)
    contexts, taken = phone_data(27)
    print(f"top-3 on phones never seen: {history.metrics['top3']:.3f}")
    print(f"the phone suggests {suggest(phone, contexts[0])}; its owner took {taken[0]}")
