"""Groups of command-line options: a dataclass for each group, whose fields are the options.

    @dataclass(frozen=True)
    class StorageOptions:
        data: Annotated[Path, typer.Option(help="Folder for all that the server keeps.")]
        keys: Annotated[Path | None, typer.Option(help="Folder for the key ring.")] = None

    @app.command()
    @with_option_groups
    def serve(storage: StorageOptions, listen: ListenOptions = OTHER_PORTS) -> None: ...

Typer makes one option from each parameter of a function. `with_option_groups` shows Typer one parameter for each field of the
groups instead, and passes the groups to the command. So an option is declared in one place, even if several commands have it,
and a command takes only a few values. A parameter's default, if it has one, sets its options' defaults for this command.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from inspect import Parameter, Signature
from typing import Annotated, Any, cast, get_type_hints

import typer
from typer.core import TyperCommand

Tls = Annotated[
    list[str] | None,
    typer.Option(metavar="auto | CERT KEY", help="Make a certificate, or use this chain and its key (PEM)."),
]


class TlsCommand(TyperCommand):
    """A command whose --tls takes one or two words."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        at = args.index("--tls") if "--tls" in args else len(args)
        if args[at + 1 : at + 2] != ["auto"] and args[at + 2 : at + 3] and not args[at + 2].startswith("-"):
            args = [*args[: at + 2], "--tls", *args[at + 2 :]]
        return super().parse_args(ctx, args)


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command for Typer from a function with groups of options as parameters.

    Args:
        command: The function. A parameter whose annotation is a dataclass is a group of options; Typer sees its fields.

    Returns:
        A function with the same name and docstring that takes each option under its own name.
    """
    own = inspect.signature(command, eval_str=True).parameters.values()
    groups: dict[str, Callable[..., Any]] = {
        parameter.name: cast(Any, parameter.annotation) for parameter in own if is_dataclass(parameter.annotation)
    }
    flat = [option for parameter in own for option in _options(parameter, parameter.name in groups)]
    twice = {option.name for option in flat if [other.name for other in flat].count(option.name) > 1}
    if twice:
        raise TypeError(f"{command.__name__} has two options of one name: {', '.join(sorted(twice))}")

    @functools.wraps(command)
    def run(**given: Any) -> None:
        values = {
            name: group(**{field.name: given.pop(field.name) for field in fields(cast(Any, group))})
            for name, group in groups.items()
        }
        command(**given, **values)

    run.__signature__ = Signature(flat)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    run.__annotations__ = {option.name: option.annotation for option in flat}
    return run


def _options(parameter: Parameter, is_group: bool) -> Iterator[Parameter]:
    """List the parameters that Typer sees instead of one parameter of a command."""
    if not is_group:
        yield parameter.replace(kind=Parameter.KEYWORD_ONLY)
        return
    hints = get_type_hints(parameter.annotation, include_extras=True)
    for field in fields(parameter.annotation):
        default = _default(field) if parameter.default is Parameter.empty else getattr(parameter.default, field.name)
        yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name])


def _default(field: Field[Any]) -> Any:
    """Return a field's default; `Parameter.empty` if it has none, so that the option is required."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return Parameter.empty if field.default is MISSING else field.default
