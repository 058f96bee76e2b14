"""State that code keeps outside a model's leaves: attributes, enclosed variables, globals, tensors that nobody sends.

    hidden = HiddenState({"model": module, "loss": loss}, leaves)
    ...                                  the code runs
    hidden.restore()                     the paths that had changed, such as `loss.calls`; now they are as they were

A plan carries leaves, and nothing else. What code keeps besides would reach the next client in one process and not in two, and
would be lost when a run goes on from a folder: so every client begins with it as it was. A walk from the roots finds the
places where such state can be. It looks into what a user wrote, and not into what libraries keep for themselves.
"""

import collections
import dis
import enum
import functools
import hashlib
import math
import pickle
import random
import re
import sys
import types
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from sumus.errors import TaskError

MOST_PLACES = 20_000
"""Beyond so many places, the walk ends."""
LONGEST = 10_000
"""A longer list, mapping or set is compared by its length alone, and what it holds is not looked at."""
MOST_BYTES = 2**26
"""Bytes of tensors and arrays that are copied, so that they can be put back."""
_SMALL = 2**14
"""Numbers in a tensor that is compared by value too: a write through `.data` does not count as a version."""
_PICKLED = 2**16
"""Bytes of a pickle that are compared."""

_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range, enum.Enum),
    *(np.generic, np.dtype, torch.dtype, torch.device, torch.Size),
)
_RANDOM = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinMethodType, types.MethodWrapperType, functools.partial)
_HOLDERS = {
    "types.SimpleNamespace",
    "argparse.Namespace",
    "_thread._local",
    "collections.UserDict",
    "collections.UserList",
}
"""Python's own classes in which people keep what they please."""
_SHOW_NOTHING = {"builtins", "_thread", "_weakref", "weakref", "re", "_abc", "_contextvars"}
_LIBRARIES = {"torch", "numpy", "sumus", "torchvision"}
_OF_MODULES = {
    *(
        "training",
        "_non_persistent_buffers_set",
        "_is_full_backward_hook",
        "_flat_weights",
        "_flat_weight_refs",
        "_flat_weights_names",
        "_compiled_call_impl",
    ),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
}
"""What torch's modules keep for themselves."""
_MEMBERS = {"_parameters", "_buffers", "_modules"}
_DEEPEST = 4
_MISSING = object()


@functools.lru_cache(1024)
def users(module: object) -> bool:
    """Whether a module, by its name, is a user's own: it is no part of Python, and not installed as a package."""
    if not isinstance(module, str):
        return False
    top = module.partition(".")[0]
    if top == "__main__":
        return True
    if top in _LIBRARIES or top in sys.stdlib_module_names:
        return False
    parts = Path(getattr(sys.modules.get(module), "__file__", None) or "").parts
    return not {"site-packages", "dist-packages"} & {*parts}


@functools.lru_cache(4096)
def globals_of(code: types.CodeType) -> tuple[tuple[str, ...], frozenset[str]]:
    """Names of the globals that a piece of code reads or writes, in order; and of the attributes that it names."""
    names, attributes = dict[str, None](), set[str]()
    for step in dis.get_instructions(code):
        if "GLOBAL" in step.opname or step.opname in ("LOAD_NAME", "STORE_NAME"):
            names[str(step.argval)] = None
        elif "ATTR" in step.opname or "METHOD" in step.opname:
            attributes.add(str(step.argval))
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            more, others = globals_of(inner)
            names |= dict.fromkeys(more)
            attributes |= others
    return tuple(names), frozenset(attributes)


# ── places ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _same(now: Any, then: Any) -> bool:
    """Whether a value is the one that it was; a number or a text that equals it is."""
    if now is then:
        return True
    if type(now) is not type(then) or not isinstance(now, (*_PLAIN, tuple)):
        return False
    if isinstance(now, tuple):
        return len(now) == len(then) and all(map(_same, now, then))
    return bool(now == then) or (isinstance(now, float) and math.isnan(now) and math.isnan(then))


