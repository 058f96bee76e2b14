"""One task, whatever carries it: in memory, through the wire and over HTTP, on memory, SQLite and PostgreSQL, the same bits."""

from functools import partial
from pathlib import Path

import pytest

import sumus
from sumus.device.conditions import Always
from sumus.device.device import Device
from sumus.device.keys import keyed
from sumus.device.store import MemoryStore
from sumus.device.training import Training
from sumus.experiment import Experiment
from sumus.operations.service import Conduct, Where, open_service
from sumus.simulator.share import public_seed
from sumus.simulator.wire import NO_FLOOR
from sumus.training.program import Program
from sumus.tree import sha256
from sumus.wire.bundle import Bundle
from sumus.wire.tensors import decode_tree
from tests.server.over_http import over_http
from tests.simulator.test_wire import ALGORITHMS, PEOPLE, net, person

SEED, ROUNDS = 3, 3


def experiment(algorithm: str) -> Experiment:
    task = sumus.Task(net, sumus.losses.cross_entropy, {"accuracy": sumus.metrics.accuracy}, name="parity")
    return Experiment(sumus.Plan(task, ALGORITHMS[algorithm], sumus.Pacing(len(PEOPLE)), 2), PEOPLE, ROUNDS, seed=SEED)


def over_the_network(wanted: Experiment, where: Where) -> str:
    """The model of a server over HTTP and a device for each client, with a connection of its own."""
    training = Training(wanted.plan.task, person(0), "sequential", seed=SEED)  # pyright: ignore[reportArgumentType]
    program = Program(wanted.plan.task, "cpu", SEED)  # pyright: ignore[reportArgumentType]
    data = program.learn_schema(0, *program.reader.read(PEOPLE, 0))
    plan = wanted.plan.with_data(data)
    seeds = partial(public_seed, plan, SEED)
    conduct = Conduct("people", group=0.0, seeds=lambda task: seeds)
    name = wanted.plan.algorithm.aggregator.parts[-1].name  # of a database that others use too
    service = open_service({name: Bundle(plan, program.initial)}, where, conduct)
    try:
        service.server.start()
        with over_http(service) as url:
            token = service.server.roll.new_token("people", service.server.clock(), uses=len(PEOPLE))
            devices = [
                Device(
                    url,
                    training,
                    person(number),
                    token=token,
                    floor=NO_FLOOR,
                    sensors=Always(),
                    name=number,
                    evaluates=False,
                    wait_s=10.0,
                    keys=keyed(SEED),
                    store=MemoryStore(),
                )
                for number in PEOPLE
            ]
            for device in devices:
                device.enrol()
            for number in range(1, ROUNDS + 1):
                for device in devices:
                    device.run(until=lambda status, number=number: status.counts.get("counted", 0) >= number)
            for device in devices:
                device.close()
        run = service.server.tasks[0].training
        service.server.ask_to_do(lambda now: None).result()
        assert run.version == ROUNDS
        return sha256(decode_tree(service.blobs.get(run.model(ROUNDS).model)))
    finally:
        service.close()


@pytest.mark.parametrize("algorithm", ["adam, over narrow codes", "scaffold"])
def test_in_memory_through_the_wire_and_over_http_on_any_store_it_is_the_same_model(
    algorithm: str, tmp_path: Path, postgres: str
) -> None:
    wanted = experiment(algorithm)
    models = {
        through: sumus.run(wanted, executor="sequential", workers=1, through=through).model_sha256  # pyright: ignore[reportArgumentType]
        for through in ("memory", "wire")
    }
    models["HTTP, memory"] = over_the_network(wanted, Where())
    models["HTTP, SQLite"] = over_the_network(wanted, Where(tmp_path / "sqlite"))
    models["HTTP, PostgreSQL"] = over_the_network(wanted, Where(tmp_path / algorithm[:4], postgres))
    assert len(set(models.values())) == 1, models
