"""Adapters: client code that was written for another framework, as client work of sumus.

    sumus.adapters.flower(client_fn)                    Flower's NumPyClient
    sumus.adapters.flower(train, evaluate)              the functions of Flower's ClientApp

The code is not changed. Flower is imported only for the functions of a ClientApp, whose arguments are Flower's own messages.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias, cast

from sumus.errors import PlanError, UsageError
from sumus.own_loop import ClientRound, OwnFunction
from sumus.work import ClientWork, client

Config: TypeAlias = Mapping[str, Any] | Callable[[int], Mapping[str, Any]]
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_LOSSES = ("loss", "train_loss", "train-loss", "eval_loss", "eval-loss")
"""The names that Flower's templates use for a loss."""


@dataclass
class FlowerContext:
    """The fields of Flower's Context that a `client_fn` reads. This class does not need Flower.

    Attributes:
        node_config: "partition-id" is the client's id.
        run_config: The `run_config` that was passed to `flower`.
        examples: The client's (inputs, targets), after the task's `prepare`. Flower's own Context has no such
            field: there, clients load their data themselves.
        state: Empty at each call. sumus does not store it, so code that writes to it is refused.
    """

    node_config: dict[str, Any]
    run_config: dict[str, Any]
    examples: tuple[Any, Any]
    state: dict[str, Any] = field(default_factory=dict[str, Any])


def flower(
    train: OwnFunction,
    evaluate: OwnFunction | None = None,
    *,
    config: Config = _NOTHING,
    metrics: Mapping[str, str] = MappingProxyType({}),
    run_config: Mapping[str, Any] = _NOTHING,
) -> ClientWork:
    """Return client work that runs code written for Flower 1.42: a NumPyClient, or the functions of a ClientApp.

    Args:
        train: Flower's `client_fn`: (context) → NumPyClient, where `context.examples` holds the client's examples. Or the
            train function of a ClientApp: (message, context) → message.
        evaluate: The same `client_fn`, if its clients' `evaluate` measures the model; or the evaluate function of the
            ClientApp. None if the task's loss and metrics measure it.
        config: The config that Flower's strategy would send; or a function that returns it for a round, counted from 1. The
            key "server-round" is added.
        metrics: For each metric of the task, the name that Flower's code uses for it. Other numbers of Flower's code are left
            out. A loss is also found under the names "loss", "train_loss" and "eval_loss".
        run_config: The value of `context.run_config`.

    Returns:
        Client work whose steps sumus does not see, as with `sumus.client`. The weight of a client is its number of examples,
        as in Flower's FedAvg.

    Raises:
        PlanError: A function takes neither (context) nor (message, context).
    """
    setting = _Setting(config, dict(metrics), dict(run_config))
    training = _named(train, _adapted(train, setting, "fit"), "fit")
    if evaluate is None:
        return client(training)
    return client(training, _named(evaluate, _adapted(evaluate, setting, "evaluate"), "evaluate"))


@dataclass(frozen=True)
class _Setting:
    """The arguments `config`, `metrics` and `run_config` of `flower`."""

    config: Config
    metrics: Mapping[str, str]
    run_config: Mapping[str, Any]

    def config_of(self, about: ClientRound) -> dict[str, Any]:
        number = 1 + (about.number or 0)
        given = self.config(number) if callable(self.config) else self.config
        return {"server-round": number, **given}

    def node_config(self, about: ClientRound) -> dict[str, Any]:
        return {"partition-id": about.client}

    def means(self, given: Mapping[str, Any], loss: float | None = None) -> dict[str, float]:
        """Return the metrics of the task, under the task's names. given: the metrics under the names of Flower's code."""
        found = {name: given[own] for name, own in self.metrics.items() if own in given}
        if "loss" not in found:
            losses = [given[name] for name in _LOSSES if name in given] if loss is None else [loss]
            found |= {"loss": losses[0]} if losses else {}
        return found


def _adapted(function: OwnFunction, setting: _Setting, which: str) -> OwnFunction:
    """Return a function with the arguments that `sumus.client` needs. which: "fit" or "evaluate"."""
    try:
        given = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    except (TypeError, ValueError):
        given = []
    if len(given) == 1:
        return functools.partial(_call_numpy_client, function, setting, which)
    if len(given) == 2:
        return functools.partial(_call_client_app, function, setting, "train" if which == "fit" else "evaluate")
    raise PlanError(
        "own-loop",
        f"flower() takes a function of (context) that returns a NumPyClient, or a function of (message, context) of a "
        f"ClientApp, not {function!r:.80}: if you have a NumPyClient, write a client_fn that returns it",
    )


