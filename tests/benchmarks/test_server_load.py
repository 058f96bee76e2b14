"""The load on a server, as small as it can be: everything is answered as it should be, and the table is whole."""

from benchmarks.server import HEADER, PARTS, Scale, benching


def test_every_part_measures_something_and_nothing_is_refused() -> None:
    scale = Scale(seconds=0.1, turns=1, soak=30, slow=3, rounds=1)
    with benching(scale) as bench:
        rows = [row for part in PARTS for row in part(bench)]
    assert bench.notes == []
    assert len(rows) == 17
    assert all(len(row) == len(HEADER) and row[0] and "**" in row[2] for row in rows)
    assert len({row[0] for row in rows}) == len(rows)
