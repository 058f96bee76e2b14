"""pfl (Apple, 0.6, PyTorch), in one process, or in several that torchrun starts: clients are then distributed over
them."""

import os
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.model.pytorch import PyTorchModel

from benchmarks.lockstep import Turns
from benchmarks.peers.asked import parser, workload_of
from benchmarks.torch_models import mean_loss

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))


class InTurn(TrainingProcessCallback):
    """The first process takes the turns; the others wait for it."""

    def __init__(self, turns: Turns | None) -> None:
        self._turns = turns

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        if self._turns is not None:
            self._turns.next()
        if PROCESSES > 1:
            torch.distributed.barrier()
        return False, type(aggregate_metrics)()


class Order:
    """Clients one after the other, whichever process they go to.

    pfl asks for a client for each of its processes, and keeps this process's one. In a round it does so as often as
    this process has clients.
    """

    def __init__(self, clients: int) -> None:
        self._clients = clients
        self._mine = len(range(RANK, clients, PROCESSES))
        self._asked = 0

    def __call__(self) -> int:
        turn, process = divmod(self._asked, PROCESSES)
        self._asked += 1
        return min(turn % self._mine * PROCESSES + process, self._clients - 1)


def main() -> None:
    """Train, one round in each turn."""
    cli = parser(__doc__)
    cli.add_argument("--rounds", type=int, required=True, help="in all")
    args = cli.parse_args()
    torch.set_num_threads(1)
    workload = workload_of(args)
    pairs = [list(map(torch.from_numpy, pair)) for pair in workload.examples(args.double)]
    module = workload.module(args.double)
    module.loss = lambda x, y, **options: mean_loss(module(x), y)
    module.metrics = lambda x, y, **options: {}
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
    in_order = Order(workload.clients)
    people = FederatedDataset(lambda client: Dataset(raw_data=pairs[client], user_id=str(client)), in_order)
    backend = SimulatedBackend(people, people, postprocessors=[WeightByDatapoints()])
    turns = Turns() if RANK == 0 else None
    if turns is not None:
        turns.next()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=args.rounds,
            evaluation_frequency=10**6,
            train_cohort_size=workload.clients,
            val_cohort_size=0,
        ),
        backend=backend,
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=workload.lr, local_batch_size=workload.batch
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[InTurn(turns)],
        send_metrics_to_platform=False,
    )
    if turns is not None:
        turns.finish({name: leaf.numpy() for name, leaf in module.state_dict().items()})


if __name__ == "__main__":
    main()
