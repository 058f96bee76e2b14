"""Four points, two workers: a training loop on one machine that trains a model where the data is.

Alice has two of the points, Bob has the other two. The target is the first coordinate, so all points of one worker have
the same target. The model goes to Alice, learns there, comes back, goes to Bob, and so on. The points stay.

    python examples/virtual_workers.py                      both workers in this process
    python examples/virtual_workers.py URL URL              two workers on other machines; their token in SUMUS_WORKER_TOKEN

The owners of the data start their workers by

    sumus worker examples/virtual_workers.py:alice          and :bob, with the same token in SUMUS_WORKER_TOKEN
"""

import os
import sys
from collections.abc import Sequence
from hashlib import sha256

import torch
from torch import nn

from sumus.virtual import Policy, VirtualWorker, Worker, connect, get, send

alice = {"inputs": torch.tensor([[0.0, 0.0], [0.0, 1.0]]), "targets": torch.tensor([[0.0], [0.0]])}
bob = {"inputs": torch.tensor([[1.0, 0.0], [1.0, 1.0]]), "targets": torch.tensor([[1.0], [1.0]])}
policy = Policy(fetch="parameters")  # callers may fetch the model that they sent, after training it, and nothing else


def train(workers: Sequence[Worker], rounds: int = 20) -> nn.Module:
    """Return the model after it has visited each worker `rounds` times."""
    torch.manual_seed(0)
    model: nn.Module = nn.Linear(2, 1)
    data = [(worker, worker["inputs"], worker["targets"]) for worker in workers]
    for _ in range(rounds):
        for worker, inputs, targets in data:
            there = send(model, worker)
            optimizer = torch.optim.SGD(there.parameters(), lr=0.1)
            optimizer.zero_grad()
            loss = ((there(inputs) - targets) ** 2).sum()
            loss.backward()
            optimizer.step()
            model = get(there)
    return model


def main(urls: Sequence[str]) -> None:
    """Train, and print the model's answers."""
    if urls:
        workers: list[Worker] = [connect(url, token=os.environ["SUMUS_WORKER_TOKEN"]) for url in urls]
    else:
        workers = [VirtualWorker("alice", alice, policy), VirtualWorker("bob", bob, policy)]
    model = train(workers)
    for worker in workers:
        worker.close()
    with torch.no_grad():
        answers = model(torch.cat([alice["inputs"], bob["inputs"]])).flatten()
    bits = sha256(b"".join(leaf.numpy().tobytes() for leaf in model.state_dict().values())).hexdigest()
    print(f"at {' and '.join(worker.name for worker in workers)}; model {bits}")
    print(f"answers {[round(answer, 2) for answer in answers.tolist()]}, which should be [0, 0, 1, 1]")


if __name__ == "__main__":
    main(sys.argv[1:])
