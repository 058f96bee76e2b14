"""Virtual time against what can be worked out by hand: durations, who is counted, staleness, and what the server is asked."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import sumus
from sumus.fleet import DAY, DeviceArrays, Fleet, FleetNetwork, FleetTiming
from sumus.pacing import Pacing
from sumus.rng import generator
from sumus.simulator.virtual_time.account import Played
from sumus.simulator.virtual_time.fleet_model import RoundDemand
from sumus.simulator.virtual_time.server import ServerCost
from sumus.simulator.virtual_time.timeline import Timeline
from sumus.simulator.virtual_time.traces import devices_of, read

MINUTES = Fleet(seconds=60, spread=10)


def timeline(pacing: Pacing, fleet: Fleet, count: int, seed: int = 0, **more: Any) -> Timeline:
    drawn = fleet.devices(count, generator(seed, "devices"))
    return Timeline(pacing, fleet, more.pop("devices", drawn), more.pop("work", RoundDemand()), seed, **more)


def played(pacing: Pacing, fleet: Fleet, count: int, rounds: int, **more: Any) -> tuple[Timeline, list[Played]]:
    run = timeline(pacing, fleet, count, **more)
    return run, [run.ended(number) for number in range(rounds)]


def seconds_of(count: int) -> np.ndarray:
    """How long a round's work takes each device of `MINUTES`."""
    return MINUTES.devices(count, generator(0, "devices")).seconds


def positions(one: Played) -> list[int]:
    return [each.position for each in one.counted]


# ── synchronous ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_round_takes_as_long_as_its_slowest_device() -> None:
    _, rounds = played(Pacing(5), MINUTES, 20, 8)
    now = 0.0
    for one in rounds:
        now += max(seconds_of(20)[positions(one)])
        assert one.ended == pytest.approx(now)
        assert len(one.counted) == 5


def test_the_first_ones_are_counted_where_more_are_chosen() -> None:
    _, rounds = played(Pacing(10, over_select=1.3), MINUTES, 13, 1)
    fastest = np.argsort(seconds_of(13))[:10]
    assert set(positions(rounds[0])) == set(fastest.tolist())
    assert rounds[0].ended == pytest.approx(seconds_of(13)[fastest[-1]])
    _, more = played(Pacing(10, over_select=1.3), MINUTES, 26, 6)
    assert sum((one.dropped for one in more), Counter[str]())["closed"] > 0


def test_at_the_deadline_it_goes_on_with_those_who_are_there() -> None:
    _, rounds = played(Pacing(20, deadline=60), MINUTES, 20, 1)
    in_time = {position for position in range(20) if seconds_of(20)[position] < 60}
    assert set(positions(rounds[0])) == in_time
    assert rounds[0].ended == 60


def test_a_round_with_too_few_is_abandoned_and_the_next_one_goes_on_from_the_same_model() -> None:
    run, rounds = played(Pacing(20, least=0.9, deadline=60), MINUTES, 20, 2)
    assert [one.published for one in rounds] == [False, False]
    assert run.version == 0


def test_the_cohort_is_the_seeds_and_the_same_whatever_the_fleet() -> None:
    _, plain = played(Pacing(6), Fleet(), 30, 4)
    _, timed = played(Pacing(6), MINUTES, 30, 4)
    assert [sorted(positions(one)) for one in plain] == [sorted(positions(one)) for one in timed]
    assert all(one.ended == 0 for one in plain)


@pytest.mark.parametrize(
    "pacing", [Pacing(3, separation=4), Pacing(2, concurrency=4, separation=4)], ids=["synchronous", "buffered"]
)
def test_separation_holds(pacing: Pacing) -> None:
    _, rounds = played(pacing, MINUTES, 15, 40)
    numbers: dict[int, list[int]] = {}
    for one in rounds:
        for position in positions(one):
            numbers.setdefault(position, []).append(one.number)
    assert all(b - a >= 4 for seen in numbers.values() for a, b in itertools.pairwise(seen))


