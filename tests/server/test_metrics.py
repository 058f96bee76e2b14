"""/metrics is text that Prometheus reads, and names no device."""

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from sumus.operations.policy import ServerPolicy
from sumus.operations.service import open_service
from sumus.server.evaluation import Evaluating
from sumus.server.metrics import exposition
from sumus.server.status import look
from sumus.transport.inprocess import InProcess
from tests.server.devices import ScriptedDevice, tiny, update_of


def test_it_says_what_happened_in_sums() -> None:
    bundle = tiny()
    service = open_service({"tiny": bundle}, policy=ServerPolicy(evaluate=Evaluating(2), group=0.0))
    server = service.server
    server.start()
    with InProcess(service.device_app) as transport:
        token = server.roll.new_token("default", server.clock(), uses=3)
        devices = [ScriptedDevice(transport, number) for number in range(3)]
        for device in devices:
            device.enrol(token)
        for device in devices:
            work = device.check_in(bundle.plan, kinds=("train",)).assignment
            assert work is not None
            device.report(work, update_of(bundle.plan, 1))
        training = server.tasks[0].training
        server.ask_to_do(lambda now: training.coordinator.publish(0, now)).result()
        devices[0].request("POST", "/v1/checkins", b"no json")
        text = exposition(asyncio.run(look(server, lent=service.room.lent))).decode()
    service.close()
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    task = ("task", "tiny")
    assert samples["sumus_ready",] == 1
    assert samples["sumus_devices",] == 3
    assert samples["sumus_reports_total", ("outcome", "counted")] == 3
    assert samples["sumus_checkins_total", ("outcome", "assigned")] == 3
    assert samples["sumus_refusals_total", ("code", "malformed")] == 1
    assert samples["sumus_model_version", task] == 1
    assert samples["sumus_model_staleness", task, ("versions", "0")] == 3
    assert samples["sumus_model_metric", ("by", "train"), ("metric", "loss"), task] == 0.5
    assert samples["sumus_round", ("kind", "train"), task] == 1
    assert samples["sumus_round_state", ("kind", "evaluate"), ("state", "open"), task] == 1
    assert (
        samples["sumus_illegal_events_total", ("event", "Published"), ("kind", "train"), ("state", "published"), task]
        == 1
    )
    assert not any(device.id in text for device in devices)
