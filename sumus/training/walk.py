"""The walk that finds the places where code can keep state outside a model's leaves.

    walk = HiddenWalk({"model": module, "loss": loss}, leaves)
    walk.places                          each remembers its present content, and can restore it

The walk goes from some roots through attributes, containers, enclosed variables, globals and classes. It inspects the
objects and the code of users, but not the internal state of libraries.
"""

import collections
import contextvars
import ctypes
import dis
import enum
import functools
import hashlib
import importlib.util
import io
import os
import random
import sys
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from sumus.training.places import (
    LONGEST,
    LONGEST_PICKLED,
    MISSING,
    PLAIN,
    SMALL_BYTES,
    Cell,
    Depths,
    Entries,
    Iterating,
    Memory,
    Names,
    Numbers,
    ObjectArray,
    Opaque,
    Place,
    RandomGenerator,
    Sequence,
    Sparse,
    Variable,
    bytes_of,
    inside_of,
)

MOST_PLACES = 20_000
"""The most places that are recorded. If there are more, the walk ends."""
MOST_BYTES = 2**26
"""The most bytes of tensors and arrays that are copied so that they can be restored."""
_RANDOM = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinMethodType, types.MethodWrapperType, functools.partial)
_HOLDERS = {
    "types.SimpleNamespace",
    "argparse.Namespace",
    "_thread._local",
    *("collections.UserDict", "collections.UserList", "collections.ChainMap", "queue.Queue"),
    *("weakref.WeakKeyDictionary", "weakref.WeakValueDictionary", "_weakrefset.WeakSet"),
    "multiprocessing.sharedctypes.SynchronizedBase",
}
"""Python's own classes whose objects often hold users' state."""
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
"""Attributes that torch's modules keep for themselves."""
MEMBERS = {"_parameters", "_buffers", "_modules"}


@functools.lru_cache(1024)
def users(module: object) -> bool:
    """Return whether the module with this name is a user's own: neither a part of Python nor an installed package."""
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
def globals_of(code: types.CodeType) -> tuple[tuple[str, ...], frozenset[str], tuple[tuple[int, str], ...]]:
    """Return the names in a piece of code.

    Returns:
        The globals that it reads or writes, in order; the attributes that it uses, with the names that it takes from a
        module; and the modules that it imports, each with the number of packages that it goes up.
    """
    names, attributes, imported = dict[str, None](), set[str](), dict[tuple[int, str], None]()
    before: list[Any] = [0, 0]
    for step in dis.get_instructions(code):
        if "GLOBAL" in step.opname or step.opname in ("LOAD_NAME", "STORE_NAME"):
            names[str(step.argval)] = None
        elif step.opname == "IMPORT_NAME":
            up = before[-2] if isinstance(before[-2], int) else 0
            imported[up, str(step.argval)] = None
            for name in before[-1] if isinstance(before[-1], tuple) else ():  # it may be a module
                attributes.add(str(name))
                imported[up, f"{step.argval}.{name}".lstrip(".")] = None
        elif "ATTR" in step.opname or "METHOD" in step.opname:
            attributes.add(str(step.argval))
        before = [before[-1], step.argval]
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            more, others, modules = globals_of(inner)
            names |= dict.fromkeys(more)
            attributes |= others
            imported |= dict.fromkeys(modules)
    return tuple(names), frozenset(attributes), tuple(imported)


def _imported(name: str, package: str) -> types.ModuleType | None:
    """Return a module that code imports while it runs. A user's own module is imported now, since it may keep state
    after that."""
    try:
        full = importlib.util.resolve_name(name, package) if name.startswith(".") else name
        if full in sys.modules:
            return sys.modules[full]
        if full.partition(".")[0] in sys.stdlib_module_names | _LIBRARIES:
            return None
        found = importlib.util.find_spec(full)
        if found is None or {"site-packages", "dist-packages"} & {*Path(found.origin or "").parts}:
            return None
        return importlib.import_module(full)
    except Exception:  # the module may raise anything; the user's code will then raise it too
        return None


