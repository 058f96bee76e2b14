"""Where a plan is legal, and devices that were told nothing else would not take part: it is said before, with what to do."""

from dataclasses import replace
from typing import Any

import pytest

import sumus
from sumus.pacing import Pacing
from sumus.protocol.consent import hurdles, missing
from sumus.protocol.session import Floor
from tests.server.devices import tiny

PLAN = replace(tiny(cohort=20, least=10, every=3600.0).plan)


def said(**changes: Any) -> list[str]:
    return hurdles(replace(PLAN, **changes))


def test_a_plan_within_what_devices_consent_to_has_no_hurdle() -> None:
    assert said() == []
    assert hurdles(PLAN, steps=10_000, memory=2**32) == []
    assert missing(PLAN, 20) == missing(PLAN, 1000) == []


def test_few_contributors_are_refused_by_devices_that_were_told_nothing() -> None:
    (only,) = said(min_contributors=3)
    assert only.startswith(
        "devices consent to sums of at least 10 contributors, but min_contributors is 3, so they refuse"
    )
    assert "--floor contributors=3" in only
    assert hurdles(replace(PLAN, min_contributors=3), floor=Floor(contributors=3)) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"steps": 10_001}, "a round takes 10,001 local steps, but devices consent to 10,000 local steps, so "),
        ({"memory": 5_000_000_000}, "a round takes 5.0 GB of memory, but devices consent to 4.3 GB, so "),
        ({"floor": Floor(bytes=100)}, " kB, but devices consent to 100 bytes, so "),
    ],
)
def test_what_a_round_takes_is_held_against_what_devices_give(given: Any, words: str) -> None:
    (only,) = hurdles(PLAN, **given)
    assert words in only
    assert "they refuse it: start each device with --floor" in only


@pytest.mark.parametrize(
    ("pacing", "words"),
    [
        (
            Pacing(20),
            "a device that is in every round reaches this limit at once; set Pacing(every=3600) to leave time",
        ),
        (Pacing(20, every=60.0), "a round may begin every 60 s, but a device consents to 24 rounds a day: "),
        (Pacing(20, every=60.0), "within 24 min"),
    ],
)
def test_a_day_s_rounds_that_are_gone_at_once_are_foretold(pacing: Pacing, words: str) -> None:
    (only,) = said(pacing=pacing)
    assert words in only


def test_conditions_that_machines_cannot_tell_are_named() -> None:
    asked = sumus.Conditions(charging=True, idle=True)
    (only,) = said(pacing=Pacing(20, every=3600.0, requires=asked))
    assert only.startswith("devices take part only if charging, idle are met")
    assert "--always" in only


@pytest.mark.parametrize(
    ("clients", "words"),
    [
        (1, "there is 1 client here, but a sum needs 10 contributors: no round begins before 10 devices are enrolled"),
        (9, "there are 9 clients here, but a sum needs 10"),
        (
            12,
            "there are 12 clients here, but a round waits for 20: without more devices, each round lasts until its deadline",
        ),
    ],
)
def test_too_few_devices_are_counted_before(clients: int, words: str) -> None:
    (only,) = missing(PLAN, clients)
    assert only.startswith(words)


def test_a_buffer_waits_for_no_cohort() -> None:
    assert missing(replace(PLAN, pacing=Pacing(20, concurrency=40)), 25) == []
