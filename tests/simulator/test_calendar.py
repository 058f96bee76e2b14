"""The calendar gives everyone who was put into it, in the order of their moments, whatever is put in meanwhile."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sumus.simulator.virtual_time.calendar import Calendar


@given(st.lists(st.lists(st.floats(0, 400), max_size=8), max_size=6), st.floats(1, 100))
def test_everyone_wakes_once_and_in_order(groups: list[list[float]], step: float) -> None:
    calendar, number, put, woken = Calendar(), 0, list[float](), list[tuple[float, int]]()
    for group in groups:
        begin = woken[-1][0] if woken else 0.0  # nobody is put into the past
        moments = begin + np.array(group)
        if len(group) == 1:
            calendar.put_one(number, float(moments[0]))
        else:
            calendar.put(np.arange(number, number + len(group)), moments)
        put += moments.tolist()
        number += len(group)
        if calendar.next() < math.inf:
            who, times = calendar.take(calendar.next() + step)
            woken += zip(times.tolist(), who.tolist(), strict=True)
    while calendar.next() < math.inf:
        who, times = calendar.take(calendar.next() + step)
        woken += zip(times.tolist(), who.tolist(), strict=True)
    assert sorted(who for _, who in woken) == list(range(number))
    assert [time for time, _ in woken] == sorted(put)