def test_separation_is_models_where_rounds_are_abandoned() -> None:
    pacing = Pacing(4, separation=3, deadline=200.0, least=1.0)
    _, rounds = played(pacing, dataclasses.replace(MINUTES, network=FleetNetwork(flaky=0.35)), 30, 30)
    models = [one.number for one in rounds if one.published]
    assert 10 < len(models) < len(rounds) - 3
    numbers: dict[int, list[int]] = {}
    for one in rounds:
        for position in positions(one):
            numbers.setdefault(position, []).append(one.number)
    between = [
        sum(a < number < b for number in models) for seen in numbers.values() for a, b in itertools.pairwise(seen)
    ]
    assert min(between) == 2


def test_caps_hold_and_a_run_that_can_never_end_says_so() -> None:
    run = timeline(Pacing(5, most_rounds=2), MINUTES, 10)
    counts = Counter(position for number in range(4) for position in positions(run.ended(number)))
    assert set(counts.values()) == {2}
    with pytest.raises(sumus.ExperimentError, match="round 5 never ends: .* no other device may come"):
        run.ended(4)


# ── buffers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_buffer_closes_at_every_k_th_report_and_all_places_are_always_taken() -> None:
    pacing = Pacing(5, concurrency=20)
    run, rounds = played(pacing, MINUTES, 60, 200)
    assert all(len(one.counted) == 5 for one in rounds)
    assert run.totals.work.useful + run.totals.work.wasted == pytest.approx(20 * run.now, rel=0.1)
    mean = run.totals.work.useful / sum(len(one.counted) for one in rounds)
    assert rounds[-1].ended == pytest.approx(200 * 5 * mean / 20, rel=0.1)


def test_staleness_is_the_models_published_meanwhile() -> None:
    run, rounds = played(Pacing(5, concurrency=20), MINUTES, 60, 100)
    late = [each.staleness for one in rounds for each in one.counted]
    assert np.mean(late[100:]) == pytest.approx(20 / 5, rel=0.25)
    for version in range(80):
        for each in run.based_on(version):
            assert each.staleness == each.into - version


def test_whoever_begins_at_the_moment_of_a_publication_has_the_new_model() -> None:
    for pacing in (Pacing(1, concurrency=1, most_stale=0), Pacing(5, concurrency=5, most_stale=0)):
        _, rounds = played(pacing, Fleet(seconds=60), 20, 4)
        assert [each.staleness for one in rounds for each in one.counted] == [0] * (4 * pacing.cohort)
        assert [one.ended for one in rounds] == [60, 120, 180, 240]


def test_every_counted_report_is_based_on_one_model_and_in_one_sum() -> None:
    run, rounds = played(
        Pacing(4, concurrency=12),
        Fleet(seconds=60, spread=10, network=FleetNetwork(flaky=0.2, doubled=0.2, latency=1.0)),
        40,
        60,
    )
    trained = [each for version in range(60) for each in run.based_on(version)]
    in_sums = [each for one in rounds for each in one.counted]
    assert {(each.position, each.into) for each in in_sums} <= {(each.position, each.into) for each in trained}
    assert len({(each.position, each.into, each.again) for each in trained}) == len(trained)


def test_too_stale_a_report_is_not_counted() -> None:
    _, rounds = played(Pacing(2, concurrency=20, most_stale=5), Fleet(seconds=60, spread=100), 60, 200)
    assert max(each.staleness for one in rounds for each in one.counted) <= 5
    assert sum((one.dropped for one in rounds), Counter[str]())["stale"] > 10


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_runs_are_the_same_event_for_event_and_another_seed_is_another_run() -> None:
    fleet = Fleet(
        seconds=60,
        spread=10,
        lost=0.1,
        hours=9,
        network=FleetNetwork(flaky=0.2, doubled=0.2, latency=2, up=1e5),
        timing=FleetTiming(jitter=0.3, skew=0.01),
    )
    work = RoundDemand(down=10**6, up=10**6)

    def told(seed: int) -> list[tuple[Any, ...]]:
        run, rounds = played(Pacing(4, over_select=1.5, deadline=900), fleet, 60, 30, seed=seed, work=work)
        return [(one.ended, one.counted, one.dropped, one.bytes_up) for one in rounds] + [(run.totals.work.wasted,)]

    assert told(0) == told(0)
    assert told(0) != told(1)


