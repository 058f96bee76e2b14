"""A siege as small as it can be: every flood is played, honest devices are answered, and the table is whole."""

from benchmarks.siege import FLOODS, HEADER, Scale, besiege


def test_every_flood_is_played_and_refuses_no_honest_device() -> None:
    rows = besiege(Scale(seconds=0.3, turns=1, part=0.02, back_s=0.0), list(FLOODS))
    assert [row[0] for row in rows] == list(FLOODS)
    assert all(len(row) == len(HEADER) and all(row) for row in rows)
    assert [row[5] for row in rows] == ["0"] * len(FLOODS)