class _Names:
    """A namespace, or some of its names: of an object, a mapping, a module, a class.

    read: gives the values by name.  put, drop: set a name's value; take a name away.  whole: the namespace, where `read` gives
        only some of it: one of the same length with the same values has not changed.
    """

    def __init__(
        self,
        path: Callable[[Any], str],
        read: Callable[[], Mapping[Any, Any]],
        put: Callable[[Any, Any], object],
        drop: Callable[[Any], object],
        whole: Mapping[str, Any] | None = None,
    ) -> None:
        self._path, self._read, self._put, self._drop = path, read, put, drop
        self._whole, self._length = whole, len(whole or ())
        self.then = dict(read())

    def changed(self) -> Iterator[str]:
        then, whole = self.then, self._whole
        if whole is not None and len(whole) == self._length and all(whole.get(name) is then[name] for name in then):
            return
        now = self._read()
        if len(now) == len(then) and all(now.get(name, _MISSING) is value for name, value in then.items()):
            return
        for name in {**then, **now}:
            if not _same(now.get(name, _MISSING), then.get(name, _MISSING)):
                yield self._path(name)

    def restore(self) -> None:
        now = dict(self._read())
        for name in now.keys() - self.then.keys():
            self._drop(name)
        for name, value in self.then.items():
            if now.get(name, _MISSING) is not value:
                self._put(name, value)


class _Sequence:
    """A list, a deque or a set, as a whole."""

    def __init__(self, path: str, held: Any) -> None:
        self._path, self._held = path, held
        self.then = tuple(held)
        self._log: list[Any] = []

    def changed(self) -> Iterator[str]:
        held, then = self._held, self.then
        if len(held) != len(then) or (
            held != set(then) if isinstance(held, set) else len(then) <= LONGEST and not all(map(_same, held, then))
        ):
            yield self._path

    def restore(self) -> None:
        now = tuple(self._held)
        if isinstance(self._held, list) and all(map(_same, now, self.then)):
            self._log += now[len(self.then) :]
        self._held.clear()
        (self._held.update if isinstance(self._held, set) else self._held.extend)(self.then)

    def end(self) -> None:
        """A list to which the code only adds may be a user's log: give the list all that was ever added."""
        if self._log:
            self._held.extend(self._log)
            self._log = []
            self.then = tuple(self._held)


class _Cell:
    """A variable that a function encloses."""

    def __init__(self, path: str, cell: types.CellType) -> None:
        self._path, self._cell = path, cell
        self.then = self._now()

    def _now(self) -> Any:
        try:
            return self._cell.cell_contents
        except ValueError:
            return _MISSING

    def changed(self) -> Iterator[str]:
        if not _same(self._now(), self.then):
            yield self._path

    def restore(self) -> None:
        if self.then is _MISSING:
            del self._cell.cell_contents
        else:
            self._cell.cell_contents = self.then


class _Numbers:
    """A tensor or an array. kept: a copy; None for one that is too large to be put back."""

    def __init__(self, path: str, held: Any, room: int) -> None:
        self._path, self._held = path, held
        self._small = (held.nelement() if isinstance(held, Tensor) else held.size) <= _SMALL
        self._version = self._of(held)
        size = held.nelement() * held.element_size() if isinstance(held, Tensor) else held.nbytes
        self.nbytes = size if size <= room else 0
        self._kept = None if size > room else _copied(held)

    @staticmethod
    def _of(held: Any) -> int:
        return held._version if isinstance(held, Tensor) and not held.is_inference() else 0

    def changed(self) -> Iterator[str]:
        if self._of(self._held) != self._version or (
            self._kept is not None and self._small and not _same_bits(self._held, self._kept)
        ):
            yield self._path

    def restore(self) -> None:
        if self._kept is None:
            raise TaskError(
                f"`{self._path}` changes as clients train, is no leaf of the model, and is too large to be put back for each "
                "client: make it a buffer of the model, with register_buffer"
            )
        if isinstance(self._held, Tensor):
            with torch.no_grad():
                if self._held.shape != self._kept.shape:
                    self._held.set_(self._kept.clone())  # pyright: ignore[reportUnknownMemberType]
                else:
                    self._held.copy_(self._kept)
        else:
            self._held[...] = self._kept
        self._version = self._of(self._held)