def test_messages_that_are_lost_are_sent_again_and_nothing_is_counted_twice() -> None:
    flaky = Fleet(seconds=60, network=FleetNetwork(flaky=0.4, doubled=0.4, latency=1.0))
    run, rounds = played(Pacing(10), flaky, 10, 20, work=RoundDemand(up=1000))
    assert all(sorted(positions(one)) == list(range(10)) for one in rounds)
    assert run.totals.traffic.up > 1.3 * 20 * 10 * 1000


def test_work_of_who_goes_offline_is_dropped() -> None:
    fleet = Fleet(seconds=3600, hours=2)
    _, rounds = played(Pacing(3, deadline=4000), fleet, 50, 10)
    assert sum((one.dropped for one in rounds), Counter[str]())["offline"] > 0


def test_transfers_take_their_time() -> None:
    fleet = Fleet(seconds=10, network=FleetNetwork(down=1000.0, up=100.0, latency=1.0))
    _, rounds = played(Pacing(1), fleet, 1, 1, work=RoundDemand(down=5000, up=2000))
    assert rounds[0].ended == pytest.approx(5 + 10 + 20 + 3 * 1.0)


def test_work_by_examples_takes_longer_for_more() -> None:
    fleet = Fleet(seconds=10, timing=FleetTiming(by="examples"))
    _, rounds = played(Pacing(3), fleet, 3, 1, work=RoundDemand(share=lambda position: [0.5, 1.0, 1.5][position]))
    assert rounds[0].ended == pytest.approx(15)


def test_a_server_takes_its_time_and_the_queue_is_measured() -> None:
    cost = ServerCost(commit=0.5, report=0.1, publish=3.0)
    run, rounds = played(Pacing(10), Fleet(seconds=10), 10, 2, cost=cost)
    assert run.totals.load.staged == 10
    assert run.totals.load.waited == pytest.approx(1.0)
    assert [one.ended for one in rounds] == pytest.approx([14.0, 28.0])


# ── devices that come by themselves ──────────────────────────────────────────────────────────────────────────────────


