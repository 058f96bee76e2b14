"""Digests of the user's code in a plan, by which a run that goes on notices that the code is no longer the same.

    before = digests_of(plan)                     {"python": "3.12", "model=": "5f3a…", "loss=": …}
    changed(before, digests_of(plan))             the parameters whose code has changed

A plan's id names a loss or a model, and not what it computes. A digest covers the bytecode of functions and classes, the
numbers in them (defaults, enclosed variables, attributes, globals), and the user's functions and classes that they name. It does
not cover comments, docstrings, arrays, lists and dicts outside the code, or the code of installed packages.
"""

import functools
import hashlib
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any, cast

from sumus.plan import Plan
from sumus.task import Task
from sumus.training.walk import globals_of, users

_MOST = 2_000
"""The most objects that one digest covers."""
_NUMBERS = (bool, int, float, complex, type(None))
_WRITTEN_BY_PYTHON = ("__doc__", "__dict__", "__weakref__", "__firstlineno__", "__static_attributes__")


def digests_of(plan: Plan) -> dict[str, str]:
    """Return a digest of the user's code by parameter, and the release of Python, whose bytecode differs from others."""
    task, algorithm = cast(Task, plan.task), plan.algorithm
    parts: dict[str, Any] = {
        "model=": task.model,
        "loss=": task.loss,
        "metrics=": tuple(task.metrics.items()),
        "prepare=": task.prepare,
        "update=": algorithm.update,
        "aggregator=": algorithm.aggregator,
        "server=": algorithm.server,
    }
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"python": python} | {name: _digest(part) for name, part in parts.items()}


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the parameters whose code differs; none if another release of Python, or of sumus, wrote the digests."""
    if before.get("python") != now.get("python"):
        return []
    return [name for name, digest in now.items() if before.get(name, digest) != digest]


def _digest(value: object) -> str:
    """Return a digest of a value's code, in 16 hexadecimal digits."""
    said, seen, waiting = hashlib.sha256(), dict[int, object](), [value]
    while waiting and len(seen) < _MOST:
        one = waiting.pop()
        if isinstance(one, _NUMBERS):
            said.update(f"{one!r};".encode())
        elif id(one) not in seen:
            seen[id(one)] = one  # held, so that no other object gets its id
            for found in _content(one):
                if isinstance(found, bytes | str):
                    said.update(found if isinstance(found, bytes) else f"{found};".encode())
                else:
                    waiting.append(found)
    return said.hexdigest()[:16]


def _content(one: object) -> Iterator[Any]:
    """Yield what describes an object: text and bytes, and further objects to describe."""
    if isinstance(one, types.MethodType):
        yield from (one.__func__, one.__self__)
    elif isinstance(one, functools.partial):
        yield from (one.func, *one.args, *one.keywords.values())
    elif isinstance(one, types.FunctionType):
        yield from _of_function(one)
    elif isinstance(one, type):
        yield from _of_class(one)
    elif isinstance(one, tuple):
        yield from cast("tuple[Any, ...]", one)
    elif not isinstance(one, bytes | str | list | dict | set):  # such a container may be a log, which grows
        yield type(one)
        if users(type(one).__module__) or type(one).__module__.startswith("sumus."):
            yield from _of_attributes(one)


def _of_function(one: types.FunctionType) -> Iterator[Any]:
    yield one.__qualname__
    for cell in one.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
    yield from (*(one.__defaults__ or ()), *(one.__kwdefaults__ or {}).values())
    if users(one.__module__):
        yield from _of_code(one.__code__)
        for name in globals_of(one.__code__)[0]:
            found = one.__globals__.get(name)
            if isinstance(found, (*_NUMBERS, types.FunctionType, type)):
                yield from (name, found)


def _of_code(code: types.CodeType) -> Iterator[Any]:
    """Yield the bytecode of a function and of the functions in it."""
    yield code.co_code
    yield " ".join(code.co_names)
    for position, constant in enumerate(code.co_consts):
        if isinstance(constant, types.CodeType):
            yield from _of_code(constant)
        elif position or not isinstance(constant, str):  # the first text is a docstring
            yield _said(constant)


def _said(constant: object) -> str:
    """Return a constant of a piece of code as text; a set has no order of its own."""
    if isinstance(constant, frozenset):
        return " ".join(sorted(map(repr, cast("frozenset[Any]", constant))))
    return repr(constant)


def _of_class(one: type) -> Iterator[Any]:
    yield f"{one.__module__}.{one.__qualname__}" if not users(one.__module__) else one.__qualname__
    if users(one.__module__):
        yield from one.__bases__
        for name, member in sorted(vars(one).items()):
            if name not in _WRITTEN_BY_PYTHON:
                member = getattr(member, "__func__", getattr(member, "fget", member))
                if isinstance(member, (*_NUMBERS, types.FunctionType)):
                    yield from (name, member)


def _of_attributes(one: object) -> Iterator[Any]:
    """Yield the numbers, functions and values among an object's attributes, but not whether a module is in training mode."""
    for name, value in sorted(vars(one).items() if hasattr(one, "__dict__") else ()):
        is_code = isinstance(value, (*_NUMBERS, tuple, types.FunctionType, functools.partial))
        if name == "_modules":
            yield from value.values()
        elif name != "training" and (is_code or type(value).__module__.startswith("sumus.")):
            yield from (name, value)