class _Drawing:
    """A generator of random numbers."""

    def __init__(self, path: str, held: Any) -> None:
        self._path, self._held = path, held
        self.then = self._now()

    def _now(self) -> Any:
        held = self._held
        if isinstance(held, random.Random):
            return held.getstate()
        if isinstance(held, torch.Generator):
            return held.get_state().numpy().tobytes()
        return held.bit_generator.state if isinstance(held, np.random.Generator) else held.get_state()

    def changed(self) -> Iterator[str]:
        if pickle.dumps(self._now()) != pickle.dumps(self.then):
            yield self._path

    def restore(self) -> None:
        held = self._held
        if isinstance(held, random.Random):
            held.setstate(self.then)
        elif isinstance(held, np.random.Generator):
            held.bit_generator.state = self.then
        elif isinstance(held, torch.Generator):
            held.set_state(torch.frombuffer(bytearray(self.then), dtype=torch.uint8))
        else:
            held.set_state(self.then)


class _Opaque:
    """What cannot be put back, and shows that it moved: an iterator, an object of an extension."""

    def __init__(self, path: str, held: Any) -> None:
        self._path, self._held = path, held
        self.then = self._now()

    def _now(self) -> Any:
        if isinstance(self._held, types.GeneratorType):
            frame = self._held.gi_frame
            return frame and (frame.f_lasti, {n: v for n, v in frame.f_locals.items() if isinstance(v, _PLAIN)})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return pickle.dumps(self._held)[:_PICKLED]
        except Exception:  # whatever its class raises: then its text is all that is seen
            return repr(self._held) if type(self._held).__module__ == "itertools" else None

    def changed(self) -> Iterator[str]:
        if self._now() != self.then:
            yield self._path

    def restore(self) -> None:
        raise TaskError(
            f"`{self._path}` is a {type(self._held).__name__} that moves on as clients train, and it cannot be put back for each "
            "client: compute its values from a buffer of the model instead, such as a count of steps"
        )


def _copied(held: Any) -> Any:
    return held.detach().clone() if isinstance(held, Tensor) else held.copy()


def _bytes_of(held: Any) -> bytes:
    """The numbers of a tensor or an array, as they lie in memory."""
    if isinstance(held, Tensor):
        return (
            held.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if held.nelement() else b""
        )
    return held.tobytes()