def rates(report: sumus.FleetReport, minutes: int) -> np.ndarray:
    """Check-ins a second, over so many minutes each."""
    counts = np.array(report.load.checkins[: len(report.load.checkins) // minutes * minutes])
    return counts.reshape(-1, minutes).sum(1) / (60 * minutes)


PHONES = Fleet(seconds=60, spread=10, hours=8, waits=False, lost=0.03, timing=FleetTiming(jitter=0.2))


OUTAGE = (23.5, 24.5)


@pytest.fixture(scope="module")
def day() -> sumus.FleetReport:
    """100,000 phones for a day and a quarter; the server is away for an hour at the busiest time."""
    pacing = Pacing(cohort=100, over_select=1.3, deadline=600, checkins=2.0)
    begin, end = (3600 * hour for hour in OUTAGE)
    return sumus.rehearse(pacing, PHONES, 100_000, 1.25, outages=[(begin, end)])


def test_check_ins_stay_within_twice_the_plan_by_day_and_by_night(day: sumus.FleetReport) -> None:
    assert rates(day, 10).max() < 2 * day.load.planned
    assert day.rounds_a_day > 100
    assert day.abandoned < day.rounds / 10
    assert 0 < day.wasted_share < 0.5


def test_after_an_outage_they_do_not_all_come_at_once(day: sumus.FleetReport) -> None:
    after = rates(day, 10)[int(6 * OUTAGE[1]) :]
    assert 0.5 * day.load.planned < after.max() < 2 * day.load.planned


def test_a_small_population_comes_when_there_is_work() -> None:
    """Ten phones that are always online: no round waits for a cohort longer than a tenth of the time."""
    pacing = Pacing(cohort=5, checkins=100.0)
    report = sumus.rehearse(pacing, Fleet(seconds=60, waits=False), 10, 0.5)
    assert 0.5 * DAY / report.rounds < 1.35 * 62 + 10


def test_over_selection_shows_whom_it_leaves_out() -> None:
    plain = sumus.rehearse(Pacing(20), MINUTES, 100, 1.0).by_speed
    chosen = sumus.rehearse(Pacing(20, over_select=1.3), MINUTES, 100, 1.0).by_speed
    assert min(plain) > 0.9 * max(plain)
    assert chosen[-1] < 0.3 * chosen[0]


def test_a_rehearsal_of_nothing_is_refused() -> None:
    with pytest.raises(sumus.ExperimentError, match="simulated time would not advance"):
        sumus.rehearse(Pacing(5), Fleet(), 10)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pacing": 5}, "pacing= takes a Pacing"),
        ({"fleet": "seconds=60"}, "fleet= takes a Fleet"),
        ({"devices": "20"}, "devices= takes an int"),
        ({"days": np.inf}, "days=inf: it must be a number"),
        ({"down": -1}, "down=-1: it must be"),
        ({"outages": [5]}, r"give a pair \(from, to\) for each"),
    ],
)
def test_what_cannot_be_rehearsed_is_one_line(given: dict[str, Any], said: str) -> None:
    usual: dict[str, Any] = {"pacing": Pacing(5), "fleet": MINUTES, "devices": 20, "days": 0.1}
    with pytest.raises(sumus.SumusError, match=said):
        sumus.rehearse(**usual | given)


def test_work_that_comes_to_nothing_is_all_wasted() -> None:
    report = sumus.rehearse(Pacing(5, concurrency=5), Fleet(seconds=60, lost=1), 20, days=1, up=10, down=10)
    assert (report.rounds, report.wasted_share) == (0, 1.0)
    assert report.idle_share == pytest.approx(0.75, abs=0.02)
    assert report.traffic.down >= 10 * 5 * 1440
    assert report.work.reasons["lost"] > 7000


def test_a_rehearsal_in_which_no_more_rounds_are_possible_says_what_there_was() -> None:
    for waits in (True, False):
        fleet = Fleet(seconds=60, waits=waits)
        assert sumus.rehearse(Pacing(5, most_rounds=1, checkins=0.1), fleet, 20, days=10).rounds == 4


def test_transfers_are_work_and_make_a_device_slow() -> None:
    report = sumus.rehearse(
        Pacing(5, over_select=2), Fleet(spread=20, network=FleetNetwork(up=10)), 40, days=0.01, up=100
    )
    assert report.wasted_share > 0.2
    assert report.by_speed[0] > 2 * report.by_speed[-1]
    played(Pacing(3), Fleet(network=FleetNetwork(up=5e-5)), 5, 1, work=RoundDemand(up=40))  # nine days, and it ends


def test_nobody_asks_a_server_that_is_away() -> None:
    report = sumus.rehearse(Pacing(5), Fleet(seconds=60), 100, days=0.02, outages=[(0, 900)])
    assert report.rounds == 13
    assert sum(report.work.reasons.values()) == 0


def test_stragglers_hurry_nobody() -> None:
    _, plain = played(Pacing(5, over_select=2), Fleet(seconds=60), 20, 3)
    _, slow = played(
        Pacing(5, over_select=2), Fleet(seconds=60, stragglers=0.9), 20, 3, work=RoundDemand(lambda position: 8)
    )
    assert [one.ended for one in slow] == [one.ended for one in plain] == [60, 120, 180]
    assert any(each.most_steps for one in slow for each in one.counted)


