"""Bounds that hold whatever arrives: of bytes in memory, and of what one neighbourhood has of anything."""

import itertools
import random
import threading
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sumus.http.room import IDLE_S, PORTIONS, SHORT, Room, Shares, _rounded, near, neighbourhood
from sumus.wire.messages import Refused

# ── shares ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("192.0.2.77", "192.0.2.0/24"),
        ("::ffff:192.0.2.77", "192.0.2.0/24"),
        ("2001:db8:1:2:3::4", "2001:db8:1::/48"),
        ("fe80::1%eth0", "fe80::/48"),
        ("", "elsewhere"),
        ("testclient", "elsewhere"),
        ("192.0.2.77\n", "elsewhere"),
    ],
)
def test_neighbourhoods(address: str, name: str) -> None:
    assert neighbourhood(address) == name


def test_shares_are_counted_by_the_network_of_one_household() -> None:
    assert near("192.0.2.77") == "192.0.2.0/24"
    assert near("2001:db8:1:2:3::4") == "2001:db8:1:2::/64"


def test_one_neighbourhood_may_have_all_but_what_is_kept_for_others() -> None:
    shares = Shares(64)
    assert sum(shares.take("crowd", 1) for _ in range(100)) == SHORT * 64
    assert [shares.take("crowd", 1), shares.take("crowd", 0)] == [False, True]
    given_others = [sum(shares.take(f"house {number}", 1) for _ in range(100)) for number in range(5)]
    assert given_others == [64 / PORTIONS] * 4 + [0], "each has its portion, until there is nothing left"
    shares.give("crowd", 40)
    assert shares.take("crowd", 1)


def test_the_first_piece_of_a_neighbourhood_may_be_as_large_as_there_is_room() -> None:
    shares = Shares(64)
    assert shares.take("far", 64)
    assert not shares.take("near", 1)
    shares.give("far", 64)
    assert (shares.taken, shares.of("far")) == (0, 0)


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.integers(0, 30), st.booleans()),
        max_size=80,
    )
)
def test_shares_never_exceed_the_whole_and_add_up(steps: list[tuple[str, int, bool]]) -> None:
    shares, has = Shares(100), Counter[str]()
    for who, amount, back in steps:
        if back and has[who] >= amount:
            shares.give(who, amount)
            has[who] -= amount
        elif shares.take(who, amount):
            has[who] += amount
        assert shares.taken == sum(has.values()) <= 100
        assert {each: shares.of(each) for each in "abcdef"} == {each: has[each] for each in "abcdef"}


# ── bytes ────────────────────────────────────────────────────────────────────────────────────────────────────────────

MIB = 2**20
SOMEBODY = map(str, itertools.count())
"""Another neighbourhood each time: what one may have is tested below."""


def test_a_body_is_as_long_as_asked_and_can_be_written() -> None:
    room = Room(MIB)
    for size in (0, 1, 4095, 4097, 100_000):
        body = room.take(size, next(SOMEBODY))
        assert (len(body), body.readonly, body.format, body.contiguous) == (size, False, "B", True)
        body[:] = bytes([7]) * size


