"""One task, whatever carries it: in memory, through the wire and over HTTP, on memory, SQLite and PostgreSQL, the same bits; and
so by three servers that share its rounds."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import pytest

import sumus
from benchmarks.kills.__main__ import database
from sumus.device.training import Training
from sumus.experiment import Experiment
from sumus.operations.policy import ServerPolicy
from sumus.operations.service import open_service
from sumus.operations.stores import Storage
from sumus.simulator.processes.share import public_seed
from sumus.storage.blobs import DirectoryBlobs
from sumus.storage.sql import SqlStore
from sumus.transport.transport import Transport
from sumus.tree import sha256
from sumus.wire.tensors import decode_tree
from tests.server.clients import clients, served, train
from tests.server.one_replica import Rotating, replica
from tests.server.over_http import over_http
from tests.simulator.test_wire import ALGORITHMS, PEOPLE, net

SEED, ROUNDS = 3, 3


def experiment(algorithm: str) -> Experiment:
    task = sumus.Task(net, sumus.losses.cross_entropy, {"accuracy": sumus.metrics.accuracy}, name="parity")
    plan = sumus.Plan(task, ALGORITHMS[algorithm], sumus.Pacing(len(PEOPLE)), 2, trusts_devices=True)
    return Experiment(plan, PEOPLE, ROUNDS, seed=SEED)


def take_part(url: str, token: str, training: Training, transport: Callable[[], Transport | None]) -> None:
    """A device for each client, until each was counted in every round. transport: of a device; None for one to the URL."""
    devices = clients(url, token, training, PEOPLE, SEED, transport)
    train(devices, ROUNDS)
    for device in devices:
        device.close()


def over_the_network(wanted: Experiment, where: Storage) -> str:
    """The model of a server over HTTP and a device for each client, with a connection of its own."""
    (bundle, training), name = served(wanted), wanted.plan.description.name
    seeds = partial(public_seed, bundle.plan, SEED)
    service = open_service({name: bundle}, where, ServerPolicy("people", group=0.0), seeds=lambda task: seeds)
    try:
        service.server.start()
        with over_http(service) as url:
            token = service.server.roll.new_token("people", service.server.clock(), uses=len(PEOPLE))
            take_part(url, token, training, lambda: None)
        run = service.server.tasks[0].training
        service.server.ask_to_do(lambda now: None).result()
        assert run.version == ROUNDS
        return sha256(decode_tree(service.blobs.get(run.model(ROUNDS).model)))
    finally:
        service.close()


def over_replicas(wanted: Experiment, folder: Path, database: str) -> str:
    """The model of three servers that share their rounds, each a process, when each request goes to another of them."""
    (bundle, training), name = served(wanted), wanted.plan.description.name
    folder.mkdir()
    (folder / "bundle").write_bytes(bundle.to_bytes())
    job = {"name": name, "bundle": folder / "bundle", "database": database, "shares": folder, "seed": SEED}
    with ExitStack() as stack:
        said = [
            stack.enter_context(replica(**job, data=folder / str(number), enrols=(number == 0) * len(PEOPLE)))
            for number in range(3)
        ]
        urls, ways = [each["url"] for each in said], list[Rotating]()

        def way() -> Rotating:
            ways.append(Rotating(urls[len(ways) % 3 :] + urls[: len(ways) % 3]))
            return ways[-1]

        take_part(urls[0], said[0]["token"], training, way)
        assert all(met > 3 for way in ways for met in way.met), [way.met for way in ways]
    with closing(SqlStore.open(database, f"{name}.train")) as store, store.transaction() as rows:
        model, shards = rows.model(rows.run().version), {row.name for row in rows.shards(ROUNDS - 1)}
    assert model is not None
    assert model.version == ROUNDS
    assert len(shards) > 1, "they have all added to it"
    return sha256(decode_tree(DirectoryBlobs(folder / "blobs").get(model.model)))


@pytest.mark.parametrize("algorithm", ["adam, over narrow codes", "scaffold"])
def test_in_memory_through_the_wire_and_over_http_on_any_store_it_is_the_same_model(
    algorithm: str, tmp_path: Path, postgres: str
) -> None:
    wanted = experiment(algorithm)
    models = {
        through: sumus.run(
            wanted, compute=sumus.Compute(executor="sequential", workers=1, through=through)
        ).model_sha256  # pyright: ignore[reportArgumentType]
        for through in ("memory", "wire")
    }
    models["HTTP, memory"] = over_the_network(wanted, Storage())
    models["HTTP, SQLite"] = over_the_network(wanted, Storage(tmp_path / "sqlite"))
    with database(postgres) as one, database(postgres) as other:
        assert other is not None
        models["HTTP, PostgreSQL"] = over_the_network(wanted, Storage(tmp_path / "postgresql", one))
        models["HTTP, three replicas on PostgreSQL"] = over_replicas(wanted, tmp_path / "replicas", other)
    assert len(set(models.values())) == 1, models