# ── devices ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_speeds_are_spread_log_uniformly() -> None:
    devices = Fleet(seconds=1, spread=100).devices(20_000, generator(0))
    logs = np.log10(devices.seconds)
    assert np.histogram(logs, 10, (-1, 1))[0] == pytest.approx(np.full(10, 2000), rel=0.1)


@pytest.mark.parametrize("hours", [1.0, 8.0, 18.0, 24.0])
def test_devices_are_online_so_many_hours_a_day(hours: float) -> None:
    devices = Fleet(seconds=1, hours=hours).devices(1000, generator(0))
    assert devices.lasts.sum(1).mean() / 3600 == pytest.approx(hours, rel=0.02)
    who, minutes = np.arange(1000), range(0, int(DAY), 300)
    seen = np.mean([devices.online_until(who, float(now)) > now for now in minutes])
    assert 24 * seen == pytest.approx(hours, rel=0.02), "night and day do not overlap"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"waits": "no"}, "give True or False"),
        ({"trace": 5}, "takes a str"),
        ({"trace": "phones.csv", "hours": 1, "spread": 50}, "leave out spread, hours"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(sumus.SumusError, match=said):
        Fleet(**given)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: FleetTiming(skew=2), r"FleetTiming\(skew=2\): .*give from 0 to 0.5"),
        (lambda: FleetTiming(by="weight"), "give 'client' or 'examples'"),
        (lambda: FleetNetwork(flaky=1), "no message would ever arrive"),
        (lambda: FleetNetwork(down=0), r"FleetNetwork\(down=0\): it must be positive"),
        (lambda: Fleet(network={"flaky": 0.1}), r"Fleet\(network=\) takes a FleetNetwork"),
        (lambda: Fleet(trace="phones.csv", network=FleetNetwork(up=1.0)), "leave out up"),
    ],
)
def test_a_network_or_a_timing_that_cannot_be_is_refused(made: Any, said: str) -> None:
    with pytest.raises(sumus.SumusError, match=said):
        made()


def test_a_fleet_is_its_figures() -> None:
    fleet = Fleet(seconds=60, lost=0.1, network=FleetNetwork(flaky=0.2), timing=FleetTiming(jitter=0.3))
    assert Fleet.of(fleet.figures) == fleet
    assert Fleet.of({"seconds": 60, "lost": 0.1, "flaky": 0.2, "jitter": 0.3}) == fleet


def test_online_intervals_go_over_midnight() -> None:
    one = DeviceArrays(*np.ones((4, 1)), np.array([[79200.0]]), np.array([[18000.0]]))  # 22:00 to 03:00
    who = np.zeros(5, np.int64)
    hours = np.array([21.0, 22.0, 26.0, 27.0, 30.0]) * 3600
    assert one.online_until(who, hours).tolist() == [75600.0, 97200.0, 97200.0, 97200.0, 108000.0]
    assert one.online_from(who, hours).tolist() == [79200.0, 79200.0, 93600.0, 165600.0, 165600.0]


def test_one_device_is_online_as_long_as_among_others() -> None:
    devices = Fleet(seconds=1, hours=14).devices(200, generator(0))
    for now in (0.0, 3e4, 8e4, 2e5):
        together = devices.online_until(np.arange(200), now)
        assert [devices.one_online_until(who, now) for who in range(200)] == pytest.approx(together.tolist())


TRACE = "seconds,down,up,clock,online\n0.5,,,,\n2,1000,100,1.01,79200-7200 43200-46800\n"


