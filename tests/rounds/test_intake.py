"""One way into a sum: what the first hop has checked is added as it is, and nothing else can be added."""

import ast
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sumus
from sumus.aggregate import RunningSum, Update
from sumus.errors import ParticipantError
from sumus.first_hop import FirstHop
from sumus.fixed_point import FixedPoint
from sumus.pacing import Pacing
from sumus.protocol.round import AcceptReport, CheckIn, StageReport
from sumus.rounds.circumstances import Circumstances
from sumus.rounds.coordinator import Coordinator
from sumus.rounds.intake import ReportIntake
from sumus.rounds.sealed_sums import SealedSums, merged
from sumus.rounds.stages import Checked, ClearReport, EdgeSum, SpooledReport
from sumus.storage.blobs import MemoryBlobs
from sumus.storage.keyring import KeyRing
from sumus.wire.reports import encode_report, encode_sum
from sumus.wire.tensors import encode_aggregate
from tests.server.committing import HOP, MANY, recomputed, update

ROOT = Path(sumus.__file__).parent
EDGE = "e" * 64


def id_of(number: int) -> str:
    """The id of a device, as it stands in sessions of edges."""
    return f"{number:064x}"


class Insides:
    """The intake of a run, with rows and blobs in memory."""

    def __init__(self, folder: Path, spools: bool = False) -> None:
        pacing = Pacing(MANY, concurrency=MANY)
        self.coordinator = Coordinator(lambda: Circumstances(pacing, population=MANY))
        self.sums = SealedSums(self.coordinator, KeyRing(folder / "keys"), MemoryBlobs(), spools)
        self.intake = ReportIntake(self.coordinator, self.sums, HOP, trains=True, spools=spools)
        self.coordinator.tick(0.0)

    def works(self, number: int, parent: str = "") -> str:
        """A device is given work, itself or through an edge; its session."""
        session = f"{id_of(number)}/1"
        self.coordinator.check_in(id_of(number), CheckIn(session, 1, parent=parent), 0.0)
        return session

    def report(self, number: int) -> ClearReport:
        """What a device reports, as it was read."""
        session = self.works(number)
        return self.intake.read_report(encode_report(update(str(number))), id_of(number), session)

    def edge_sum(self, numbers: list[int]) -> EdgeSum:
        """What an edge has added of these devices' reports, as it was read."""
        sessions = [self.works(number, EDGE) for number in numbers]
        body = encode_sum(sessions, recomputed([str(number) for number in numbers]), HOP)
        return self.intake.read_sum(body, EDGE, MANY, None)


def staged(answers: Sequence[tuple[object, ...]]) -> list[bool]:
    return [any(isinstance(action, StageReport) for action in actions) for actions in answers]


# ── the stages ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_the_first_hop_makes_what_a_sum_accepts() -> None:
    makers = list[str]()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("CheckedUpdate", "CheckedSum")):
                makers.append(path.name)
    assert makers == ["first_hop.py"] * 2


