"""Specs: each value of a plan stores the registered name of the function that made it, and the arguments of the call.

    @registered("update/clip_by_global_norm")
    def clip_by_global_norm(max_norm: float) -> Transform: ...

A call of the function returns a `Transform` whose `spec` is `{"name": "update/clip_by_global_norm", "with":
{"max_norm": 1.0}}`. `build(spec)` calls the function again. So a plan can be written as JSON and read by another
machine. Values are compared and printed by their spec.

A value that a user writes without registering it has the name `custom`. The simulator runs it. A plan with such
a value cannot be sent to devices: it is refused, and the error names the value.
"""

import copy
import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np

from sumus.errors import PlanError
from sumus.registry import load_own
from sumus.types import Json

CUSTOM = "custom"
UNSAID = {"unsaid": True}
"""Metadata for a field of a record: the spec leaves the field out if it has its default. Plans that were made before
the field existed then keep their ids.
"""
MAPPING = "mapping"
"""The name under which a spec writes a mapping among the parameters, so that the mapping cannot be mistaken for a spec."""


@dataclass(frozen=True)
class Spec:
    """The registered name of a factory, and the JSON parameters of one call of it."""

    name: str
    params: Mapping[str, Json] = field(default_factory=dict[str, Json])

    def to_json(self) -> dict[str, Json]:
        return {"name": self.name, "with": dict(self.params)} if self.params else {"name": self.name}


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Value:
    """Base class of the values that a plan is made of. They are frozen, and described by `spec`; equal specs mean equal
    values.
    """

    spec: Spec = field(default=Spec(CUSTOM), init=False)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Value) or type(self) is not type(other) or any(is_custom(self)):
            return False
        return canonical_json(self.spec.to_json()) == canonical_json(other.spec.to_json())

    def __hash__(self) -> int:
        return id(self) if any(is_custom(self)) else hash(canonical_json(self.spec.to_json()))

    def __repr__(self) -> str:
        return describe(self.spec.to_json())


P = ParamSpec("P")
V = TypeVar("V", bound=Value)

R = TypeVar("R")

_factories: dict[str, Callable[..., Any]] = {}
_records: dict[type, str] = {}


def record(name: str) -> Callable[[type[R]], type[R]]:
    """Register a frozen dataclass under a name. Its fields are JSON or values with specs; its spec consists of its fields."""

    def register(cls: type[R]) -> type[R]:
        _check_free(name, cls)
        _factories[name] = cls
        _records[cls] = name
        return cls

    return register


def registered(name: str, later: tuple[str, ...] = ()) -> Callable[[Callable[P, V]], Callable[P, V]]:
    """Register a factory of values under a name. Each value that the factory returns has a spec of that call.

    The parameters must be JSON, or values with specs. A name that is already taken is refused, since plans with this
    name exist elsewhere.

    Args:
        name: The name, as "kind/word".
        later: Parameters that were added to the factory when plans with it already existed. A spec leaves such a
            parameter out if it has its default, so that older plans keep their ids.
    """

    def register(factory: Callable[P, V]) -> Callable[P, V]:
        _check_free(name, factory)
        signature = inspect.signature(factory)

        @functools.wraps(factory)
        def make(*args: P.args, **kwargs: P.kwargs) -> V:
            try:
                call = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{factory.__name__}(): {error}") from None
            call.apply_defaults()
            for parameter, value in call.arguments.items():
                call.arguments[parameter] = _as_declared(value, str(signature.parameters[parameter].annotation))
            _check_types(factory, name, call)
            params = {
                p: to_json(v)
                for p, v in call.arguments.items()
                if p not in later or to_json(v) != to_json(signature.parameters[p].default)
            }
            value = copy.copy(factory(*call.args, **call.kwargs))
            # `spec` is not an argument of __init__, so dataclasses.replace drops it: a changed value has the spec "custom"
            object.__setattr__(value, "spec", Spec(name, params))
            return value

        _factories[name] = make
        return make

    return register


def build(description: Json) -> Any:
    """Make the value that a spec's JSON describes. Only registered names are called, and only with JSON arguments.

    Raises:
        PlanError: The JSON is not a spec, a name is not registered, or a parameter is unknown or of the wrong type.
    """
    if isinstance(description, Mapping):
        if "name" not in description or not set(description) <= {"name", "with"}:
            raise PlanError(
                "unknown-name", f"expected an object with the keys `name` and `with`, got {sorted(description)}"
            )
        name, params = description["name"], description.get("with", {})
        if isinstance(name, str) and name not in {MAPPING, *_factories}:
            load_own()
        if not isinstance(name, str) or name not in {MAPPING, *_factories}:
            raise PlanError("unknown-name", f"no value is registered as {name!r}; import the module that registers it")
        if not isinstance(params, Mapping):
            raise PlanError("unknown-name", f"the parameters of {name!r} must be an object")
        if name == MAPPING:
            return {key: build(value) for key, value in params.items()}
        return call_with(_factories[name], name, params)
    if isinstance(description, list | tuple):
        return tuple(build(item) for item in description)
    return description


@contextmanager
def read_as(what: str) -> Generator[None, None, None]:
    """Raise PlanError in place of any exception that Python raises while JSON from another machine is turned into values.

    Args:
        what: The noun for the text that is read, such as "a plan".
    """
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else f"{error!s:.200}"
        raise PlanError("malformed", f"this is not {what}: {why}") from error


