"""The benchmark of edges measures what it says."""

from pathlib import Path

from benchmarks import edges


def test_behind_edges_the_server_receives_one_sum_of_each(tmp_path: Path) -> None:
    direct, behind = tmp_path / "direct", tmp_path / "behind"
    for folder in (direct, behind):
        folder.mkdir()
    directly, through = edges.traffic(direct, 6, 0), edges.traffic(behind, 6, 2)
    assert (directly[1], through[1]) == ("6", "2")
    assert (round(float(directly[3])), round(float(through[3]))) == (1, 4), "bytes a parameter"
