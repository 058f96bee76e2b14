"""sumus is a library for federated learning: devices train a shared model, and their data stays on the devices.

The guiding idea: the update of one device is an aggregate with one contributor. Adding one device's update and adding
the sum of many devices is therefore the same operation.

This file lists the public names, grouped by the question that they answer. Everything else may change. `import sumus`
is light: each name is loaded when it is first used, and only training imports torch.
"""

import importlib
from typing import Any

from sumus import registry

_PUBLIC = {
    # what is learned?
    "Task": "sumus.task",
    "Data": "sumus.task",
    # what does a client do?
    "ClientWork": "sumus.work",
    "ClientRules": "sumus.work",
    "LeafRule": "sumus.work",
    "LocalRun": "sumus.work",
    "zeros_as": "sumus.work",
    "sgd": "sumus.work",
    "adam": "sumus.work",
    "adamw": "sumus.work",
    "client": "sumus.work",
    # what happens to its update on the way?
    "Transform": "sumus.update",
    "chain": "sumus.update",
    "clip_buffers": "sumus.update",
    "clip_by_global_norm": "sumus.update",
    "quantize": "sumus.update",
    "rotate": "sumus.update",
    "weight": "sumus.update",
    # how are updates combined?
    "Aggregate": "sumus.aggregate",
    "Aggregator": "sumus.aggregate",
    "Fixed": "sumus.aggregate",
    "FirstHop": "sumus.first_hop",
    "FixedPoint": "sumus.fixed_point",
    "Part": "sumus.aggregate",
    "RunningSum": "sumus.aggregate",
    "Update": "sumus.aggregate",
    "mean": "sumus.aggregate",
    # what does the server do with the result?
    "ServerOptimizer": "sumus.optimizers",
    # the four answers together
    "Algorithm": "sumus.algorithm",
    "cyclic": "sumus.algorithms.cyclic",
    "fedadagrad": "sumus.algorithms.fedavg",
    "fedadam": "sumus.algorithms.fedavg",
    "fedavg": "sumus.algorithms.fedavg",
    "fedavgm": "sumus.algorithms.fedavg",
    "fedbuff": "sumus.algorithms.fedbuff",
    "feddyn": "sumus.algorithms.feddyn",
    "fednova": "sumus.algorithms.fednova",
    "fedprox": "sumus.algorithms.fedprox",
    "fedsgd": "sumus.algorithms.fedavg",
    "fedyogi": "sumus.algorithms.fedavg",
    "scaffold": "sumus.algorithms.scaffold",
    # who takes part, and what runs?
    "Pacing": "sumus.pacing",
    "Plan": "sumus.plan",
    "Edges": "sumus.site",
    "Bundle": "sumus.wire.bundle",
    "Experiment": "sumus.experiment",
    "Conditions": "sumus.pacing",
    "Fleet": "sumus.fleet",
    "FleetNetwork": "sumus.fleet",
    "FleetTiming": "sumus.fleet",
    "FleetReport": "sumus.simulator.virtual_time.fleet_report",
    "rehearse": "sumus.simulator.virtual_time.rehearsal",
    "serve": "sumus.operations.serve",
    "Storage": "sumus.operations.stores",
    "ServerPolicy": "sumus.operations.policy",
    "Evaluating": "sumus.server.evaluation",
    "Startup": "sumus.operations.serve",
    "Listening": "sumus.http.listening",
    "Device": "sumus.device.device",
    "Consent": "sumus.device.options",
    "DeviceProfile": "sumus.device.options",
    "ServerConnection": "sumus.device.options",
    "Floor": "sumus.protocol.session",
    "Node": "sumus.node.node",
    "ReadingSchema": "sumus.node.options",
    "ReadingSources": "sumus.node.options",
    "Broker": "sumus.node.mqtt",
    "Retention": "sumus.node.readings",
    "NodeListening": "sumus.node.options",
    "NodeTraining": "sumus.node.options",
    "DirectoryClientStates": "sumus.storage.client_states",
    "MemoryClientStates": "sumus.storage.client_states",
    "Evaluation": "sumus.experiment",
    "Population": "sumus.simulator.populations.population",
    "simulate": "sumus.simulator.simulate",
    "run": "sumus.simulator.simulate",
    "Compute": "sumus.simulator.options",
    "Output": "sumus.simulator.options",
    "check": "sumus.simulator.check",
    "History": "sumus.simulator.history",
    "RoundRecord": "sumus.simulator.records",
    "Spread": "sumus.metrics",
    # what can go wrong?
    "DataError": "sumus.errors",
    "DivergedError": "sumus.errors",
    "ExperimentError": "sumus.errors",
    "Interrupted": "sumus.errors",
    "ParticipantError": "sumus.errors",
    "PlanError": "sumus.errors",
    "SumusError": "sumus.errors",
    "TaskError": "sumus.errors",
    "UsageError": "sumus.errors",
    # your own values
    "registered": "sumus.spec",
}

_MODULES = {
    "adapters": "sumus.adapters",
    "attacks": "sumus.simulator.populations.attacks",
    "losses": "sumus.training.losses",
    "metrics": "sumus.metrics",
    "optimizers": "sumus.optimizers",
    "preparation": "sumus.preparation",
    "robust": "sumus.robust",
    "schedules": "sumus.schedules",
    "splits": "sumus.simulator.populations.splits",
    "staleness": "sumus.staleness",
    "transfer": "sumus.transfer",
}

__version__ = "0.1.0"
__all__ = sorted([*_PUBLIC, *_MODULES])  # pyright: ignore[reportUnsupportedDunderAll]


def _load_own_values() -> None:
    """Import every module that registers values: robust aggregators, and all algorithms."""
    importlib.import_module("sumus.robust")
    importlib.import_module("sumus.algorithms").load_all()


registry.supply(_load_own_values)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC and name not in _MODULES:
        raise AttributeError(f"module 'sumus' has no attribute {name!r}")
    try:
        module = importlib.import_module(_PUBLIC.get(name) or _MODULES[name])
    except ModuleNotFoundError as error:
        from sumus.errors import needs

        if why := needs(error):
            raise ModuleNotFoundError(f"sumus.{name}: {why}", name=error.name) from error
        raise
    return getattr(module, name) if name in _PUBLIC else module


def __dir__() -> list[str]:
    return __all__
