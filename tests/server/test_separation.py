"""A device's separation is models: sums that were abandoned, and versions that were put back, are none."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sumus.pacing import Pacing
from sumus.protocol.round import AssignWork, CheckIn, ComeLater, State
from sumus.protocol.rows import changed
from sumus.rounds.circumstances import Circumstances
from sumus.rounds.coordinator import Coordinator
from sumus.storage.memory import MemoryStore
from sumus.storage.sql import SqlStore
from sumus.storage.store import Store

Asks = Callable[[str], str]


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MemoryStore() if request.param == "memory" else SqlStore.open(f"sqlite:///{tmp_path}/run.db", "keyboard")


def served(store: Store, pacing: Pacing) -> tuple[Coordinator, Asks]:
    """A coordinator, and a way in which devices take part: "counted", or the reason why there is no work."""
    server, serials = Coordinator(lambda: Circumstances(pacing, population=100), store), dict[str, int]()

    def asks(device: str) -> str:
        if server.current.state is State.PLANNED:
            server.tick(0.0)
        serials[device] = serials.get(device, 0) + 1
        word = f"{device}{serials[device]}"
        (answer,) = server.check_in(device, CheckIn(word, serials[device]), 0.0)
        if isinstance(answer, ComeLater):
            return answer.reason
        assert isinstance(answer, AssignWork)
        server.report(word, 0.0)
        server.commit(0.0)
        return "counted"

    return server, asks


def test_abandoned_rounds_are_no_models_between(store: Store) -> None:
    server, asks = served(store, Pacing(cohort=1, separation=5))
    assert asks("a") == "counted"
    server.publish(0, 0.0)
    for number in range(1, 5):  # four rounds, and no model
        server.cancel(number, 0.0)
    for number, other in enumerate("bcde", 5):
        assert asks("a") == "separation"
        assert asks(other) == "counted"
        server.publish(number, 0.0)
    assert asks("a") == "counted"
    assert server.current.number == 9


@pytest.mark.parametrize("separation", [1, 2, 3])
def test_a_device_whose_own_sum_was_abandoned_waits_for_as_many_models(store: Store, separation: int) -> None:
    """With a separation of 1 for none: it may be in the next round."""
    server, asks = served(store, Pacing(cohort=2, separation=separation))
    assert asks("a") == "counted"
    server.cancel(0, 0.0)
    with server.leading() as rows:
        rows.forget_rounds_before(1)
    for number in range(1, separation):
        assert asks("a") == "separation"
        assert [asks(f"{other}{number}") for other in "bc"] == ["counted"] * 2
        server.publish(number, 0.0)
    assert asks("a") == "counted"


def test_a_model_that_was_put_back_is_none_of_a_sum(store: Store) -> None:
    server, asks = served(store, Pacing(cohort=1, separation=2))
    assert asks("a") == "counted"
    server.publish(0, 0.0)
    with server.leading() as rows:
        rows.put_run(changed(rows.run(), version=rows.run().version + 3))
    assert asks("a") == "separation"


def test_sums_that_are_still_being_made_are_no_models_yet(store: Store) -> None:
    """While a buffer is made into a model the next one is open. Sums before the device's own do not count."""
    server, asks = served(store, Pacing(cohort=1, concurrency=4, separation=2))
    assert [asks(device) for device in "abc"] == ["counted"] * 3  # in sums 0, 1 and 2
    assert [asks(device) for device in "abc"] == ["separation"] * 3
    server.publish(0, 0.0)
    server.cancel(1, 0.0)
    assert [asks(device) for device in "abc"] == ["separation"] * 3
    server.publish(2, 0.0)
    assert [asks(device) for device in "abc"] == ["counted", "counted", "separation"]


def test_it_is_told_to_come_back_when_the_models_may_be_there(store: Store) -> None:
    windows = dict[int, float]()
    server, asks = served(store, Pacing(cohort=1, separation=4, deadline=1000.0))
    assert asks("a") == "counted"
    server.publish(0, 0.0)
    for number, other in enumerate("bcd", 1):
        server.tick(0.0)
        (later,) = server.check_in("a", CheckIn(f"again{number}", 1 + number), 0.0)
        assert isinstance(later, ComeLater)
        windows[number] = later.window[1]
        assert asks(other) == "counted"
        server.publish(number, 0.0)
    assert windows[1] > windows[2] > windows[3]