def _same_bits(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and one.shape == other.shape and torch.equal(one.detach(), other):
        return True
    return one.shape == other.shape and _bytes_of(one) == _bytes_of(other)


_Place = _Names | _Sequence | _Cell | _Numbers | _Drawing | _Opaque


# ── the walk ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class HiddenState:
    """What the code behind some roots keeps outside the leaves, as it is now.

    roots: by the name that paths begin with.  leaves: tensors that the plan carries, and that therefore are not hidden.
    digest: of its numbers and texts; equal in two processes that begin alike.  tensors: that were met, by path.
    """

    def __init__(self, roots: Mapping[str, object], leaves: Iterable[Tensor] = ()) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._leaves = {id(leaf): leaf for leaf in leaves}
        self._places: list[_Place] = []
        self._seen: dict[int, Any] = {}
        self._names: dict[int, tuple[str, dict[str, Any], dict[str, None]]] = {}
        self._room = MOST_BYTES
        self._hash = hashlib.sha256()
        self._waiting = collections.deque[tuple[str, Any, bool]]((name, root, True) for name, root in roots.items())
        while self._waiting and len(self._places) < MOST_PLACES:
            self._look_at(*self._waiting.popleft())
        for path, held, names in self._names.values():
            self._keep(_part(path, held, tuple(names)))
        self.digest = self._hash.hexdigest()

    def changed(self) -> list[str]:
        """The paths whose values are others now."""
        return list(dict.fromkeys(path for place in self._places for path in place.changed()))

    def restore(self) -> list[str]:
        """Put everything back; the paths that had changed. TaskError for what cannot be put back, once the rest is."""
        paths: dict[str, None] = {}
        refused: TaskError | None = None
        for place in self._places:
            if found := list(place.changed()):
                paths |= dict.fromkeys(found)
                try:
                    place.restore()
                except TaskError as error:
                    refused = refused or error
        if refused is not None:
            raise refused
        return list(paths)

    def end(self, logs: bool = True) -> None:
        """Put everything back for the last time.

        Args:
            logs: Whether lists to which the code only added get all that was added.
        """
        try:
            self.restore()
        finally:
            for place in self._places if logs else ():
                if isinstance(place, _Sequence):
                    place.end()

    def _keep(self, place: _Place) -> None:
        self._places.append(place)

    def _look_at(self, path: str, value: Any, root: bool = False) -> None:
        """Note a value's places, and go on to what it holds."""
        if isinstance(value, _PLAIN):
            self._hash.update(f"{path}={value!r}\n".encode())
            return
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor | np.ndarray):
            self._look_at_numbers(path, value)
        elif isinstance(value, _RANDOM):
            self._keep(_Drawing(path, value))
        elif isinstance(value, tuple | frozenset):
            self._later((f"{path}[{at}]", part) for at, part in enumerate(cast(Iterable[Any], value)))
        elif isinstance(value, dict):
            self._look_at_mapping(path, cast(dict[Any, Any], value))
        elif isinstance(value, list | collections.deque | set | bytearray):
            held = cast(Any, value)
            self._keep(_Sequence(path, held))
            if len(held) <= LONGEST and not isinstance(held, set | bytearray):
                self._later((f"{path}[{at}]", part) for at, part in enumerate(held))
        elif isinstance(value, type):
            self._look_at_class(value)
        elif isinstance(value, _FUNCTIONS):
            self._look_at_callable(path, value)
        elif isinstance(value, Iterator) and not users(type(value).__module__):
            self._keep(_Opaque(path, value))
        elif not isinstance(value, types.ModuleType):
            self._look_at_object(path, value, root)

    def _later(self, found: Iterable[tuple[str, Any]]) -> None:
        self._waiting.extend((path, value, False) for path, value in found)

    def _look_at_numbers(self, path: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self.tensors.setdefault(path, value)
            hooks = cast(Mapping[int, Any], getattr(value, "_backward_hooks", None) or {})
            self._later((f"{path}.hook", hook) for hook in hooks.values())
            if id(value) in self._leaves or str(value.device) == "meta" or value.layout is not torch.strided:
                return
            if type(value).__name__.startswith(("Uninitialized", "Fake")):
                return
        elif value.dtype.hasobject:
            return
        place = _Numbers(path, value, self._room)
        self._room -= place.nbytes
        self._keep(place)
        if place.nbytes:
            self._hash.update(path.encode() + _bytes_of(value))

    def _look_at_mapping(self, path: str, value: dict[Any, Any]) -> None:
        if len(value) > LONGEST:
            return
        self._keep(
            _Names(
                lambda name: f"{path}[{name!r:.40}]",
                lambda: value,
                value.__setitem__,
                lambda name: value.pop(name, None),
            )
        )
        self._later((f"{path}[{name!r:.40}]", part) for name, part in value.items())

    def _look_at_class(self, value: type) -> None:
        """A class that a user wrote: its data, and the functions in it."""
        for kind in value.__mro__ if users(value.__module__) else ():
            if not users(kind.__module__) or (kind is not value and id(kind) in self._seen):
                continue
            self._seen[id(kind)] = kind

            def data(kind: type = kind) -> dict[str, Any]:
                return {name: part for name, part in vars(kind).items() if _is_data(name, part)}

            where = kind.__name__
            self._keep(
                _Names(
                    lambda name, where=where: f"{where}.{name}",
                    data,
                    lambda name, part, kind=kind: setattr(kind, name, part),
                    lambda name, kind=kind: delattr(kind, name),
                    vars(kind),
                )
            )
            for name, part in vars(kind).items():
                function = getattr(part, "__func__", None) or getattr(part, "fget", None) or part
                if isinstance(function, types.FunctionType) or _is_data(name, part) or users(type(part).__module__):
                    self._later([(f"{where}.{name}", function)])

    def _look_at_callable(self, path: str, value: Any) -> None:
        if isinstance(value, functools.partial):
            part = cast(Any, value)
            self._later([(path, part.func), (path, part.args), (path, part.keywords)])
        elif isinstance(value, types.MethodType):
            self._later([(path, value.__func__), (path.rpartition(".")[0] or path, value.__self__)])
        elif isinstance(value, types.FunctionType):
            self._look_at_function(path, value)
        elif not isinstance(own := getattr(value, "__self__", None), types.ModuleType | type(None)):
            self._later([(path, own)])

    def _look_at_function(self, path: str, value: types.FunctionType) -> None:
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            if id(cell) in self._seen:
                continue
            self._seen[id(cell)] = cell
            where = f"{path}.{name}"
            place = _Cell(where, cell)
            self._keep(place)
            if place.then is not _MISSING:
                self._later([(where, place.then)])
        self._later((f"{path}({name}=)", part) for name, part in (value.__kwdefaults__ or {}).items())
        self._later((path, part) for part in value.__defaults__ or ())
        if not users(value.__module__):
            return
        own = vars(value)
        self._keep(
            _Names(lambda name: f"{path}.{name}", lambda: own, own.__setitem__, lambda name: own.pop(name, None))
        )
        self._later((f"{path}.{name}", part) for name, part in own.items())
        names, attributes = globals_of(value.__code__)
        self._look_at_globals(value.__module__, value.__globals__, names)
        for name in names:
            module = value.__globals__.get(name)
            if isinstance(module, types.ModuleType) and users(module.__name__):
                held = vars(module)
                self._look_at_globals(module.__name__, held, sorted(attributes & held.keys()))

    def _look_at_globals(self, module: str, held: dict[str, Any], names: Iterable[str]) -> None:
        _, _, known = self._names.setdefault(id(held), (module, held, {}))
        new = [name for name in names if name not in known]
        known |= dict.fromkeys(new)
        self._later((f"{module}.{name}", held[name]) for name in new if name in held)

    def _look_at_object(self, path: str, value: Any, root: bool) -> None:
        kind = type(value)
        skipped = _cached_names(kind)
        if isinstance(value, torch.jit.ScriptModule):
            return self._look_at_script(path, value)
        if isinstance(value, nn.Module):
            empty = {name for name, part in vars(value).items() if name.endswith("_hooks") and not part}
            skipped |= _OF_MODULES | _derived(value) | empty
        elif root or _is_looked_into(kind):
            pass
        elif hasattr(value, "__wrapped__"):  # functools.cache, and decorators of its kind
            return self._later([(path, value.__wrapped__)])
        elif not hasattr(value, "__dict__") and kind.__module__ not in _SHOW_NOTHING:
            if (place := _Opaque(path, value)).then is not None:
                self._keep(place)
            return None
        else:
            return None
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            names = cast(dict[str, Any], own)

            def shown() -> dict[str, Any]:
                return {name: part for name, part in names.items() if name not in skipped}

            self._keep(
                _Names(
                    lambda name: f"{path}.{name}", shown, names.__setitem__, lambda name: names.pop(name, None), names
                )
            )
            for name, part in shown().items():
                if name in _MEMBERS and isinstance(value, nn.Module):
                    self._look_at_members(path, part, users(kind.__module__))
                elif name.endswith("_hooks") and isinstance(
                    value, nn.Module
                ):  # by order: their numbers are a process's
                    self._look_at_members(f"{path}.hooks", part, True)
                    self._later((f"{path}.hook{at}", hook) for at, hook in enumerate(part.values()))
                else:
                    self._later([(f"{path}.{name}", part)])
        self._look_at_slots(path, value, kind)
        return self._look_at_class(kind)

    def _look_at_script(self, path: str, value: Any) -> None:
        """The attributes and tensors that a scripted module, and those in it, keep in a machine of their own."""
        concrete = getattr(value, "_concrete_type", None)
        names = [name for name in (concrete.get_attributes() if concrete else ()) if name not in _OF_MODULES]
        self._keep(
            _Names(
                lambda name: f"{path}.{name}",
                lambda: {name: getattr(value, name) for name in names},
                lambda name, part: setattr(value, name, part),
                lambda name: None,
            )
        )
        inside = (*value.named_children(), *value.named_buffers(recurse=False), *value.named_parameters(recurse=False))
        self._later((f"{path}.{name}", part) for name, part in inside)

    def _look_at_members(self, path: str, held: dict[str, Any], is_users: bool) -> None:
        """Parameters, buffers, modules or hooks of a module. torch's own layers get no more of them than they have."""
        if not held and not is_users:
            return
        self._seen[id(held)] = held
        self._keep(
            _Names(lambda name: f"{path}.{name}", lambda: held, held.__setitem__, lambda name: held.pop(name, None))
        )
        self._later(
            (f"{path}.{name}", part) for name, part in held.items() if isinstance(name, str) and part is not None
        )

    def _look_at_slots(self, path: str, value: Any, kind: type) -> None:
        slots = [
            name
            for base in kind.__mro__
            if users(base.__module__) and not isinstance(vars(base).get("__slots__", ()), str)
            for name in cast(Iterable[str], vars(base).get("__slots__", ()))
            if name not in ("__dict__", "__weakref__")
        ]
        if not slots:
            return

        def read() -> dict[str, Any]:
            return {name: getattr(value, name) for name in slots if hasattr(value, name)}

        self._keep(
            _Names(
                lambda name: f"{path}.{name}",
                read,
                lambda name, part: object.__setattr__(value, name, part),
                lambda name: object.__delattr__(value, name),
            )
        )
        self._later((f"{path}.{name}", part) for name, part in read().items())


def _part(path: str, held: dict[str, Any], names: tuple[str, ...]) -> _Names:
    """Some names of a namespace."""
    return _Names(
        lambda name: f"{path}.{name}",
        lambda: {name: held[name] for name in names if name in held},
        held.__setitem__,
        lambda name: held.pop(name, None),
    )


@functools.lru_cache(1024)
def _cached_names(kind: type) -> frozenset[str]:
    """The attributes of a class that are computed once for each object, and then kept in the object."""
    return frozenset(
        name
        for base in kind.__mro__
        for name, part in vars(base).items()
        if isinstance(part, functools.cached_property)
    )


@functools.lru_cache(1024)
def _is_looked_into(kind: type) -> bool:
    """Whether objects of a class can hold what a user keeps."""
    named = {f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__}
    return users(kind.__module__) or kind.__module__.startswith("sumus.") or bool(named & _HOLDERS)


def _is_data(name: str, value: Any) -> bool:
    """Whether a class's attribute is a value, and not a part of how the class works."""
    if (name.startswith("__") and name.endswith("__")) or name.startswith("_abc_"):
        return False
    return not callable(value) and not hasattr(type(value), "__get__")


def _derived(module: nn.Module) -> set[str]:
    """Attributes that torch's own hooks compute anew before each forward pass: of pruning, of a weight's norm."""
    hooks = module._forward_pre_hooks.values()
    own = (hook for hook in hooks if type(hook).__module__.startswith("torch.nn.utils."))
    return {
        name
        for hook in own
        if isinstance(name := getattr(hook, "_tensor_name", None) or getattr(hook, "name", None), str)
    }


def which(path: str) -> str:
    """What changed, in words: an attribute of the model, or something elsewhere."""
    own = re.match(r"model\.([^.\[]*)", path)
    return (
        f"its forward changes its own attribute `{own[1]}`" if own else f"its steps change `{path}`, which is no leaf"
    )


# ── models that a copy would not be ──────────────────────────────────────────────────────────────────────────────────


def tied_to_itself(module: nn.Module) -> str | None:
    """What of a module a copy would lose, or take from the module that it was copied from; None where a copy is a whole one.

    A copy of a parameter has no hooks, and a copy of a function encloses what the function enclosed.
    """
    own = {id(part): name or "itself" for name, part in module.named_modules()}
    own |= {id(part): name for name, part in (*module.named_parameters(), *module.named_buffers())}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if getattr(tensor, "_backward_hooks", None):
            return f"`{name}` has a hook, and a copy of the model has none"
        if getattr(tensor, "_post_accumulate_grad_hooks", None):
            raise TaskError(
                f"`{name}` has a hook of register_post_accumulate_grad_hook, and gradients are not accumulated here: take "
                "register_hook, which gets the gradient and gives another"
            )
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name not in _MEMBERS and (found := _function_around(value, own, 0)) is not None:
                where = f"{path}.{name}".lstrip(".")
                return f"`{where}` holds a function that takes `{found}` from this very model, also in a copy"
    return None


def _function_around(value: Any, own: Mapping[int, str], depth: int) -> str | None:
    """The part of a module that a function in a value encloses, or reads as a global."""
    inside: Iterable[Any] = ()
    if isinstance(value, types.FunctionType):
        names, _ = globals_of(value.__code__) if users(value.__module__) else ((), None)
        cells = [part for cell in value.__closure__ or () if (part := _Cell("", cell).then) is not _MISSING]
        held = [*cells, *(value.__defaults__ or ()), *(value.__globals__.get(name) for name in names)]
        flat = [part for one in held for part in (one if isinstance(one, list | tuple) else (one,))]
        if (found := next((own[id(part)] for part in flat if id(part) in own), None)) is not None:
            return found
        inside = (part for part in held if isinstance(part, _FUNCTIONS))
    elif isinstance(value, functools.partial):
        inside = (cast(Any, value).func,)
    elif isinstance(value, dict | list | tuple | set):
        inside = cast(dict[Any, Any], value).values() if isinstance(value, dict) else cast(Iterable[Any], value)
    if depth < _DEEPEST and (not isinstance(value, dict | list | tuple | set) or len(cast(Any, value)) <= LONGEST):
        return next((found for part in inside if (found := _function_around(part, own, depth + 1)) is not None), None)
    return None


# ── Python's and numpy's generators ──────────────────────────────────────────────────────────────────────────────────


def generators() -> tuple[bytes, bytes]:
    """Where Python's and numpy's own generators stand."""
    return pickle.dumps(random.getstate()), pickle.dumps(np.random.get_state())


def put_generators(stood: tuple[bytes, bytes]) -> None:
    """Put them back to where they stood."""
    random.setstate(pickle.loads(stood[0]))
    np.random.set_state(pickle.loads(stood[1]))


@contextmanager
def generators_seeded(seed: int) -> Generator[None, None, None]:
    """Python's and numpy's own generators set from a seed, and given back as they were."""
    stood = generators()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        put_generators(stood)
