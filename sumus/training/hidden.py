"""State that code keeps outside a model's leaves: attributes, enclosed variables, globals, tensors that are never sent.

    hidden = HiddenState({"model": module, "loss": loss}, leaves)
    ...                                  the code runs
    hidden.restore()                     restores everything; returns the paths that had changed, such as `loss.calls`

Only leaves are sent and saved. Any other state of the code would reach the next client in a run with one process, but not
in a run with two. Such state would also be lost when a run continues from a folder. So every client begins with this
state as it was before the run. A walk over the objects, from some roots, finds the places where such state can be
(`sumus.training.walk`). A place is, for example, a list, a variable or the attributes of an object
(`sumus.training.places`).
"""

import functools
import pickle
import random
import re
import types
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from sumus.errors import TaskError
from sumus.training.places import LONGEST, MISSING, Cell, Place
from sumus.training.walk import FUNCTIONS, MEMBERS, HiddenWalk, globals_of, users

_ALWAYS = 8
"""So many first comparisons compare everything. Later, the 16th, 32nd, 64th … and the last comparison compare everything."""
_DEEPEST = 4
"""The number of levels of enclosing functions that are searched."""


class HiddenState:
    """The state that code keeps outside the leaves, and its value when this object was made.

    Args:
        roots: The objects at which the walk begins, by the name that paths begin with.
        leaves: The tensors that are leaves of the model. They are not hidden state.

    Attributes:
        tensors: The tensors that the walk met, each with its path.
        digest: A hash of the numbers and texts; equal in two processes that begin alike.
        refused: The first error because of which something could not be restored; None if everything could be.
    """

    def __init__(self, roots: Mapping[str, object], leaves: Iterable[Tensor] = ()) -> None:
        # the walk keeps the objects that it met alive, so that no other object gets the id of one of them
        self._walk = HiddenWalk(roots, leaves)
        self._places = self._walk.places
        self.tensors, self.digest = self._walk.tensors, self._walk.digest
        self.refused: TaskError | None = None
        self._begun = 0

    def is_due(self) -> bool:
        """Return whether the slow comparisons are due now. The caller checks this before each client. The first
        comparisons are always due; later ones are due more and more rarely.
        """
        self._begun += 1
        return self._begun <= _ALWAYS or self._begun & (self._begun - 1) == 0

    def changed(self, whole: bool = True) -> list[str]:
        """Return the paths whose values have changed.

        Args:
            whole: Whether to compare large arrays and long containers too, which takes long.
        """
        return list(dict.fromkeys(path for place in self._places for path in self._changed(place, whole)))

    @staticmethod
    def _changed(place: Place, whole: bool) -> list[str]:
        """Return the paths in one place whose values have changed. A place that has changed once is compared each time from
        then on."""
        if not place.rare:
            return list(place.changed())
        if place.is_other_at_a_glance():
            place.missed = 0
        elif not whole:
            place.missed += 1
            return []
        if found := list(place.changed()):
            place.rare = False
        else:
            place.missed = 0
        return found

    def restore(self, whole: bool = True) -> list[str]:
        """Restore everything, and return the paths that had changed.

        Args:
            whole: See `changed`.

        Raises:
            TaskError: Something cannot be restored. Everything else has been restored.
        """
        paths, refused = dict[str, None](), None
        for place in self._places:
            if found := self._changed(place, whole):
                paths |= dict.fromkeys(found)
                try:
                    place.restore()
                except TaskError as error:
                    refused = refused or error
        if refused is not None:
            self.refused = self.refused or refused
            raise refused
        return list(paths)

    def end(self, logs: bool = True) -> None:
        """Restore everything for the last time.

        Args:
            logs: Whether containers to which the code only added items get all of these items back.
        """
        try:
            self.restore()
        finally:
            for place in self._places if logs else ():
                place.end()

    @contextmanager
    def keeping_logs(self) -> Generator[None, None, None]:
        """Run the code of the block as a trial. Items that it adds to containers that may be a user's logs are removed."""
        logs = [(place, place.log()) for place in self._places]
        try:
            yield
        finally:
            for place, log in logs:
                place.put_log(log)


def which(path: str) -> str:
    """Describe a path in words: an attribute of the model, or something elsewhere."""
    own = re.match(r"model\.([^.\[]*)", path)
    return (
        f"its forward changes its own attribute `{own[1]}`"
        if own
        else f"its steps change `{path}`, which is not a leaf"
    )


# ── modules that cannot be copied ────────────────────────────────────────────────────────────────────────────────────


def tied_to_itself(module: nn.Module) -> str | None:
    """Return why a copy of a module would be incomplete: what it would lose or share with the original. None if it is complete.

    A copy of a parameter has no hooks, and a copy of a function encloses the same objects as the original function.
    """
    own = {id(part): name or "itself" for name, part in module.named_modules()}
    own |= {id(part): name for name, part in (*module.named_parameters(), *module.named_buffers())}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if getattr(tensor, "_backward_hooks", None):
            return f"`{name}` has a hook, which a copy of the model would lose"
        if getattr(tensor, "_post_accumulate_grad_hooks", None):
            raise TaskError(
                f"`{name}` has a hook of register_post_accumulate_grad_hook, but sumus does not accumulate gradients, so the "
                "hook would not run: use register_hook, whose function receives the gradient and can return another one"
            )
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name not in MEMBERS and (found := _function_around(value, own, 0)) is not None:
                where = f"{path}.{name}".lstrip(".")
                return f"`{where}` holds a function that uses `{found}` of this model, and would still do so in a copy"
    return None


def _function_around(value: Any, own: Mapping[int, str], depth: int) -> str | None:
    """Return the part of a module that a function in a value encloses, or reads as a global; None if there is none."""
    inside: Iterable[Any] = ()
    if isinstance(value, types.FunctionType):
        names = globals_of(value.__code__)[0] if users(value.__module__) else ()
        cells = [part for cell in value.__closure__ or () if (part := Cell("", cell).then) is not MISSING]
        held = [*cells, *(value.__defaults__ or ()), *(value.__globals__.get(name) for name in names)]
        flat = [part for one in held for part in (one if isinstance(one, list | tuple) else (one,))]
        if (found := next((own[id(part)] for part in flat if id(part) in own), None)) is not None:
            return found
        inside = (part for part in held if isinstance(part, FUNCTIONS))
    elif isinstance(value, functools.partial):
        inside = (cast(Any, value).func,)
    elif isinstance(value, dict | list | tuple | set):
        inside = cast(dict[Any, Any], value).values() if isinstance(value, dict) else cast(Iterable[Any], value)
    if depth < _DEEPEST and (not isinstance(value, dict | list | tuple | set) or len(cast(Any, value)) <= LONGEST):
        return next((found for part in inside if (found := _function_around(part, own, depth + 1)) is not None), None)
    return None


# ── Python's and numpy's generators ──────────────────────────────────────────────────────────────────────────────────


def generators() -> tuple[bytes, bytes]:
    """Return the state of Python's and numpy's own generators."""
    return pickle.dumps(random.getstate()), pickle.dumps(np.random.get_state())


def put_generators(stood: tuple[bytes, bytes]) -> None:
    """Restore these generators to a state."""
    random.setstate(pickle.loads(stood[0]))
    np.random.set_state(pickle.loads(stood[1]))


@contextmanager
def generators_seeded(seed: int) -> Generator[None, None, None]:
    """Set Python's and numpy's own generators from a seed, and restore them after the block."""
    stood = generators()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        put_generators(stood)