class HiddenWalk:
    """The state that code keeps outside the leaves, with its present value.

    Args:
        roots: The objects at which the walk begins, by the name that paths begin with.
        leaves: The tensors that are leaves of the model. They are not hidden state.

    Attributes:
        places: The places where state can be.
        tensors: The tensors that the walk met, each with its path.
        digest: A hash of the numbers and texts; equal in two processes that begin alike.
    """

    def __init__(self, roots: Mapping[str, object], leaves: Iterable[Tensor] = ()) -> None:
        self.places: list[Place] = []
        self.tensors: list[tuple[str, Tensor]] = []
        self._leaves = {id(leaf): leaf for leaf in leaves}
        self._seen: dict[int, Any] = {}
        self._names: dict[int, tuple[str, dict[str, Any], dict[str, None]]] = {}
        self._room, self._each_time = MOST_BYTES, SMALL_BYTES
        self._hash = hashlib.sha256()
        self._waiting = collections.deque[tuple[str, Any, bool]]((name, root, True) for name, root in roots.items())
        while self._waiting and len(self.places) < MOST_PLACES:
            self._look_at(*self._waiting.popleft())
        for path, held, names in self._names.values():
            self._keep(_part(path, held, tuple(names)))
        self.digest = self._hash.hexdigest()

    def _keep(self, place: Place) -> None:
        self.places.append(place)

    def _look_at(self, path: str, value: Any, root: bool = False) -> None:
        """Record the places of a value, and go on to the objects that it holds."""
        kind = type(value)
        if isinstance(value, PLAIN) and not (isinstance(value, enum.Enum) and users(kind.__module__)):
            if "{" not in path:  # items of a set: their order depends on the process
                self._hash.update(f"{path}={value!r}\n".encode())
            return
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor | np.ndarray):
            self._look_at_numbers(path, value)
        elif isinstance(value, _RANDOM):
            self._keep(RandomGenerator(path, value))
        elif isinstance(value, tuple | frozenset | dict | list | collections.deque | set | bytearray):
            self._look_at_container(path, cast(Any, value))
        elif isinstance(value, type):
            self._look_at_class(value)
        elif isinstance(value, FUNCTIONS):
            self._look_at_callable(path, value)
        elif isinstance(value, Iterator) and not users(kind.__module__):
            if not isinstance(value, io.IOBase):
                self._keep(Iterating(path, value))
                self._later((path, part) for part in inside_of(value))
        elif isinstance(value, weakref.ref):
            self._later([(path, value())])
        elif isinstance(value, contextvars.ContextVar):
            self._keep(place := Variable(path, cast(Any, value)))
            self._later([(path, place.then)] if place.then is not MISSING else [])
        elif isinstance(value, ctypes._SimpleCData | ctypes.Array | ctypes.Structure) or (
            isinstance(value, memoryview) and not value.readonly and value.c_contiguous
        ):
            self._keep(Memory(path, value))
        elif value is os.environ:
            held = os.environ
            self._keep(Names(lambda _: "os.environ", held.copy, held.__setitem__, lambda name: held.pop(name, None)))
        elif not isinstance(value, types.ModuleType):
            self._look_at_object(path, value, root)

    def _later(self, found: Iterable[tuple[str, Any]]) -> None:
        self._waiting.extend((path, value, False) for path, value in found)

    def _look_at_numbers(self, path: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self.tensors.append((path, value))
            hooks = cast(Mapping[int, Any], getattr(value, "_backward_hooks", None) or {})
            self._later((f"{path}.hook", hook) for hook in hooks.values())
            self._look_at_attributes(path, value, frozenset(name for name in vars(value) if name.startswith("_")))
            if id(value) in self._leaves or value.device.type == "meta":
                return
            if type(value).__name__.startswith(("Uninitialized", "Fake")):
                return
            if value.layout is not torch.strided:
                if "sparse" in str(value.layout):
                    self._keep(Sparse(path, value))
                return
        elif value.dtype.hasobject:
            if value.dtype == object:
                self._keep(ObjectArray(path, value))
                self._later((f"{path}[{at}]", part) for at, part in enumerate(value.flat) if at < LONGEST)
            return
        elif type(value) is not np.ndarray:
            self._look_at_attributes(path, value)
        place = Numbers(path, value, self._room, self._each_time)
        self._room -= place.nbytes
        self._each_time -= 0 if place.rare else place.nbytes
        self._keep(place)
        if place.nbytes and "{" not in path:
            self._hash.update(path.encode() + bytes_of(value))

    def _look_at_container(self, path: str, value: Any) -> None:
        """Look at the objects in a container, and at the attributes of an object whose class is derived from a
        container."""
        kind, long = type(value), len(value) > LONGEST
        if isinstance(value, dict):
            values = list(cast(dict[Any, Any], value).values())
            self._keep(Entries(path, cast(dict[Any, Any], value)))
            self._look_at(path, tuple(key for key in value if isinstance(key, PLAIN)))
        else:
            values = list(cast(Iterable[Any], value))
            if not isinstance(value, tuple | frozenset):
                self._keep(Sequence(path, value))
        if isinstance(value, set | frozenset):
            self._later((f"{path}{{...}}", part) for part in values[:LONGEST] if not isinstance(part, PLAIN))
        elif not isinstance(value, bytearray) and not (long and not isinstance(value, tuple)):
            names = ("..." if isinstance(value, dict) else str(at) for at in range(len(values)))
            self._later((f"{path}[{name}]", part) for name, part in zip(names, values, strict=True))
        if long and len(values) <= LONGEST_PICKLED and not all(isinstance(part, PLAIN) for part in values):
            self._keep(Depths(path, value))
        if isinstance(value, collections.defaultdict):
            self._later([(path, cast(Any, value).default_factory)])
        if kind not in (tuple, frozenset, dict, list, collections.deque, set, bytearray):
            self._look_at_attributes(path, value)
            self._look_at_class(kind)

    def _look_at_class(self, value: type) -> None:
        """Look at a class that a user wrote: at its data, and at its functions."""
        for kind in value.__mro__ if users(value.__module__) else ():
            if not users(kind.__module__) or (kind is not value and id(kind) in self._seen):
                continue
            self._seen[id(kind)] = kind
            if issubclass(kind, enum.Enum):
                self._later((f"{kind.__name__}.{name}", member) for name, member in kind.__members__.items())

            where = kind.__name__
            self._keep(
                Names(
                    lambda name, where=where: f"{where}.{name}",
                    functools.partial(_data_of, kind),
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
            place = Cell(where, cell)
            self._keep(place)
            if place.then is not MISSING:
                self._later([(where, place.then)])
        self._later((f"{path}({name}=)", part) for name, part in (value.__kwdefaults__ or {}).items())
        self._later((path, part) for part in value.__defaults__ or ())
        if not users(value.__module__):
            return
        own = vars(value)
        self._keep(Names(lambda name: f"{path}.{name}", lambda: own, own.__setitem__, lambda name: own.pop(name, None)))
        self._later((f"{path}.{name}", part) for name, part in own.items())
        names, attributes, imported = globals_of(value.__code__)
        self._look_at_globals(value.__module__, value.__globals__, names)
        package = str(value.__globals__.get("__package__") or "")
        inside = [value.__globals__.get(name) for name in names]
        inside += [Cell(path, cell).then for cell in value.__closure__ or ()]
        inside += [_imported("." * up + name, package) for up, name in imported]
        self._look_at_modules([part for part in inside if isinstance(part, types.ModuleType)], attributes)

    def _look_at_modules(self, waiting: list[types.ModuleType], attributes: frozenset[str]) -> None:
        """Look at the names that the code uses in these modules, and in the modules that these names refer to."""
        met = set[int]()
        while waiting:
            module = waiting.pop()
            if id(module) in met:
                continue
            met.add(id(module))
            held = vars(module)
            if module is os and attributes & {"environ", "environb", "getenv", "putenv"}:
                self._later([("os.environ", os.environ)])
            if users(module.__name__):
                names = sorted(attributes & held.keys())
                self._look_at_globals(module.__name__, held, names)
                waiting += [held[name] for name in names if isinstance(held[name], types.ModuleType)]

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
            if (place := Opaque(path, value)).then is not None:
                self._keep(place)
            return None
        else:
            return None
        self._look_at_attributes(path, value, skipped)
        return self._look_at_class(kind)

    def _look_at_attributes(self, path: str, value: Any, skipped: frozenset[str] = frozenset()) -> None:
        """Look at an object's attributes."""
        kind = type(value)
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            names = cast(dict[str, Any], own)

            def shown() -> dict[str, Any]:
                return {name: part for name, part in names.items() if name not in skipped}

            self._keep(
                Names(
                    lambda name: f"{path}.{name}", shown, names.__setitem__, lambda name: names.pop(name, None), names
                )
            )
            for name, part in shown().items():
                if name in MEMBERS and isinstance(value, nn.Module):
                    self._look_at_members(path, part, users(kind.__module__))
                elif name.endswith("_hooks") and isinstance(
                    value, nn.Module
                ):  # by order, since their ids differ between processes
                    self._look_at_members(f"{path}.hooks", part, True)
                    self._later((f"{path}.hook{at}", hook) for at, hook in enumerate(part.values()))
                else:
                    self._later([(f"{path}.{name}", part)])
        self._look_at_slots(path, value, kind)

    def _look_at_script(self, path: str, value: Any) -> None:
        """Look at the attributes and tensors of a scripted module, which torch keeps outside Python."""
        concrete = getattr(value, "_concrete_type", None)
        names = [name for name in (concrete.get_attributes() if concrete else ()) if name not in _OF_MODULES]
        self._keep(
            Names(
                lambda name: f"{path}.{name}",
                lambda: {name: getattr(value, name) for name in names},
                lambda name, part: setattr(value, name, part),
                lambda name: None,
            )
        )
        inside = (*value.named_children(), *value.named_buffers(recurse=False), *value.named_parameters(recurse=False))
        self._later((f"{path}.{name}", part) for name, part in inside)

    def _look_at_members(self, path: str, held: dict[str, Any], is_users: bool) -> None:
        """Look at parameters, buffers, modules or hooks of a module. Empty ones of torch's own layers stay empty."""
        if not held and not is_users:
            return
        self._seen[id(held)] = held
        self._keep(
            Names(lambda name: f"{path}.{name}", lambda: held, held.__setitem__, lambda name: held.pop(name, None))
        )
        self._later(
            (f"{path}.{name}", part) for name, part in held.items() if isinstance(name, str) and part is not None
        )

    def _look_at_slots(self, path: str, value: Any, kind: type) -> None:
        slots = _slots_of(kind)
        if not slots:
            return

        def read() -> dict[str, Any]:
            return {name: getattr(value, name) for name in slots if hasattr(value, name)}

        self._keep(
            Names(
                lambda name: f"{path}.{name}",
                read,
                lambda name, part: slots[name].__set__(value, part),
                lambda name: slots[name].__delete__(value),
            )
        )
        self._later((f"{path}.{name}", part) for name, part in read().items())


def _part(path: str, held: dict[str, Any], names: tuple[str, ...]) -> Names:
    """Return a place for some names of a namespace."""
    return Names(
        lambda name: f"{path}.{name}",
        lambda: {name: held[name] for name in names if name in held},
        held.__setitem__,
        lambda name: held.pop(name, None),
    )


def _slots_of(kind: type) -> dict[str, types.MemberDescriptorType]:
    """Return the slots of a user's class, by the names that Python gives to private ones."""
    return {
        name: part
        for base in kind.__mro__
        if users(base.__module__)
        for name, part in vars(base).items()
        if isinstance(part, types.MemberDescriptorType)
    }


@functools.lru_cache(1024)
def _cached_names(kind: type) -> frozenset[str]:
    """Return the attributes of a class that are computed once for each object, and then kept in the object."""
    return frozenset(
        name
        for base in kind.__mro__
        for name, part in vars(base).items()
        if isinstance(part, functools.cached_property)
    )


@functools.lru_cache(1024)
def _is_looked_into(kind: type) -> bool:
    """Return whether objects of a class can hold users' state."""
    named = {f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__}
    return users(kind.__module__) or kind.__module__.startswith("sumus.") or bool(named & _HOLDERS)


def _data_of(kind: type) -> dict[str, Any]:
    """Return the attributes of a class that hold data."""
    return {name: part for name, part in vars(kind).items() if _is_data(name, part)}


def _is_data(name: str, value: Any) -> bool:
    """Return whether a class's attribute is a value, and not a part of how the class works."""
    if (name.startswith("__") and name.endswith("__")) or name.startswith("_abc_"):
        return False
    return not callable(value) and not hasattr(type(value), "__get__")


def _derived(module: nn.Module) -> set[str]:
    """Return the attributes that torch's own hooks compute anew before each forward pass: for pruning, and for a
    weight's norm."""
    hooks = module._forward_pre_hooks.values()
    own = (hook for hook in hooks if type(hook).__module__.startswith("torch.nn.utils."))
    return {
        name
        for hook in own
        if isinstance(name := getattr(hook, "_tensor_name", None) or getattr(hook, "name", None), str)
    }
