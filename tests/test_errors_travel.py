"""Errors cross process boundaries whole: a pool of workers must not turn a refusal into a crash of pickle."""

import contextlib
import copy
import pickle
from collections.abc import Iterator

import pytest

from sumus import errors
from sumus.errors import (
    BeyondBoundError,
    DataError,
    DivergedError,
    EmptyError,
    ExperimentError,
    Interrupted,
    ParticipantError,
    PlanError,
    SumusError,
    TaskError,
    UsageError,
)

EXAMPLES: list[SumusError | Interrupted] = [
    SumusError("one"),
    UsageError("one"),
    TaskError("one"),
    DataError("alice", "it has no examples"),
    DataError(("a", 7), "it has no examples"),
    PlanError("positive", "lower it"),
    ExperimentError("one"),
    ParticipantError("alice", "too large"),
    ParticipantError(None, "too large"),
    BeyondBoundError("alice", "too large"),
    DivergedError(7, "params", "fc.weight"),
    EmptyError("alice", "its update is of 0 examples"),
    Interrupted("stopped", history=[1, 2], checkpoint={"a": 1}),
    Interrupted("stopped"),
]


def kinds(kind: type[SumusError] = SumusError) -> Iterator[type[SumusError]]:
    yield kind
    for below in kind.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from kinds(below)


def test_every_kind_is_tried() -> None:
    assert {type(error) for error in EXAMPLES} == {*kinds(), Interrupted}


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_pickle(error: SumusError | Interrupted, protocol: int) -> None:
    for again in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert again.args == error.args
        assert vars(again) == vars(error)


def test_a_users_own_kind_survives_too() -> None:
    again = pickle.loads(pickle.dumps(Local("bob", 3)))
    assert (type(again), str(again), again.client, again.room) == (Local, "client 'bob': no room for 3", "bob", 3)


class Local(ParticipantError):
    def __init__(self, client: object, room: int) -> None:
        super().__init__(client, f"no room for {room}")
        self.room = room


def test_a_participant_that_is_not_known_is_not_named() -> None:
    assert str(ParticipantError(None, "too large")) == "too large"
    assert str(ParticipantError("alice", "too large")) == "client 'alice': too large"
    assert ParticipantError(None, "too large").client is None


def test_divergence_names_client_part_leaf_and_remedy() -> None:
    error = DivergedError("alice", "control", "fc.weight")
    assert error.client == "alice"
    assert str(error).startswith("client 'alice': the update is not finite at `control[fc.weight]`")
    assert "lower the learning rate" in str(error)


def test_a_loop_that_goes_on_after_errors_ends_at_ctrl_c() -> None:
    """A sweep's `except Exception` must not swallow that the user stopped it."""
    assert not issubclass(Interrupted, Exception)

    def sweep() -> None:
        for _ in range(3):
            with contextlib.suppress(Exception):
                raise Interrupted("stopped after round 2", history=[1, 2])

    with pytest.raises(KeyboardInterrupt, match="stopped after round 2"):
        sweep()