def _named(function: OwnFunction, adapted: OwnFunction, which: str) -> OwnFunction:
    """Return `adapted` with the name and the module of the user's `function`, so that a plan can name it."""

    def call(state: Any, examples: Any, about: ClientRound) -> Any:
        return adapted(state, examples, about)

    call.__module__ = getattr(function, "__module__", __name__)
    call.__qualname__ = f"{getattr(function, '__qualname__', '<object>')}.{which}"
    return call


def _call_numpy_client(
    client_fn: OwnFunction, setting: _Setting, which: str, state: Any, examples: Any, about: ClientRound
) -> Any:
    """Let a NumPyClient train or measure. Its parameters are the values of the state dict, in the same order."""
    context = FlowerContext(setting.node_config(about), dict(setting.run_config), examples)
    made = client_fn(context)
    own = getattr(made, "numpy_client", made)  # what `to_client()` makes holds the NumPyClient
    method = getattr(own, which, None)
    if not callable(method):
        raise UsageError(
            f"client_fn returned a {type(own).__name__}, which has no `{which}`: return a NumPyClient, or leave evaluate= out"
        )
    parameters = [leaf.cpu().numpy() for leaf in state.values()]
    given = method(parameters, setting.config_of(about))
    _expect_nothing_kept(context.state)
    if not isinstance(given, tuple) or len(cast(tuple[Any, ...], given)) != 3:
        raise UsageError(
            f"`{which}` of the NumPyClient did not return three values: return (parameters, number of examples, metrics) from "
            "`fit`, and (loss, number of examples, metrics) from `evaluate`"
        )
    first, count, metrics = cast(tuple[Any, Any, Mapping[str, Any]], given)
    if which == "evaluate":
        return count, setting.means(metrics, float(first))
    leaves = cast(Sequence[Any], first)
    if len(leaves) != len(state):
        raise UsageError(
            f"`fit` of the NumPyClient returned {len(leaves)} arrays, but the model's state dict has {len(state)} entries "
            f"({', '.join(state)}): return all of them in that order, [leaf.numpy() for leaf in net.state_dict().values()]"
        )
    return dict(zip(state, leaves, strict=True)), count, setting.means(metrics)


def _call_client_app(
    function: OwnFunction, setting: _Setting, kind: str, state: Any, examples: Any, about: ClientRound
) -> Any:
    """Let a function of a ClientApp train or measure."""
    try:
        import flwr.app as records  # pyright: ignore
        import flwr.app.metadata as described  # pyright: ignore
        import flwr.supercore.date as date  # pyright: ignore
    except ImportError as error:
        raise UsageError(
            f"the functions of a ClientApp need flwr, but it cannot be imported here ({error}): pip install flwr, or give a "
            "client_fn that returns a NumPyClient"
        ) from error
    own, parts, clock = cast(Any, records), cast(Any, described), cast(Any, date)
    arrays, config = own.ArrayRecord(state), own.ConfigRecord(setting.config_of(about))
    # a Message without metadata can only be made inside a task of Flower's own runtime
    metadata: Any = parts.Metadata(0, "", 1, 1, "", "", clock.now().timestamp(), 3600.0, kind, None, None)
    message: Any = own.Message(own.RecordDict({"arrays": arrays, "config": config}), metadata=metadata)
    context: Any = own.Context(0, 1, setting.node_config(about), own.RecordDict(), dict(setting.run_config))
    context.examples = examples
    reply: Any = function(message, context)
    _expect_nothing_kept(context.state)
    if reply.has_error():
        raise UsageError(f"the reply of the ClientApp's function is an error: {reply.error}")
    content: Any = reply.content
    metrics: dict[str, Any] = {
        name: value for record in content.metric_records.values() for name, value in record.items()
    }
    if "num-examples" not in metrics:
        raise UsageError(
            "the reply of the ClientApp's function has no metric \"num-examples\", which becomes the client's weight: add it"
        )
    count = int(metrics["num-examples"])
    if kind == "evaluate":
        return count, setting.means(metrics)
    given = list(content.array_records.values())
    if len(given) != 1:
        raise UsageError(
            f"the reply of the ClientApp's function has {len(given)} ArrayRecords, but it must have one, with the model's "
            "state dict: correct the function"
        )
    return given[0].to_torch_state_dict(), count, setting.means(metrics)


def _expect_nothing_kept(state: Any) -> None:
    """Refuse code that writes to Flower's `context.state`, which sumus does not store between rounds."""
    if len(state):
        raise UsageError(
            f"the code keeps {', '.join(map(str, state))} in context.state, but sumus does not store context.state between "
            'rounds: make these values leaves of the model, and give them the role "personal" in the task\'s leaves='
        )