def test_a_trace_is_read_and_its_lines_are_used_again(tmp_path: Path) -> None:
    path = tmp_path / "phones.csv"
    path.write_text(TRACE)
    devices = devices_of(Fleet(trace=str(path)), 5, generator(0))
    assert devices.seconds.tolist() == [0.5, 2, 0.5, 2, 0.5]
    assert devices.online_until(np.arange(2), 0.0).tolist() == [np.inf, 7200.0]
    assert read(path).up.tolist() == [np.inf, 100.0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seconds\n1\n", "the columns seconds, down, up, clock, online"),
        ("seconds,down,up,clock,online\n-1,,,,\n", "line 2: seconds, down, up and clock must be positive"),
        ("seconds,down,up,clock,online\n1,,,,5-\n", "line 2: column 'online' holds ''"),
        ("seconds,down,up,clock,online\n\n1,,,,\n\ninf,,,,\n", "line 5: column 'seconds' holds 'inf'"),
        ("seconds,down,up,clock,online\n1,,,,5-99999\n", "not an interval of a day"),
    ],
)
def test_a_trace_that_cannot_be_read_names_the_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "phones.csv"
    path.write_text(text)
    with pytest.raises(sumus.ExperimentError, match=said):
        read(path)


# ── in a run ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def records(history: sumus.History) -> Sequence[dict[str, Any]]:
    return [{**record.to_json(), "seconds": 0} for record in history.rounds]


@pytest.mark.parametrize("name", ["buffered", "buffered scaffold"])
def test_a_buffered_run_that_was_broken_off_ends_like_one_that_was_not(
    anywhere: Any, tmp_path: Path, name: str
) -> None:
    whole = sumus.run(anywhere(name, rounds=20))
    assert max(max(record.reports.staleness) for record in whole.rounds) > 0
    for rounds in (7, 13, 20):
        parts = sumus.run(anywhere(name, rounds=rounds), out=sumus.Output(tmp_path, checkpoint_every=1))
    assert parts.model_sha256 == whole.model_sha256
    assert records(parts) == records(whole)


def test_a_buffered_run_is_fedbuff_by_hand() -> None:
    """x ← x − (1/K) Σ s(τᵢ) η ∇fᵢ(xᵢ), each gradient at the model that its client was given: in float64, to 1e-9."""
    rng = np.random.default_rng(1)
    people = {client: (rng.normal(size=(5, 3)), rng.normal(size=5)) for client in range(12)}
    task = sumus.Task(
        lambda: nn.Linear(3, 1, bias=False).double(), lambda outputs, targets: (outputs[:, 0] - targets) ** 2
    )
    pacing, rate, rounds = Pacing(3, concurrency=8), 0.1, 30
    history = sumus.run(
        sumus.Experiment(
            sumus.Plan(task, sumus.fedbuff(sumus.sgd(lr=rate)), pacing), people, rounds, seed=4, fleet=MINUTES
        )
    )
    run = timeline(pacing, MINUTES, 12, seed=4)
    models = [sumus.simulate(task, sumus.fedavg(sumus.sgd(lr=1e-300)), people, 1, seed=4).model["weight"].numpy()[0]]
    moves = np.zeros((rounds + 20, 3))
    for number in range(rounds):
        run.ended(number)
        for each in run.based_on(number):
            inputs, targets = people[each.position]
            gradient = 2 * inputs.T @ (inputs @ models[number] - targets) / len(targets)
            moves[each.into] += round(1024 / np.sqrt(1 + each.staleness)) / 1024 * rate * gradient / 3
        models.append(models[number] - moves[number])
    assert history.model["weight"].numpy()[0] == pytest.approx(models[-1], abs=1e-9)
    assert history.simulated_seconds == run.ended(rounds - 1).ended
    assert np.abs(models[-1] - models[0]).max() > 0.1


def test_a_rotation_is_one_for_all_reports_of_a_buffer(anywhere: Any) -> None:
    """Else a sum of reports on several models would be of numbers that do not belong together."""
    plain = anywhere("buffered", rounds=12)
    client, pacing = plain.plan.algorithm.client, plain.plan.pacing
    rotated = sumus.Plan(plain.plan.task, sumus.fedbuff(client, update=sumus.rotate()), pacing)
    one, other = sumus.run(plain), sumus.run(dataclasses.replace(plain, plan=rotated))
    for name, leaf in one.model.items():
        assert other.model[name].numpy() == pytest.approx(leaf.numpy(), abs=1e-5), name
