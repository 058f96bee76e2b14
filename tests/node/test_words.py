"""A node in its owner's words: labels and answers as people say them, and training when there is something new."""

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_node import FORM, Patient, a_node, reading, until

from sumus.errors import ExperimentError, UsageError
from sumus.node.commands import load_node, new_of
from sumus.node.intake import BadAnswer
from sumus.node.options import NodeTraining
from sumus.node.reading import BadReading, Reading
from sumus.node.readings import Readings, Retention

FELT = {"cold": [0.0], "warm": [1.0]}


def answer(inputs: Any, outputs: Any) -> Any:
    return {"felt": "warm" if outputs[0] > 0.5 else "cold", "sum": inputs.sum(), "score": outputs}


def posted(url: str, body: Any) -> tuple[int, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as found:
            return found.status, json.loads(found.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_labels_come_and_answers_go_in_words(tmp_path: Path) -> None:
    given = {"label": FELT.__getitem__, "answer": answer, "listen": "127.0.0.1:0"}
    with a_node(tmp_path, Patient(releases=True), **given) as node:
        assert node.keep({**reading(1), "target": "warm"}, {**reading(2), "target": None, "key": "k"}).kept == 2
        taken = node.keep({**reading(3), "target": "lukewarm"})
        assert taken.refused == {0: "label: it has no entry for 'lukewarm'"}
        node.label("k", "cold")
        assert node.readings.examples()[1].tolist() == [[1.0], [0.0]]
        assert posted(f"{node.url}/v1/labels", {"key": "k", "target": "warm"}) == (200, {"labelled": 1, "refused": []})
        status, said = posted(f"{node.url}/v1/labels", {"key": "k", "target": 1.0})
        assert (status, said["refused"][0]["why"]) == (422, "label: it has no entry for 1.0")
        until(node, lambda status: status.models)
        status, said = posted(f"{node.url}/predict", [reading(5), reading(6)])
        assert status == 200
        assert [each["felt"] for each in said["answers"]] == [
            "warm" if row[0] > 0.5 else "cold" for row in said["outputs"]
        ]
        assert said["answers"][0]["score"] == said["outputs"][0]
        assert said["answers"][1]["sum"] == pytest.approx(sum(reading(6)["inputs"]), rel=1e-5)
        assert node.predict(reading(5)).answers[0]["felt"] in FELT


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        (lambda inputs, outputs: {}["felt"], "KeyError: 'felt'"),
        (lambda inputs, outputs: object(), "TypeError: "),
        (lambda inputs: inputs, "TypeError: "),
    ],
)
def test_an_answer_that_fails_is_said_to_and_the_node_goes_on(tmp_path: Path, answers: Any, why: str) -> None:
    with a_node(tmp_path, Patient(releases=True), answer=answers, listen="127.0.0.1:0") as node:
        node.keep(reading(1))
        until(node, lambda status: status.models)
        status, said = posted(f"{node.url}/predict", reading(5))
        assert (status, said["error"]) == (500, "answer")
        assert f"answer(inputs, outputs) of the node's file failed: {why}" in said["detail"]
        with pytest.raises(BadAnswer):
            node.predict(reading(5))
        assert node.keep(reading(2)).kept == 1


@pytest.mark.parametrize(
    ("label", "value", "why"),
    [
        (lambda value: int(value), "a", "label: ValueError: invalid literal"),
        (lambda value: None, "a", "label: it returns no target for 'a'"),
        (lambda value: "word", "a", "its target is not an array of numbers"),
    ],
)
def test_a_label_that_means_nothing_is_refused_by_its_value(tmp_path: Path, label: Any, value: str, why: str) -> None:
    with a_node(tmp_path, label=label) as node:
        assert why in node.keep({**reading(1), "target": value}).refused[0]
        node.keep({"inputs": reading(1)["inputs"], "key": "k"})
        with pytest.raises(BadReading, match=why):
            node.label("k", value)


def test_a_file_defines_them_as_functions(tmp_path: Path) -> None:
    text = "import sumus, torch\ntask = sumus.Task(torch.nn.Linear(1, 1), sumus.losses.mean_squared_error)\n"
    file = tmp_path / "mine.py"
    file.write_text(text + "def label(value): return [value]\ndef answer(inputs, outputs): return outputs\n")
    found = load_node(str(file))
    assert found["label"](3) == [3]
    assert found["answer"](1, 2) == 2
    assert found["prepare"] is None
    for name in ("label", "answer", "prepare"):
        file.write_text(f"{text}{name} = 'warm'\n")
        with pytest.raises(ExperimentError, match=f"`{name}` in .*mine.py is a str: write a function that takes"):
            load_node(str(file))


# ── when there is something new ──────────────────────────────────────────────────────────────────────────────────────


def test_it_trains_once_so_many_readings_are_new_and_not_again_on_the_same(tmp_path: Path) -> None:
    server, said = Patient(releases=True, works=100), list[str]()
    with a_node(tmp_path, server, new=5, say=said.append) as node:
        node.keep(*(reading(number) for number in range(4)))
        status = until(node, lambda status: status.models)
        assert status.waits == "for 5 new readings with a target since the last round; there are 4"
        node.keep(reading(4))
        until(node, lambda status: status.rounds == 1 and status.waits)
        before = len(server.named("check_in"))
        until(node, lambda status: len(server.named("check_in")) >= before + 5)
        assert node.status.rounds == 1, "it asks for models, and for no work"
        assert (node.status.readings.new, node.status.readings.labelled) == (0, 5)
        node.keep(*({**reading(number), "key": f"k{number}", "target": None} for number in range(10, 16)))
        assert node.status.readings.new == 0, "without a target they teach nothing"
        for number in range(10, 16):
            node.label(f"k{number}", [1.0])
        until(node, lambda status: status.rounds == 2)
    waited = [
        line for line in said if line.startswith("training: waits for 5 new readings with a target since the last")
    ]
    assert 1 <= len(waited) <= 3, "not with each reading"
    with a_node(tmp_path, server, new=5, token=None) as node:
        assert node.status.waits, "after a restart it knows what it was trained on"
        assert node.status.readings.new == 0


def test_what_is_new_is_counted_over_restarts_relabelling_and_retention(tmp_path: Path) -> None:
    def one(number: int, key: str | None = None) -> Reading:
        return Reading(np.full(4, number, np.float32), np.array([0.0], np.float32), key)

    with Readings(tmp_path, FORM, Retention(count=6)) as readings:
        readings.keep([readings.fit(one(number, f"k{number}")) for number in range(3)])
        assert readings.kept.new == 3
        readings.examples()
        readings.note_trained()
        readings.keep([readings.fit(one(9, "k9"))])
        assert readings.kept.new == 4, "that it was trained is not yet that it is counted"
    with Readings(tmp_path, FORM, Retention(count=6)) as readings:
        readings.note_counted()
        assert readings.kept.new == 1, "what came while it trained is new"
        readings.label("k0", [0.0])
        assert readings.kept.new == 1, "the same label is no news"
        readings.label("k0", [1.0])
        assert readings.kept.new == 2
        readings.keep([readings.fit(one(20 + number)) for number in range(30)])
        assert (readings.kept.new, readings.kept.labelled) == (6, 6), "what is gone is not new"


@pytest.mark.parametrize("word", ["50", "new", "new=", "new=0", "new=-1", "old=5", "new=1.5"])
def test_when_to_train_is_said_in_one_form(word: str) -> None:
    with pytest.raises(UsageError, match="write new=N, where N is a whole number of at least 1"):
        new_of(word)
    assert (new_of("new=50"), new_of(None)) == (50, 0)
    assert NodeTraining().new == 0
