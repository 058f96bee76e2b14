"""People with different data: thirty clients have images of about two digits each, and the model must know all ten.

    python examples/heterogeneous.py            # the picture goes to a new temporary folder
    python examples/heterogeneous.py FOLDER

One report in ten is lost. With FedAvg, each client trains towards its own digits. FedProx keeps the clients near the
server's model. SCAFFOLD corrects every step by the difference between the client's gradient and the mean of all
clients; for this, it sends a second model in both directions.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from torch import nn

import sumus

CLIENTS, ROUNDS, EVERY = 30, 30, 10

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
order = np.random.default_rng(0).permutation(len(images))
held_out, training = order[:297], order[297:]
owners = sumus.splits.shards(labels[training], clients=CLIENTS, per_client=2)
people = sumus.Population.from_arrays(images[training], labels[training], by=owners)
task = sumus.Task(
    model=lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
    loss=sumus.losses.cross_entropy,
    metrics={"accuracy": sumus.metrics.accuracy},
    name="heterogeneous",
)
work = sumus.sgd(lr=0.3, epochs=2, batch_size=10)
algorithms = {"fedavg": sumus.fedavg(work), "fedprox": sumus.fedprox(work, mu=0.1), "scaffold": sumus.scaffold(work)}
experiments = {
    name: sumus.Experiment(
        plan=sumus.Plan(task, algorithm, sumus.Pacing(cohort=10)),
        population=people,
        rounds=ROUNDS,
        evaluate=sumus.Evaluation(central=(images[held_out], labels[held_out]), every=EVERY),
        fleet=sumus.Fleet(lost=0.1),
    )
    for name, algorithm in algorithms.items()
}
experiment = experiments["scaffold"]  # what `sumus simulate` runs

if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    print(f"who holds what: {people.plot(folder / 'people.png')}")
    heads = [f"round {number}" for number in range(EVERY, ROUNDS + 1, EVERY)]
    print(f"{'accuracy after':16}", *(f"{head:>10}" for head in heads), f"{'lost':>6} {'MB up':>6}")
    for name, each in experiments.items():
        history = sumus.run(each, out=sumus.Output(progress=False))
        accuracies = [record.metrics["accuracy"] for record in history.evaluated]
        lost = sum(record.reports.dropped for record in history.rounds)
        sent = sum(record.traffic.up for record in history.rounds)
        print(f"{name:16}", *(f"{accuracy:10.3f}" for accuracy in accuracies), f"{lost:6} {sent / 1e6:6.1f}")
