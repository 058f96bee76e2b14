"""A program for an environment with flwr: the largest difference between its own FedAvg and `sumus.adapters.flower`.

    python -m tests.flower_peer SITE-PACKAGES

Flower's ServerApp strategy, its messages and its ClientApp are its own; a grid in this process carries the messages. The packages
that sumus needs are read from SITE-PACKAGES, after those of the environment. It prints one JSON object.
"""

import json
import sys
from collections.abc import Iterable
from typing import Any

sys.path.append(sys.argv[1])

import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

import sumus
from tests import flower_app
from tests.flower_app import PEOPLE, ROUNDS, net, person


class InProcessGrid(Grid):
    """Carries each message to the ClientApp at once. A node's id is its partition's, plus one."""

    def get_node_ids(self) -> Iterable[int]:
        return range(1, PEOPLE + 1)

    def send_and_receive(self, messages: Iterable[Message], **options: Any) -> Iterable[Message]:
        return [self._reply(message) for message in messages]

    def _reply(self, message: Message) -> Message:
        number = message.metadata.dst_node_id
        return flower_app.app(message, Context(0, number, {"partition-id": number - 1}, RecordDict(), {}))

    def set_run(self, *run: Any, **more: Any) -> None: ...

    @property
    def run(self) -> Any: ...

    def create_message(self, *words: Any, **more: Any) -> Any: ...

    def push_messages(self, messages: Any) -> Any: ...

    def pull_messages(self, message_ids: Any) -> Any: ...


def of_flower(start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of flwr's own FedAvg."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # as its runtime sets them
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=PEOPLE, min_available_nodes=PEOPLE)
    done = strategy.start(grid=InProcessGrid(), initial_arrays=ArrayRecord(start), num_rounds=ROUNDS)
    return done.arrays.to_torch_state_dict()


def of_sumus(task: sumus.Task, work: sumus.ClientWork, through: Any) -> sumus.History:
    """The run of sumus with the same clients."""
    plan = sumus.Plan(task, sumus.fedavg(work), sumus.Pacing(cohort=PEOPLE), 2)
    people = sumus.Population(range(PEOPLE), load=person)
    unseen = sumus.Population([9], load=person)
    measured = sumus.Evaluation(unseen=unseen)
    return sumus.run(sumus.Experiment(plan, people, ROUNDS, measured, seed=0), compute=sumus.Compute(through=through))


def main() -> None:
    """Compare."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = net()
    task = sumus.Task(model, sumus.losses.cross_entropy, {"accuracy": sumus.metrics.accuracy})
    theirs = of_flower(model.state_dict())
    app = sumus.adapters.flower(flower_app.train, flower_app.evaluate, metrics={"accuracy": "eval_acc"})
    numpy_client = sumus.adapters.flower(flower_app.client_fn)
    runs = {
        "app": of_sumus(task, app, "memory"),
        "app on devices": of_sumus(task, app, "wire"),
        "NumPyClient": of_sumus(task, numpy_client, "memory"),
    }
    differences = {
        name: max(
            float((history.model[leaf] - theirs[leaf]).abs().max()) for leaf in theirs if "num_batches" not in leaf
        )
        for name, history in runs.items()
    }
    measured = runs["app"].metrics
    print(json.dumps({"differences": differences, "measured": measured, "spec": app.spec.to_json()}))


if __name__ == "__main__":
    main()
