"""The command that compares sumus with other frameworks runs, in short and without installing any of them."""

import sys

import pytest

from benchmarks.peers import __main__ as peers


def test_a_short_comparison_prints_a_row_for_each_variant(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["peers", "--workloads", "w2", "--peers", "sumus", "--sweeps", "1", "--warm-up", "1", "--cores", "1"]
    monkeypatch.setattr(sys, "argv", command)
    peers.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| w2 |")]
    assert [row[1] for row in rows] == ["naive loop", "sumus"]
    assert all(float(row[3]) > 0 for row in rows)
