"""/metrics: the server's status in Prometheus's format. It contains only sums over devices; no label is the name of a device."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from sumus.protocol.round import ORDER
from sumus.server.status import RunStatus, ServerStatus, TaskStatus

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_COUNTED = {
    "check-ins": ("checkins", "Check-ins, by answer.", "outcome"),
    "settled": ("settlements", "Earlier sessions that devices asked about, by outcome.", "outcome"),
    "reports": ("reports", "Reports, by answer.", "outcome"),
    "dropped": ("sessions_dropped", "Sessions that ended without a report, by reason.", "reason"),
    "enrolments": ("enrolments", "Enrolments of new devices, and repeated enrolments.", "outcome"),
    "refused": ("refusals", "Requests that were answered with an error, by error code.", "code"),
    "failures": ("failures", "Decisions that failed because of the storage, by error.", "error"),
}


def exposition(status: ServerStatus) -> bytes:
    """Write a status in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(_Snapshot(status))
    return generate_latest(registry)


class _Snapshot(Collector):
    """One status, as a collector for the Prometheus client."""

    def __init__(self, status: ServerStatus) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status
        yield GaugeMetricFamily("sumus_up_seconds", "Seconds since the server started.", value=status.up_s)
        yield GaugeMetricFamily("sumus_ready", "Whether the server can decide.", value=float(not status.trouble))
        yield GaugeMetricFamily(
            "sumus_leader",
            "Whether the server leads the servers that share its rounds.",
            value=float(status.replica.leads),
        )
        yield GaugeMetricFamily(
            "sumus_fence", "Number of the leader's lease, as known to this server.", value=status.replica.fence
        )
        yield GaugeMetricFamily("sumus_replicas", "Servers that share the rounds.", value=len(status.replica.there))
        if status.certificate_s is not None:
            yield GaugeMetricFamily(
                "sumus_certificate_left_seconds",
                "Seconds until the server's certificate ends.",
                value=status.certificate_s,
            )
        yield GaugeMetricFamily("sumus_devices", "Devices that are enrolled.", value=status.devices)
        yield CounterMetricFamily("sumus_received_bytes", "Bytes of received bodies.", value=status.bytes_in)
        yield CounterMetricFamily("sumus_sent_bytes", "Bytes of sent plans and models.", value=status.bytes_out)
        yield CounterMetricFamily("sumus_commits", "Commits of reports.", value=status.commits)
        yield CounterMetricFamily(
            "sumus_acknowledged_seconds",
            "Sum of the seconds that reports waited for their answers.",
            value=status.acknowledged_s,
        )
        yield GaugeMetricFamily(
            "sumus_body_bytes", "Bytes of memory that are lent for arriving bodies.", value=status.lent
        )
        yield GaugeMetricFamily("sumus_checkins_held", "Check-ins that are held open.", value=status.held)
        if (above := status.above) is not None:
            yield GaugeMetricFamily(
                "sumus_above_reached",
                "Whether this edge can reach its upstream server.",
                value=float(not above.trouble),
            )
            yield CounterMetricFamily(
                "sumus_above_sums", "Sums of this edge that the upstream server has counted.", value=above.sums
            )
            yield CounterMetricFamily("sumus_above_sent_bytes", "Bytes of these sums.", value=above.bytes)
            yield GaugeMetricFamily(
                "sumus_above_waiting", "Sums that wait to be counted by the upstream server.", value=above.waiting
            )
        for what, (name, help, label) in _COUNTED.items():
            family = CounterMetricFamily(f"sumus_{name}", help, labels=[label])
            for which, times in status.events.get(what, {}).items():
                family.add_metric([which], times)
            yield family
        yield from _of_tasks(status.tasks)


def _of_tasks(tasks: tuple[TaskStatus, ...]) -> Iterator[Metric]:
    version = GaugeMetricFamily("sumus_model_version", "Version of the newest model.", labels=["task"])
    released = GaugeMetricFamily("sumus_model_released", "Version of the released model.", labels=["task"])
    contributors = GaugeMetricFamily("sumus_model_contributors", "Reports in the newest model.", labels=["task"])
    age = GaugeMetricFamily("sumus_model_age_seconds", "Seconds since the newest model was made.", labels=["task"])
    stale = GaugeMetricFamily(
        "sumus_model_staleness",
        "Reports in the newest model, by the number of versions by which they were late.",
        labels=["task", "versions"],
    )
    measured = GaugeMetricFamily(
        "sumus_model_metric", "Mean of a metric, by the run that measured it.", labels=["task", "by", "metric"]
    )
    for task in tasks:
        version.add_metric([task.name], task.version)
        released.add_metric([task.name], task.released)
        if task.model is not None:
            contributors.add_metric([task.name], task.model.contributors)
            age.add_metric([task.name], task.model.age_s)
            for late, reports in task.model.staleness.items():
                stale.add_metric([task.name, late], reports)
            for name, value in task.model.train.items():
                measured.add_metric([task.name, "train", name], value)
        if task.evaluated is not None:
            for name, value in task.evaluated.evaluate["means"].items():
                measured.add_metric([task.name, "evaluate", name], value)
    yield from (version, released, contributors, age, stale, measured)
    yield from _of_runs([(task.name, run) for task in tasks for run in task.runs])


def _of_runs(runs: list[tuple[str, RunStatus]]) -> Iterator[Metric]:
    which = ["task", "kind"]
    number = GaugeMetricFamily("sumus_round", "The newest round's number.", labels=which)
    state = GaugeMetricFamily(
        "sumus_round_state", "1 for the round's present state, 0 for others.", labels=[*which, "state"]
    )
    age = GaugeMetricFamily(
        "sumus_round_state_seconds", "Seconds for which the round has been in this state.", labels=which
    )
    goal = GaugeMetricFamily("sumus_round_goal", "Reports that the round's sum needs.", labels=which)
    paused = GaugeMetricFamily("sumus_paused", "Whether the run is paused.", labels=which)
    sessions = GaugeMetricFamily("sumus_round_sessions", "Sessions of the round, by state.", labels=[*which, "state"])
    illegal = CounterMetricFamily(
        "sumus_illegal_events",
        "Events that are not allowed in the state that the round was in.",
        labels=[*which, "state", "event"],
    )
    for task, run in runs:
        number.add_metric([task, run.kind], run.round)
        for each in ORDER:
            state.add_metric([task, run.kind, each.value], float(run.state == each.value))
        age.add_metric([task, run.kind], run.since_s)
        goal.add_metric([task, run.kind], run.goal)
        paused.add_metric([task, run.kind], float(run.paused))
        for name in ("out", "dropped", "counted"):
            sessions.add_metric([task, run.kind, name], getattr(run, name))
        for in_state, events in run.illegal.items():
            for event, times in events.items():
                illegal.add_metric([task, run.kind, in_state, event], times)
    yield from (number, state, age, goal, paused, sessions, illegal)