def test_beyond_the_room_it_is_busy_until_a_body_is_dropped() -> None:
    room = Room(MIB, retry_after_s=(2.0, 3.0))
    first, second = room.take(MIB // 2, next(SOMEBODY)), room.take(MIB // 2, next(SOMEBODY))
    with pytest.raises(Refused) as error:
        room.take(1, next(SOMEBODY))
    assert (error.value.problem.code, error.value.problem.retry_after_s) == ("busy", (2.0, 3.0))
    del first
    assert len(room.take(MIB // 2, next(SOMEBODY))) == MIB // 2
    del second
    assert room.lent == 0


def test_a_body_that_can_never_fit_is_too_large() -> None:
    with pytest.raises(Refused, match="too_large"):
        Room(MIB).take(MIB + 1, next(SOMEBODY))


def test_it_is_out_until_the_last_view_is_gone() -> None:
    """Else the next body would be written under an array that is still read."""
    room = Room(MIB)
    body = room.take(MIB, next(SOMEBODY))
    array, part = np.frombuffer(body[8:1032], np.float32), body[100:200]
    body.release()
    with pytest.raises(Refused, match="busy"):
        room.take(1, next(SOMEBODY))
    part.release()
    view = array[:4].reshape(2, 2)
    del array
    with pytest.raises(Refused, match="busy"):
        room.take(1, next(SOMEBODY))
    del view
    assert room.lent == 0
    assert room.take(1, next(SOMEBODY))


def test_a_block_gives_back_even_when_it_fails() -> None:
    room = Room(MIB)
    with suppress(ZeroDivisionError), room.take(MIB, next(SOMEBODY)):
        assert room.lent == MIB
        raise ZeroDivisionError
    assert room.lent == 0


def address_of(body: memoryview) -> int:
    return np.frombuffer(body, np.uint8).__array_interface__["data"][0]


def test_buffers_are_used_again() -> None:
    room = Room(MIB)
    addresses = set[int]()
    for size in range(100_000, 104_000, 40):
        with room.take(size, next(SOMEBODY)) as body:
            addresses.add(address_of(body))
    assert len(addresses) == 1


def test_idle_buffers_make_room_for_other_lengths() -> None:
    room = Room(MIB)
    for size in (4096, 8192, 100_000, 500_000, MIB, 1, 700_000, 4096):
        with room.take(size, next(SOMEBODY)):
            pass
    many = [room.take(4096, next(SOMEBODY)) for _ in range(256)]
    with pytest.raises(Refused, match="busy"):
        room.take(1, next(SOMEBODY))
    many.clear()
    assert len(room.take(MIB, next(SOMEBODY))) == MIB


@given(st.lists(st.integers(0, 70_000), min_size=1, max_size=60), st.randoms(use_true_random=False))
def test_what_is_out_and_idle_never_exceeds_the_room(sizes: list[int], dice: random.Random) -> None:
    room, out = Room(2**18), list[memoryview]()
    for size in sizes:
        try:
            out.append(room.take(size, next(SOMEBODY)))
        except Refused:
            assert sum(_rounded(len(body)) for body in out) + _rounded(size) > 2**18
        while out and dice.random() < 0.4:
            out.pop(dice.randrange(len(out)))
        assert room.lent == sum(_rounded(len(body)) for body in out)
        assert room.held == room.lent + sum(length * len(bodies) for length, bodies in room._idle.items()) <= 2**18


def test_many_threads_share_it_and_no_body_is_anothers() -> None:
    room, start, defects, refusals = Room(MIB), threading.Barrier(8), list[str](), Counter[int]()

    def send(number: int) -> None:
        dice, mark = random.Random(number), bytes([number + 1])
        start.wait()
        for _ in range(400):
            size = dice.choice([100, 5_000, 70_000, 200_000, 300_000])
            try:
                body = room.take(size, next(SOMEBODY))
            except Refused:
                refusals[number] += 1
                continue
            body[:] = mark * size
            array = np.frombuffer(body, np.uint8)
            del body
            if not (array == number + 1).all():
                defects.append(f"{number} read another's bytes")
            if room.lent > room.bytes:
                defects.append("more is out than there is room")

    threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert defects == []
    assert room.lent == 0
    assert len(room.take(MIB, next(SOMEBODY))) == MIB


def test_a_neighbourhood_has_its_share_of_the_room() -> None:
    room = Room(64 * 4096)
    crowd = [room.take(4096, "crowd") for _ in range(int(SHORT * 64))]
    with pytest.raises(Refused, match="busy"):
        room.take(4096, "crowd")
    assert room.take(4096, "house")
    crowd.clear()
    assert room.take(4096, "crowd")


def test_what_lies_idle_is_given_back_to_the_system() -> None:
    now = [0.0]
    room = Room(MIB, clock=lambda: now[0])
    body = room.take(MIB // 2, "somebody")
    assert room.tidy(), "it is out, so it will lie idle one day"
    del body
    assert room.lent == 0
    now[0] += IDLE_S / 2
    assert (room.tidy(), room.held) == (True, MIB // 2)
    now[0] += IDLE_S
    assert (room.tidy(), room.held) == (False, 0)
