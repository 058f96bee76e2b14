"""Every parser that reads from outside, on its corpus and on the same mutations each time: what must hold for all bytes holds.

A damaged input brings only the errors that the parser documents. What is read can be written, and is read again as it was. Memory
stays within a multiple of the input. The inputs that once failed are files in `corpora/`, and `python -m benchmarks.fuzz` looks
for more.
"""

import importlib
import re
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.fuzz import campaign, mutations
from benchmarks.fuzz.reached import reached_by, smallest
from benchmarks.fuzz.target import CORPORA, FREE_MEMORY, Target
from benchmarks.fuzz.targets import NAMES, load, messages
from sumus.wire.messages import read

MUTATIONS = 1000
MOST_KEPT = 4096
ENOUGH = 0.9
"""The share of a parser's branches that its corpus reaches at least."""


@pytest.fixture(params=NAMES)
def target(request: pytest.FixtureRequest) -> Target:
    return load(request.param)


def test_every_input_of_a_corpus_is_read_or_refused_within_its_memory(target: Target) -> None:
    for name, data in target.corpus().items():
        target.check(data)  # what is imported or made once counts for no input
        tracemalloc.start()
        try:
            target.check(data)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak <= FREE_MEMORY + target.memory * len(data), f"{name}: {len(data)} bytes took {peak} bytes of memory"


def test_a_corpus_reaches_nearly_all_branches_of_its_parser(target: Target) -> None:
    found = reached_by(target, target.corpus().values())
    assert found.share >= ENOUGH, f"{found.share:.1%}; not reached: {found.missing}"


def test_mutations_of_a_corpus_are_read_or_refused(target: Target) -> None:
    for data in mutations.mutated(target, MUTATIONS):
        try:
            target.check(data)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}; for {data!r}") from error


def test_kept_inputs_are_small_and_of_targets_that_there_are() -> None:
    folders = sorted(CORPORA.iterdir())
    assert {folder.name for folder in folders} <= set(NAMES)
    for path in (path for folder in folders for path in folder.iterdir()):
        assert path.stat().st_size <= MOST_KEPT, path


def test_a_seed_of_every_message_is_read() -> None:
    seeds = messages.seeds()
    for form in messages.FORMS:
        assert read(form, seeds[f"{form.__name__}-0"][1:]), form


def test_the_page_lists_every_target() -> None:
    page = Path(__file__).parents[2] / "docs" / "fuzzing.md"
    assert tuple(re.findall(r"^\| `(\w+)` \|", page.read_text(encoding="utf-8"), re.MULTILINE)) == NAMES


def test_a_campaign_tries_inputs_and_says_how_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("atheris", reason="it has wheels for Linux on x86-64")
    monkeypatch.setattr(campaign, "FOLDER", tmp_path)
    outcome = campaign.run("csv", 1)
    assert outcome.executions > 10
    assert (outcome.name, outcome.finding) == ("csv", None)
    assert outcome.found == len(list((tmp_path / "csv" / "found").iterdir()))


# ── the measure itself ───────────────────────────────────────────────────────────────────────────────────────────────


SOURCE = """
def read(data):
    if data[:1] == b"a":
        if data[1:2] == b"b":
            return 2
        return 1
    return 0

def other(data):
    if data:
        return 1
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    """A target of a parser with two decisions."""
    (tmp_path / "small_parser.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "small_parser", raising=False)
    parser = importlib.import_module("small_parser")
    return Target("small", parser.read, dict, {"small_parser": ("read",)}, (b"a",))


def test_branches_are_counted_of_the_named_functions_alone(small: Target) -> None:
    assert (reached_by(small, [b"x"]).share, reached_by(small, [b"x", b"ac"]).share) == (0.25, 0.75)
    assert reached_by(small, [b"x", b"ac", b"ab"]).missing == []


def test_the_shortest_inputs_that_reach_something_new_are_chosen(small: Target) -> None:
    inputs = {"long": b"abab", "short": b"ab", "other": b"acc", "known": b"y"}
    assert smallest(small, inputs, [b"x"]) == ["short", "other"]


def test_mutations_are_the_same_each_time(small: Target) -> None:
    target = replace(small, seeds=lambda: {"seed": b"abc"})
    first = list(mutations.mutated(target, 50))
    assert first == list(mutations.mutated(target, 50))
    assert first != list(mutations.mutated(target, 50, seed=1))
    assert len(set(first)) > 25


def test_a_parser_that_raises_what_it_does_not_document_is_found(small: Target) -> None:
    """The control: a target whose parser has a defect does not pass."""

    def check(data: bytes) -> None:
        if b"a" not in data:
            raise RecursionError

    target = replace(small, check=check, seeds=lambda: {"seed": b"abc"})
    with pytest.raises(AssertionError, match="RecursionError"):
        test_mutations_of_a_corpus_are_read_or_refused(target)