def test_nothing_is_checked_again_when_it_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = Insides(tmp_path)
    reports: list[Checked] = [inside.report(1), inside.edge_sum([2, 3])]

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("it was checked before")

    for name in ("check", "check_sum", "_check_form", "_check_lengths", "_check_metrics", "_check_sum_length"):
        monkeypatch.setattr(FirstHop, name, fails)
    for name in ("check", "_reach"):
        monkeypatch.setattr(FixedPoint, name, fails)
    inside.intake.stage_all(reports, 0.0)
    inside.intake.commit(0.0)
    monkeypatch.undo()
    assert encode_aggregate(inside.sums.total(0)) == encode_aggregate(recomputed(["1", "2", "3"]))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_way_of_a_report_changes_no_bit_of_the_sum(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Devices report here or through an edge, in any order, and any number of them are one commit."""
    inside = Insides(tmp_path_factory.mktemp("intake"))
    devices = data.draw(st.permutations(range(1, 8)))
    reports, left = list[Checked](), list(devices)
    while left:
        together = data.draw(st.integers(1, len(left)))
        mine, left = left[:together], left[together:]
        if data.draw(st.booleans()):
            reports.append(inside.edge_sum(mine))
        else:
            reports += [inside.report(number) for number in mine]
    while reports:
        together = data.draw(st.integers(1, len(reports)))
        inside.intake.stage_all(reports[:together], 0.0)
        reports = reports[together:]
        inside.intake.commit(0.0)
    assert encode_aggregate(inside.sums.total(0)) == encode_aggregate(recomputed([str(each) for each in range(1, 8)]))


def test_reports_that_are_kept_apart_are_all_there_at_the_end(tmp_path: Path) -> None:
    inside = Insides(tmp_path, spools=True)
    reports = [inside.report(number) for number in (1, 2, 3)]
    assert all(isinstance(report, SpooledReport) for report in reports)
    inside.intake.stage_all(reports, 0.0)
    inside.intake.commit(0.0)
    apart = inside.sums.shards(0)
    assert [int(one.count) for one in apart] == [1, 1, 1]
    assert encode_aggregate(merged(apart)) == encode_aggregate(recomputed(["1", "2", "3"]))


def test_of_two_reports_of_one_session_the_first_counts(tmp_path: Path) -> None:
    inside = Insides(tmp_path)
    first = inside.report(1)
    other = replace(first, content=HOP.check(update("2")))
    assert staged(inside.intake.stage_all([first, other], 0.0)) == [True, True]
    told = inside.intake.commit(0.0)
    assert [action.session for action in told if isinstance(action, AcceptReport)] == [first.session]
    assert encode_aggregate(inside.sums.total(0)) == encode_aggregate(recomputed(["1"]))


def test_a_report_of_a_session_that_nobody_knows_is_not_kept(tmp_path: Path) -> None:
    inside = Insides(tmp_path)
    stranger = ClearReport("nobody/1", HOP.check(update("1")))
    assert inside.intake.stage_all([stranger], 0.0) == [()]
    assert inside.intake.commit(0.0) == ()


def test_a_new_process_has_no_staged_report(tmp_path: Path) -> None:
    inside = Insides(tmp_path)
    inside.intake.stage_all([inside.report(1)], 0.0)
    inside.coordinator.recover(1.0)
    inside.intake.restart()
    assert inside.intake.commit(1.0) == ()


# ── what is refused before it is a value ─────────────────────────────────────────────────────────────────────────────


def changed(value: float = 0.0, **changes: Any) -> Update:
    """A report that is wrong in one way."""
    report = replace(update("1"), **changes)
    report.parts["params"]["w"][3] += value
    return report


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (changed(np.nan), "is not finite"),
        (changed(np.inf), "is not finite"),
        (changed(1e6), "beyond the plan's bound"),
        (changed(examples=0), "trained on 0 examples"),
        (changed(metrics={"loss": (0.0, 0)}), "must contain its loss"),
        (changed(metrics={"loss": (np.nan, 3)}), "finite"),
        (changed(metrics={"other": (1.0, 3)}), "does not measure"),
        (Update("1", {"params": {"w": np.zeros(3, np.float32)}}, 1, {"loss": (1.0, 1)}), "shape"),
    ],
)
def test_a_report_that_cannot_be_counted_becomes_no_value(tmp_path: Path, bad: Update, said: str) -> None:
    inside = Insides(tmp_path)
    with pytest.raises(ParticipantError, match=said):
        inside.intake.read_report(encode_report(bad), "mallory", "mallory/1")


def test_a_sum_that_cannot_be_counted_becomes_no_value(tmp_path: Path) -> None:
    inside = Insides(tmp_path)
    sessions = [f"{id_of(number)}/1" for number in (1, 2)]
    total = RunningSum()
    for number in (1, 2):
        HOP.count_in(update(str(number)), total)
    good = total.total
    silent = replace(good, metrics={"loss": np.zeros(2, np.int64)})
    for bad, said in (
        (replace(good, count=np.array(3)), "its sum counts 3 reports, but it names 2"),
        (replace(good, weights={"params": np.array(1)}), "weighs 1"),
        (replace(good, weights={"params": np.array(10**6)}), "weighs more"),
        (silent, "its loss counts fewer predictions than"),
    ):
        with pytest.raises(ParticipantError, match=said):
            inside.intake.read_sum(encode_sum(sessions, bad, HOP), EDGE, MANY, None)
    with pytest.raises(ParticipantError, match="from 1 to 1 sessions"):
        inside.intake.read_sum(encode_sum(sessions, good, HOP), EDGE, 1, None)
