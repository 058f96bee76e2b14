"""Names and sizes of classes: one noun, one meaning; and no class that does everything.

no two public classes of the package have one name
no class is called like a preposition, a pronoun, a question word or a bare verb
no class has more than 300 lines or 25 methods
"""

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import sumus

ROOT = Path(sumus.__file__).parent
MOST_LINES, MOST_METHODS = 300, 25

PREPOSITIONS = """About Above After Against And As At Before Behind Below Beside Between But By For From If In Into Like Near
Of Off On Or Out Over Per Since Than Through To Under Until Up Upon Via While With Within Without"""
PRONOUNS = """All Any Anyone Anything Both Each Everybody Everyone Everything He Her Here His How It Its Mine My Nobody None
Nothing One Other Others Our She Somebody Someone Something That Their Them There These They This Those We What When Where Which
Who Whoever Whose Why You Your"""
BARE_VERBS = """Accept Add Admit Allow Announce Apply Ask Assign Await Become Begin Bring Carry Close Collect Compare Complete
Conduct Consider Convert Count Decide Decode Deliver Delete Deny Describe Drop Encode End Enrol Ensure Erase Evaluate Explain
Fetch Find Finish Follow Forget Gather Get Give Go Hold Invite Join Keep Leave Learn Let Listen Look Make Meet Merge Notice Notify
Obtain Offer Open Perform Pick Prepare Promote Provide Put Read Receive Refuse Reject Release Remember Remove Resume Retry Return
Run Say Seal See Select Send Serve Set Settle Show Sleep Speak Start Stop Submit Take Teach Tell Think Train Try Turn Undo Unseal
Use Wait Wake Walk Watch Write"""
NO_NOUNS = frozenset([*PREPOSITIONS.split(), *PRONOUNS.split(), *BARE_VERBS.split()])
"""Words that name no thing. `Run` is a noun here and stands in `ALLOWED`; participles such as `Assigned` say what happened."""

ALLOWED = {
    "Run": "a server's run of rounds: the noun of the field",
    "Nothing": "the empty message of the wire; the OpenAPI document, which others read, has this name",
}
"""Classes that keep such a name, and why."""

LARGE = {
    "storage.store.Rows": "a table: one method for each operation on rows",
    "storage.sql._SqlRows": "the same table in SQL",
    "storage.memory._Transaction": "the same table in memory",
}
"""Classes that are larger, by module and name, and why."""


@dataclass(frozen=True)
class Found:
    """A class of the package.

    Attributes:
        module: The module, without `sumus.`.
        name: The class's name.
        lines: The number of its lines.
        methods: The number of its methods; overloads of one name count once.
    """

    module: str
    name: str
    lines: int
    methods: int

    @property
    def place(self) -> str:
        return f"{self.module}.{self.name}"


def classes() -> Iterator[Found]:
    """All classes of the package, also those within functions."""
    for path in sorted(ROOT.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                methods = [each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
                overloads = sum("overload" in ast.unparse(word) for each in methods for word in each.decorator_list)
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                yield Found(module, node.name, lines, len(methods) - overloads)


CLASSES = list(classes())


def test_no_two_public_classes_have_one_name() -> None:
    places: defaultdict[str, list[str]] = defaultdict(list)
    for found in CLASSES:
        if not found.name.startswith("_"):
            places[found.name].append(found.module)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def names_no_thing(name: str) -> bool:
    """Whether a class's name is a single word that is no noun."""
    return re.fullmatch("_?[A-Z][a-z]*", name) is not None and name.removeprefix("_") in NO_NOUNS


@pytest.mark.parametrize("name", ["At", "Of", "Which", "Where", "Kept_", "Tell", "Conduct", "_Keep", "Nobody"])
def test_the_check_knows_words_that_are_no_nouns(name: str) -> None:
    assert names_no_thing(name) == (name != "Kept_")


@pytest.mark.parametrize(
    "name", ["Update", "Report", "SendReport", "AtLeast", "Round", "Assigned", "_SqlRows", "TlsCommand"]
)
def test_the_check_lets_nouns_pass(name: str) -> None:
    assert not names_no_thing(name)


def test_no_class_is_called_like_a_preposition_or_a_bare_verb() -> None:
    assert {found.place for found in CLASSES if names_no_thing(found.name) and found.name not in ALLOWED} == set()


def test_no_class_does_everything() -> None:
    large = {found.place: found for found in CLASSES if found.lines > MOST_LINES or found.methods > MOST_METHODS}
    assert {place: (found.lines, found.methods) for place, found in large.items() if place not in LARGE} == {}


def test_the_exceptions_are_still_needed() -> None:
    names = Counter(found.name for found in CLASSES)
    assert [name for name in ALLOWED if not names[name]] == []
    places = {found.place: found for found in CLASSES}
    small = [
        place
        for place in LARGE
        if place not in places or (places[place].lines <= MOST_LINES and places[place].methods <= MOST_METHODS)
    ]
    assert small == [], "these are small enough now, or are gone: take them off the list"