def call_with(factory: Callable[..., Any], name: str, params: Mapping[str, Json]) -> Any:
    """Call `factory` with JSON parameters, after checking each against its declared type."""
    signature = inspect.signature(factory)
    if unknown := set(params) - set(signature.parameters):
        raise PlanError(
            "unknown-name",
            f"{name!r} has no parameters {sorted(unknown)}; this version of sumus may be too old for the plan: upgrade it",
        )
    call = signature.bind_partial()
    call.arguments.update({parameter: build(value) for parameter, value in params.items()})
    _check_types(factory, name, call)
    try:
        return factory(*call.args, **call.kwargs)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise PlanError("wrong-type", f"{name!r} cannot be built from {sorted(params)}: {error}") from error


def _check_types(factory: Callable[..., Any], name: str, call: inspect.BoundArguments) -> None:
    declared = _declared(factory)
    for parameter, value in call.arguments.items():
        hint = declared.get(parameter, Any)
        many = call.signature.parameters[parameter].kind is inspect.Parameter.VAR_POSITIONAL
        if not _is_of(value, tuple[hint, ...] if many else hint):
            said = f"{name.rpartition('/')[2]} does not accept {parameter}={value!r:.80}"
            raise PlanError("wrong-type", f"{said}: it must be of the type {inspect.formatannotation(hint)}")


def _declared(factory: Callable[..., Any]) -> Mapping[str, Any]:
    try:
        return get_type_hints(factory)
    except NameError:  # the annotation uses a name that is imported for type checkers only
        return {}


def _is_of(value: object, hint: Any) -> bool:
    """Return whether a value built from JSON has the annotated type. Annotations that JSON cannot express are accepted."""
    if hint is Any:
        return True
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_is_of(value, option) for option in inner)
    if kind is Literal:
        return any(value == option and type(value) is type(option) for option in inner)
    if kind is tuple:
        items = cast(tuple[object, ...], value) if isinstance(value, tuple) else None
        if items is None:
            return False
        wanted = (inner[0],) * len(items) if inner[-1:] == (...,) else inner
        return len(items) == len(wanted) and all(map(_is_of, items, wanted))
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) and kind is None else True


def to_json(value: object) -> Json:
    """Convert a parameter to JSON. A value with a spec becomes its spec."""
    if isinstance(value, Value):
        return value.spec.to_json()
    if type(value) in _records:
        given = [(f, getattr(value, f.name)) for f in dataclasses.fields(cast(Any, value))]
        fields = {f.name: to_json(v) for f, v in given if not (f.metadata.get("unsaid") and v == f.default)}
        return Spec(_records[type(value)], fields).to_json()
    if isinstance(value, np.generic):
        return cast(Any, value).item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        items = cast(Mapping[str, object], value).items()
        return Spec(MAPPING, {str(name): to_json(item) for name, item in items}).to_json()
    if isinstance(value, list | tuple):
        return [to_json(item) for item in cast(list[object], value)]
    return {"name": CUSTOM, "with": {"of": getattr(value, "__qualname__", type(value).__name__)}}


def is_custom(value: Value) -> list[str]:
    """List, as text, the calls in a value that have no registered name. A value without such calls can be sent to devices."""

    def walk(description: Json) -> list[str]:
        if isinstance(description, Mapping):
            own = [describe(description)] if description.get("name") == CUSTOM else []
            return own + [found for item in description.values() for found in walk(item)]
        if isinstance(description, list | tuple):
            return [found for item in description for found in walk(item)]
        return []

    return walk(value.spec.to_json())


def describe(description: Json) -> str:
    """Write a spec as the call that made the value: `clip_by_global_norm(max_norm=1.0)`."""
    if isinstance(description, Mapping) and "name" in description:
        params = cast(Mapping[str, Json], description.get("with", {}))
        inner = ", ".join(f"{p}={describe(v)}" for p, v in params.items())
        return f"{str(description['name']).rpartition('/')[2]}({inner})"
    if isinstance(description, list | tuple):
        return "(" + ", ".join(describe(item) for item in description) + ")"
    return repr(description)


def canonical_json(value: Json) -> str:
    """Write JSON as its one canonical text: sorted names, no blanks, shortest floats, no NaN. Plan ids are hashes of
    this text.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise PlanError(
            "finite", "a parameter is NaN or infinite, which no plan can hold: give a finite number"
        ) from error


def _check_free(name: str, factory: Any) -> None:
    """Raise PlanError if a name belongs to another definition. The same definition may be registered again, as by a
    notebook cell.
    """
    if not factory.__module__.startswith("sumus."):
        load_own()  # a name of sumus is taken even if its file is not imported yet
    taken = _factories.get(name)
    if name == MAPPING or (taken is not None and _where(taken) != _where(factory)):
        raise PlanError("taken-name", f"the name {name!r} is registered already; choose another")


def _where(factory: Any) -> tuple[str, str]:
    return factory.__module__, factory.__qualname__


def _as_declared(value: Any, annotation: str) -> Any:
    """Convert an argument to its declared type, so that `lr=1`, `lr=1.0` and `lr=np.float64(1)` give the same plan id.

    Integers become floats if the parameter is a float; numpy numbers become Python numbers.
    """
    if isinstance(value, np.generic):
        value = cast(Any, value).item()
    if isinstance(value, list | tuple):
        return tuple(_as_declared(item, annotation) for item in cast(list[object], value))
    wants_float = "float" in annotation and "int" not in annotation
    return float(value) if wants_float and isinstance(value, int) and not isinstance(value, bool) else value
