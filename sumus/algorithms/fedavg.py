"""Federated averaging (FedAvg), FedAvg with other server optimizers, and FedSGD.

FedAvg [McMahan et al. 2017, arXiv:1602.05629, Algorithm 1]: each of m clients trains from the model w_t for E epochs
with batches of B (ClientUpdate), and w_{t+1} = Σ (n_k / n) w^k_{t+1}. Here, a client sends w_t − w^k, and the server
subtracts the mean.

The variants put a server optimizer in place of this subtraction: FedAdagrad, FedAdam and FedYogi [Reddi et al. 2021,
arXiv:2003.00295, Algorithm 2], and FedAvgM [Hsu et al. 2019, arXiv:1909.06335]. In FedSGD, a client takes one step per
round, on all of its examples (McMahan et al., E = 1, B = ∞).
"""

from typing import Literal

from sumus import optimizers
from sumus.aggregate import Aggregator, Part, mean
from sumus.algorithm import Algorithm
from sumus.errors import PlanError
from sumus.optimizers import ServerOptimizer
from sumus.update.transform import Transform, chain
from sumus.work import ClientWork, sgd


def fedavg(
    client: ClientWork,
    update: Transform | None = None,
    server: ServerOptimizer | None = None,
    weight: Literal["examples", "uniform"] = "examples",
    aggregator: Aggregator | None = None,
    cap: int | None = None,
) -> Algorithm:
    """Make FedAvg.

    Args:
        client: The client's local training.
        update: The transform of an update before it is added; no transform by default.
        server: The server optimizer; by default the new model is the mean of the clients' models.
        weight: "examples" weighs clients by their number of examples (the paper's n_k); "uniform" weighs them alike.
        aggregator: An aggregator that replaces the weighted mean, and has its own weights; see `sumus.robust`.
        cap: The largest number of examples that counts towards a client's weight.
    """
    if aggregator is not None and (weight != "examples" or cap is not None):
        raise PlanError(
            "weight-twice", f"{aggregator!r} has weights of its own: leave weight= and cap= out, or give it parts"
        )
    part = Part("params", weight=weight, denominator="count" if weight == "uniform" else "weight", cap=cap)
    return Algorithm(client, update or chain(), aggregator or mean(part), server or optimizers.sgd(1.0))


def fedavgm(
    client: ClientWork,
    lr: float = 1.0,
    beta: float = 0.9,
    update: Transform | None = None,
    cap: int | None = None,
) -> Algorithm:
    """Make FedAvg with momentum on the server. [Hsu et al. 2019, section 4.3]

    Args:
        client: The client's local training.
        lr: The server's learning rate.
        beta: The server's momentum.
        update: See `fedavg`.
        cap: See `fedavg`.
    """
    return fedavg(client, update, optimizers.momentum(lr, beta), cap=cap)


def fedadagrad(
    client: ClientWork, lr: float, tau: float = 1e-3, update: Transform | None = None, cap: int | None = None
) -> Algorithm:
    """Make FedAvg with Adagrad on the server. [Reddi et al. 2021, Algorithm 2]

    `lr` and `tau` are those of `sumus.optimizers.adagrad`; the other arguments are those of `fedavg`.
    """
    return fedavg(client, update, optimizers.adagrad(lr, tau=tau), cap=cap)


def fedadam(
    client: ClientWork,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    tau: float = 1e-3,
    update: Transform | None = None,
    cap: int | None = None,
) -> Algorithm:
    """Make FedAvg with Adam on the server. [Reddi et al. 2021, Algorithm 2]

    `lr`, `betas` and `tau` are those of `sumus.optimizers.adam`; the other arguments are those of `fedavg`.
    """
    return fedavg(client, update, optimizers.adam(lr, betas, tau), cap=cap)


def fedyogi(
    client: ClientWork,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    tau: float = 1e-3,
    update: Transform | None = None,
    cap: int | None = None,
) -> Algorithm:
    """Make FedAvg with Yogi on the server. [Reddi et al. 2021, Algorithm 2]

    `lr`, `betas` and `tau` are those of `sumus.optimizers.yogi`; the other arguments are those of `fedavg`.
    """
    return fedavg(client, update, optimizers.yogi(lr, betas, tau), cap=cap)


def fedsgd(lr: float, update: Transform | None = None, cap: int | None = None) -> Algorithm:
    """Make FedSGD: each client takes one step by its full-batch gradient, and the server averages. [McMahan et al.
    2017, section 2]
    """
    return fedavg(sgd(lr, epochs=1, batch_size=None), update, cap=cap)
