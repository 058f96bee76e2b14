"""The week of a million phones, here for a few hours of two thousand."""

import sys

import pytest

from benchmarks import week


def test_a_fleet_lives_through_its_hours_and_models_are_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["week", "--devices", "2000", "--days", "0.25"])
    week.main()
    table = capsys.readouterr().out
    assert "2,000 devices" in table
    assert "| devices that took part | 0 " not in table
