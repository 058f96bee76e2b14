"""Flower (flwr 1.42, Ray): one actor for each core, one torch thread in each, data made once in each actor, no
evaluation.

FedAvg calls `evaluate_fn` with the model before the first round and after each round: the turns are taken there.
"""

import os

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.lockstep import Turns
from benchmarks.peers.asked import parser, workload_of


def client_app(name: str, clients: int, double: bool) -> ClientApp:
    """Return the app that Ray's actors run. It is sent to them with every message, so a module holds what they keep."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        from benchmarks.peers.flower_client import held

        here = held(name, clients, double)
        state, examples = here.train(
            int(context.node_config["partition-id"]), message.content["arrays"].to_torch_state_dict()
        )
        content = {"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": examples})}
        return Message(content=RecordDict(content), reply_to=message)

    return app


def main() -> None:
    """Train, one round in each turn."""
    args = parser(__doc__).parse_args()
    workload, cores = workload_of(args), len(os.sched_getaffinity(0))
    turns = Turns()
    server = ServerApp()
    latest: dict[str, ArrayRecord] = {}

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        def take_turn(number: int, arrays: ArrayRecord) -> None:
            latest["model"] = arrays
            turns.next()

        strategy = FedAvg(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=workload.clients,
            min_available_nodes=workload.clients,
        )
        start = ArrayRecord(workload.module(args.double).state_dict())
        strategy.start(grid=grid, initial_arrays=start, num_rounds=turns.rounds, evaluate_fn=take_turn)

    run_simulation(
        server_app=server,
        client_app=client_app(workload.name, workload.clients, args.double),
        num_supernodes=workload.clients,
        backend_config={
            "init_args": {"address": "local", "num_cpus": cores, "include_dashboard": False, "log_to_driver": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    turns.finish({name: leaf.numpy() for name, leaf in latest["model"].to_torch_state_dict().items()})


if __name__ == "__main__":
    main()
