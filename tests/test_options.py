"""Groups of options: Typer sees each field of a group as an option, and a command gets the groups."""

import dataclasses
import inspect
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Annotated, Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sumus.options import with_option_groups


@dataclass(frozen=True)
class PlaceOptions:
    """Where something is."""

    folder: Annotated[str, typer.Option(help="The folder.")]
    port: Annotated[int, typer.Option(min=0, help="The port.")] = 80
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False


@dataclass(frozen=True)
class WordOptions:
    """What something is called."""

    name: Annotated[list[str] | None, typer.Option(help="A name; several times for several.")] = None
    loud: Annotated[bool, typer.Option(help="Aloud.")] = False


def run(command: Any, *words: str) -> Any:
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(with_option_groups(command))
    return CliRunner().invoke(app, words)


def test_a_command_gets_its_groups_as_values() -> None:
    got: list[Any] = []

    def command(
        what: Annotated[str, typer.Argument()],
        place: PlaceOptions,
        words: WordOptions,
        times: Annotated[int, typer.Option()] = 1,
    ) -> None:
        """Do it."""
        got.append((what, place, words, times))

    done = run(command, "it", "--folder", "here", "--json", "--name", "a", "--name", "b", "--times", "3")
    assert done.exit_code == 0, done.output
    assert got == [("it", PlaceOptions("here", 80, True), WordOptions(["a", "b"]), 3)]


def test_the_help_has_every_option_and_the_docstring() -> None:
    def command(place: PlaceOptions, words: WordOptions) -> None:
        """Do what is asked."""

    text = run(command, "--help").output
    for word in (
        "Do what is asked.",
        "--folder",
        "The folder.",
        "--port",
        "80",
        "--json",
        "--name",
        "--loud",
        "[required]",
    ):
        assert word in text


def test_a_field_without_a_default_has_to_be_given() -> None:
    def command(place: PlaceOptions) -> None: ...

    assert "Missing option '--folder'" in run(command).output


def test_a_parameters_default_gives_the_defaults_of_its_options() -> None:
    got, here = list[PlaceOptions](), PlaceOptions("here", port=90)

    def command(place: PlaceOptions = here) -> None:
        got.append(place)

    assert run(command).exit_code == run(command, "--port", "91").exit_code == 0
    assert got == [here, dataclasses.replace(here, port=91)]


def test_a_group_that_extends_another_one_says_an_option_otherwise() -> None:
    @dataclass(frozen=True)
    class OtherOptions(PlaceOptions):
        """Where something else is."""

        port: Annotated[int, typer.Option(help="Another port.")] = 81

    def command(place: OtherOptions) -> None: ...

    command.__annotations__["place"] = OtherOptions
    text = run(command, "--help").output
    assert "Another port." in text
    assert "The port." not in text
    assert "The folder." in text


def test_two_options_of_one_name_are_a_mistake() -> None:
    def command(place: PlaceOptions, port: Annotated[int, typer.Option()] = 1) -> None: ...

    with pytest.raises(TypeError, match="command has two options of one name: port"):
        with_option_groups(command)


NAMES = st.lists(st.from_regex("[a-z]{3,8}", fullmatch=True), min_size=1, max_size=9, unique=True)


@given(NAMES, st.data())
def test_whatever_the_groups_are_each_option_arrives_in_its_field(names: list[str], data: st.DataObject) -> None:
    names = [f"{name}_" for name in names]  # no keyword of Python
    cuts = sorted(data.draw(st.lists(st.integers(0, len(names)), max_size=3)))
    parts = [names[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(names)], strict=True)]
    groups = {
        f"group{number}": make_dataclass(
            f"Group{number}", [(name, int, field(default=0)) for name in part], frozen=True
        )
        for number, part in enumerate(parts)
        if part
    }
    values = {name: data.draw(st.integers(0, 99)) for name in names}
    got: dict[str, Any] = {}

    def command(**given: Any) -> None:
        got.update(given)

    kind = inspect.Parameter.KEYWORD_ONLY
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind, annotation=group) for name, group in groups.items()]
    )
    with_option_groups(command)(**values)
    assert {
        each.name: getattr(got[name], each.name) for name, group in groups.items() for each in fields(group)
    } == values
