"""Servers that are killed, at random and at failpoints, and what lies on their disks: samples of `make faults`, with controls."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.kills.__main__ import at_random, campaign, everywhere, on_disk, stepwise
from benchmarks.kills.served import COHORT, Life

KINDS = pytest.mark.parametrize("kind", ["synchronous", "buffered"])


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    with Life(tmp_path_factory.mktemp("life") / "log") as found:
        yield found


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str | None:
    return None if request.param == "sqlite" else request.getfixturevalue("postgres")


@KINDS
def test_kills_at_random_break_no_promise(life: Life, url: str | None, kind: str) -> None:
    with campaign(life, url, kind) as going:
        found = at_random(going, 3, random.Random(1))
        assert going.deaths == 3
    assert found.good, f"{found} {found.wrong}"
    assert found.acknowledged > 3


@KINDS
def test_failpoints_break_no_promise(life: Life, url: str | None, kind: str) -> None:
    with campaign(life, url, kind, devices=COHORT) as going:
        found, moments = everywhere(stepwise(going), 2, random.Random(2))
    assert found.good, f"{found} {found.wrong}"
    assert moments > 200


def test_an_acknowledgement_before_the_commit_is_found(life: Life) -> None:
    with campaign(life, None, "synchronous", "acknowledges-early") as going:
        assert at_random(going, 6, random.Random(3)).lost > 0


def test_a_report_that_is_counted_again_is_found(life: Life) -> None:
    with campaign(life, None, "buffered", "counts-again") as going:
        assert at_random(going, 2, random.Random(3)).twice > 0


def test_a_seed_that_is_drawn_anew_is_found(life: Life) -> None:
    with campaign(life, None, "synchronous", "forgets-seeds") as going:
        found = at_random(going, 5, random.Random(3))
    assert found.equal < found.models


def test_nothing_on_the_disk_tells_what_anyone_sent(life: Life, url: str | None) -> None:
    with campaign(life, url, "plain", devices=COHORT) as going:
        more = [] if url is None else [Path(url.rpartition("=")[2])]
        assert on_disk(stepwise(going), [life.log.parent, *more]) == []
        assert not going.wrong


def test_sums_that_are_not_sealed_are_found_on_the_disk(life: Life) -> None:
    with campaign(life, None, "plain", "seals-nothing", COHORT) as going:
        assert on_disk(stepwise(going), []) != []
