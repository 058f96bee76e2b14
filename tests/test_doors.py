"""Doors: what users call takes ten parameters at most. Options that belong together are one value.

A door is a function or a class of `sumus.__all__`, a method of such a class, and a function of the command line. The values that
doors take are doors too. A field of a dataclass counts as a parameter; `**options` hides nothing.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypedDict, Unpack, get_args, get_type_hints

import msgspec
import pytest
import typer

import sumus
from sumus import cli

MOST = 10

ALLOWED: dict[str, str] = {
    "pacing.Pacing": "a record in a plan's JSON: plan ids are hashed from its fields, and stay",
}
"""Doors that take more, and why."""


def parameters(door: Callable[..., Any]) -> list[str]:
    """The parameters of a door, those that stand behind `**options` too; `**options` of any kind counts as one too many."""
    found = list[str]()
    for parameter in inspect.signature(door).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            hint = get_type_hints(door.__init__ if inspect.isclass(door) else door).get(
                parameter.name, parameter.annotation
            )
            (form,) = get_args(hint) or (None,)
            found += list(get_type_hints(form)) if form is not None else ["…"] * (MOST + 1)
        elif parameter.name != "self":
            found.append(parameter.name)
    return found


def hints_of(door: Callable[..., Any]) -> dict[str, Any]:
    """The types of a door's parameters, as far as they can be found here."""
    try:
        if inspect.isclass(door):
            return get_type_hints(door if is_record(door) else door.__init__)
        return {name: hint for name, hint in get_type_hints(door).items() if name != "return"}
    except NameError:  # a name that only type checkers see
        return {name: hint for name, hint in getattr(door, "__annotations__", {}).items() if not isinstance(hint, str)}


def is_record(kind: type[Any]) -> bool:
    """Whether a class is a dataclass or a struct, so that its fields are its parameters."""
    return dataclasses.is_dataclass(kind) or issubclass(kind, msgspec.Struct)


def values_in(hint: Any) -> Iterator[type[Any]]:
    """The dataclasses and structs of the package that a type holds."""
    if inspect.isclass(hint) and hint.__module__.startswith("sumus") and is_record(hint):
        yield hint
    for inner in get_args(hint):
        yield from values_in(inner)


def name_of(door: Callable[..., Any]) -> str:
    return f"{door.__module__.removeprefix('sumus.')}.{door.__qualname__}"


def public() -> Iterator[Callable[..., Any]]:
    """The functions and classes that users name."""
    for name in sumus.__all__:
        value = getattr(sumus, name)
        for each in vars(value).values() if inspect.ismodule(value) else [value]:
            own = getattr(each, "__module__", "").startswith("sumus") and not getattr(each, "__name__", "_").startswith(
                "_"
            )
            if own and (inspect.isfunction(each) or inspect.isclass(each)):
                yield each


def commands(app: typer.Typer) -> Iterator[Callable[..., Any]]:
    """The functions of the command line, as they are written."""
    for command in app.registered_commands:
        if command.callback is not None:
            yield inspect.unwrap(command.callback)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            yield from commands(group.typer_instance)


def methods(door: type[Any]) -> Iterator[Callable[..., Any]]:
    """The public methods that a class defines."""
    for name, member in vars(door).items():
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if inspect.isfunction(function) and not name.startswith("_"):
            yield function


def doors() -> dict[str, Callable[..., Any]]:
    """All doors by name, and the values that they take; without exceptions, which nobody makes but the package."""
    found: dict[str, Callable[..., Any]] = {}
    waiting = [*public(), *commands(cli.app)]
    while waiting:
        door = waiting.pop()
        if name_of(door) in found:
            continue
        if inspect.isclass(door) and issubclass(door, BaseException):
            continue
        found[name_of(door)] = door
        if inspect.isclass(door):
            waiting += methods(door)
        for hint in hints_of(door).values():
            waiting += values_in(hint)
    return found


DOORS = doors()


def test_the_doors_are_found() -> None:
    names = {
        "operations.serve.serve", "operations.stores.Storage", "node.node.Node", "node.options.NodeTraining",
        "operations.commands.register.<locals>.serve", "operations.options.ListenOptions", "simulator.commands.simulate",
    }  # fmt: skip
    assert names <= set(DOORS)


def test_no_door_takes_more_than_ten_parameters() -> None:
    wide = {name: len(parameters(door)) for name, door in DOORS.items() if len(parameters(door)) > MOST}
    assert {name: count for name, count in wide.items() if name not in ALLOWED} == {}
    assert set(ALLOWED) - set(wide) == set(), "these take ten or less now, or are gone: take them off the list"


class ManyOptions(TypedDict, total=False):
    """Eleven options."""

    a: int
    b: int
    c: int
    d: int
    e: int
    f: int
    g: int
    h: int
    i: int
    j: int
    k: int


def hiding(what: int, **options: Unpack[ManyOptions]) -> None: ...


def hiding_all(what: int, **options: Any) -> None: ...


@pytest.mark.parametrize(("door", "count"), [(hiding, 12), (hiding_all, 12)])
def test_options_hide_nothing(door: Callable[..., Any], count: int) -> None:
    assert len(parameters(door)) == count
