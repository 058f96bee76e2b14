"""Training by the user's own code: how a plan names this code, and where a device finds it.

    def train(state, examples): ...                  your own loop, at the top of a module
    work = sumus.client(train=train)                 client work; `work.loop` is an `OwnLoop`

Code is never sent to another machine. A plan holds only the names of the functions. A device finds a function of that name
among those that its own file has given to `sumus.client`; no other function of its file can be called by a plan. So a server
cannot choose code that the owner of the device did not offer.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, TypeAlias, cast

from sumus.errors import PlanError
from sumus.task import Task

OwnFunction: TypeAlias = Callable[..., Any]

_offered: dict[str, dict[str, OwnFunction]] = {}
"""The functions that this process has given to `sumus.client`: name → module → function."""


@dataclass(frozen=True)
class ClientRound:
    """The third argument of a user's own training or evaluation function: facts about the work that it does.

    Attributes:
        client: The client's id; on a device, the device's name.
        number: The round, from 0; None when a model is measured.
        seed: A number from 0 to 2³² − 1, for the random generators of other libraries. It differs between clients and rounds.
    """

    client: Any
    number: int | None
    seed: int


@dataclass(frozen=True)
class OwnLoop:
    """The user's functions that train a client, and measure a model on its examples.

    Attributes:
        train: The name of the function that trains.
        evaluate: The name of the function that measures; None to measure by the task's loss and metrics.
        functions: The functions by name. Empty in a plan that was read from JSON.
    """

    train: str
    evaluate: str | None = None
    functions: Mapping[str, OwnFunction] = field(default_factory=dict[str, OwnFunction], compare=False, repr=False)

    def function(self, name: str, task: Task) -> OwnFunction:
        """Return a function by its name.

        Args:
            name: The name of the function, `train` or `evaluate` of this value.
            task: The task for which it is called. If several modules offer the name, the task's own module decides.

        Raises:
            PlanError: This process has not offered a function of that name, or has offered several.
        """
        if name in self.functions:
            return self.functions[name]
        found = _offered.get(name, {})
        if len(found) > 1:
            own = set(_modules_of(task))
            found = {module: function for module, function in found.items() if module in own} or found
        if len(found) == 1:
            return next(iter(found.values()))
        if found:
            raise PlanError(
                "own-loop",
                f"the plan names a function `{name}`, but the modules {' and '.join(sorted(found))} each define one: rename "
                "all but the one that the plan means",
            )
        raise PlanError(
            "own-loop",
            f"the plan names a function `{name}` of the user's own, but this process offers none of that name: define it at "
            f"the top of the file that defines the task, and add the line sumus.client(train={name}) there, with evaluate= if "
            "the plan has one",
        )

    def expect_offered(self, task: Task) -> None:
        """Raise PlanError if this process does not offer the functions."""
        for name in (self.train, self.evaluate):
            if name is not None:
                self.function(name, task)


def offer(function: OwnFunction) -> str | None:
    """Remember a function, so that plans may name it.

    Returns:
        Its name; None if no plan can name it, because it is a lambda, a method, an object, or inside another function.
    """
    name = getattr(function, "__qualname__", "<")
    if not isinstance(function, FunctionType) or "<" in name:
        return None
    _offered.setdefault(name, {})[function.__module__] = function
    return name


def parameters_of(function: OwnFunction) -> int:
    """Return how many arguments a function takes from sumus: two, or three if it cannot be called without a `ClientRound`.

    Raises:
        PlanError: The function takes neither two nor three arguments.
    """
    if not callable(function):
        raise PlanError("own-loop", f"client() takes functions, not {function!r:.80}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # of an extension module, which does not say
        return 2
    for count in (2, 3):
        try:
            signature.bind(*range(count))
        except TypeError:
            continue
        return count
    name = getattr(function, "__qualname__", type(function).__name__)
    raise PlanError(
        "own-loop",
        f"`{name}` takes {signature}, but is called with (state, examples), or with (state, examples, round): let it take "
        "these, and give every other parameter a default",
    )


def _modules_of(task: Task) -> Iterator[str]:
    """Yield the names of the modules in which the code of a task is defined."""
    parts: tuple[object, ...] = (task.model, task.loss, task.prepare, *task.metrics.values())
    for part in parts:
        for value in (part, cast(object, type(part))):
            if isinstance(module := getattr(value, "__module__", None), str):
                yield module
