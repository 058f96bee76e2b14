"""Metrics and losses are what scikit-learn says of them, or are refused. 10,000 draws: `python -m benchmarks.measures`."""

from collections import Counter

from benchmarks.measures import compared


def test_five_hundred_draws_are_equal_or_refused() -> None:
    found = Counter(map(compared, range(500)))
    assert found["equal"] > 200
    assert min(found["refused"], found["nan"]) > 30
