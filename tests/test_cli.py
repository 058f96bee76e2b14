"""The command line: what it prints, and how it says no."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
from safetensors.numpy import load_file

from sumus import cli
from sumus.plan import Plan
from sumus.rng import generator
from sumus.simulator.populations.population import Population, sample
from sumus.wire.bundle import Bundle
from tests import forked

FILE = """
import numpy as np
from torch import nn
import sumus

def load(client):
    rng = np.random.default_rng(client)
    inputs = rng.normal(size=(12, 4)).astype("float32")
    return inputs, (inputs.sum(1) > 0).astype("int64")

task = sumus.Task(lambda: nn.Linear(4, 2), sumus.losses.cross_entropy, {"accuracy": sumus.metrics.accuracy}, name="mine")
algorithm = sumus.fedavg(sumus.sgd(lr=0.2, batch_size=4), sumus.clip_by_global_norm(1.0), weight="uniform")
plan = sumus.Plan(task, algorithm, sumus.Pacing(cohort=10))
examples = load(0)
experiment = sumus.Experiment(plan, sumus.Population(range(20), load), rounds=4, evaluate=sumus.Evaluation(central=load(99)))

def smaller():
    return sumus.Experiment(plan, sumus.Population(range(10), load), rounds=2)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def sumus(*words: object, cwd: Path | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, as a person would."""
    done = forked.run("sumus", words, cwd, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_simulate_prints_one_json_object_as_its_last_line(file: Path) -> None:
    first, second = (json.loads(sumus("simulate", file, "--json").stdout.splitlines()[-1]) for _ in range(2))
    assert first["rounds"] == 4
    assert 0 <= first["metrics"]["accuracy"] <= 1
    assert re.fullmatch("[0-9a-f]{64}", first["model_sha256"])
    assert first["seconds"] > 0
    assert first["model_sha256"] == second["model_sha256"]


def test_rounds_seed_and_name_replace_those_of_the_file(file: Path) -> None:
    result = json.loads(
        sumus("simulate", f"{file}:smaller", "--rounds", 3, "--seed", 5, "--json").stdout.splitlines()[-1]
    )
    assert (result["rounds"], result["seed"]) == (3, 5)


def test_out_holds_what_a_person_looks_for_and_says_where(file: Path, tmp_path: Path) -> None:
    done = sumus("simulate", file, "--out", tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "checkpoint.safetensors", "history.jsonl", "model.safetensors", "plot.png", "progress.json",
    }  # fmt: skip
    for name in ("model.safetensors", "plot.png", "history.jsonl"):
        assert str(tmp_path / "run" / name) in done.stdout
    assert "accuracy" in done.stdout
    assert done.stderr.startswith("round 1 of "), "without a terminal, lines"
    assert set(load_file(tmp_path / "run" / "model.safetensors")) == {"weight", "bias"}


SCAFFOLD = FILE.replace("sumus.fedavg(", "sumus.scaffold(").replace(', weight="uniform"', "")


def test_client_states_lie_in_a_folder_and_a_longer_run_goes_on_with_them(file: Path, tmp_path: Path) -> None:
    file.write_text(SCAFFOLD)
    whole = json.loads(sumus("simulate", file, "--json").stdout.splitlines()[-1])
    command = ("simulate", file, "--out", tmp_path / "run", "--client-states", tmp_path / "states", "--json")
    sumus(*command, "--rounds", 2)
    files = list((tmp_path / "states").glob("*.safetensors"))
    assert 10 <= len(files) <= 20
    assert all(set(load_file(path)) == {"control/weight", "control/bias"} for path in files)
    longer = json.loads(sumus(*command).stdout.splitlines()[-1])
    assert (longer["rounds"], longer["model_sha256"]) == (4, whole["model_sha256"])


def test_reports_that_were_not_counted_are_told(file: Path) -> None:
    file.write_text(FILE + "\nlossy = sumus.Experiment(plan, experiment.population, 4, fleet=sumus.Fleet(lost=0.5))\n")
    told = re.search(r"reports +(\d+) of 40 counted", sumus("simulate", f"{file}:lossy").stdout)
    assert told is not None
    assert 5 < int(told[1]) < 35
    assert "counted" not in sumus("simulate", file).stdout


def test_a_fleet_is_given_in_words_and_time_goes_by(file: Path, tmp_path: Path) -> None:
    done = sumus("simulate", file, "--fleet", "seconds=60,spread=10,lost=0.1")
    assert "of simulated time" in done.stdout
    assert "lost" in done.stdout
    (tmp_path / "phones.csv").write_text("seconds,down,up,clock,online\n1,,,,\n3,,,,\n")
    timed = ("simulate", file, "--json", "--fleet")
    one = json.loads(sumus(*timed, "seconds=60,spread=10").stdout.splitlines()[-1])
    other = json.loads(sumus(*timed, tmp_path / "phones.csv").stdout.splitlines()[-1])
    assert one["simulated_seconds"] > 4 * 60
    assert len(one["fleet"]["by_speed"]) == 10
    assert other["simulated_seconds"] == 4 * 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("second=5", "write NAME=VALUE, where NAME is one of lost, "),
        ("lost=2", "it is a share"),
        ("nowhere.csv", "cannot be read"),
        ("lost=0.1,trace=nowhere.csv", "the trace nowhere.csv cannot be read"),
        ("seconds=60,waits=perhaps", "give True or False"),
    ],
)
def test_a_fleet_that_is_none_is_one_line(file: Path, text: str, said: str) -> None:
    assert said in sumus("simulate", file, "--fleet", text, code=2).stderr


def test_rehearse_says_what_a_fleet_would_do(file: Path, tmp_path: Path) -> None:
    command = ("rehearse", file, "--devices", 500, "--days", 0.5, "--fleet", "seconds=60,spread=10,hours=8,waits=false")
    done = sumus(*command, "--plot", tmp_path / "fleet.png", "--json")
    for word in ("models a day", "took part", "in no model", "a second at most", "waited at once"):
        assert word in " ".join(done.stdout.split())
    assert (tmp_path / "fleet.png").stat().st_size > 10_000
    assert json.loads(done.stdout.splitlines()[-1])["devices"] == 500
    assert "simulated time would not advance" in sumus("rehearse", file, code=2).stderr
    assert "pictures end in" in sumus(*command, "--plot", tmp_path / "fleet.txt", code=2).stderr


def test_an_error_in_mid_run_keeps_the_rounds_before_it(file: Path) -> None:
    """A wrong label is met in the third round; mended, the run goes on from where it was."""
    people = Population(range(20), lambda client: None)
    first, second, third = (set(sample(people, 10, generator(0, "round", number, "cohort"))) for number in range(3))
    bad = min(third - first - second - {0})
    good = FILE.replace('.astype("int64")', '.astype("int64") * (7 if client == BAD else 1)')
    file.write_text(f"BAD = {bad}\n{good}")
    done = sumus("simulate", file, cwd=file.parent, code=2)
    told = re.search(rf"client {bad}: .*, after round 2, kept in (\S+): add --out", done.stderr)
    assert told is not None
    file.write_text("BAD = None\n" + good)
    again = sumus("simulate", file, "--out", told[1], "--json", cwd=file.parent)
    whole = sumus("simulate", file, "--json", cwd=file.parent)
    one, other = (json.loads(run.stdout.splitlines()[-1])["model_sha256"] for run in (again, whole))
    assert one == other


def test_check_says_what_a_client_keeps_between_rounds(file: Path) -> None:
    file.write_text(SCAFFOLD)
    text = " ".join(sumus("check", file).stdout.split())
    assert "client state 40 bytes kept by each client between rounds" in text
    assert "80 bytes down and 80 bytes up" in text


def test_check_says_what_a_plan_costs_and_whether_devices_may_run_it(file: Path) -> None:
    text = " ".join(sumus("check", file).stdout.split())
    assert "inputs float32[4], targets int64[], 2 classes" in text
    assert "10 shared parameters" in text
    assert "40 bytes down and 40 bytes up" in text
    assert "client state" not in text
    assert "real devices legal" in text
    file.write_text(FILE.replace("cohort=10", "cohort=3"))
    assert "refused by min-contributors" in " ".join(sumus("check", file).stdout.split())


def test_pack_writes_a_bundle_that_names_its_plan(file: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.sumus", tmp_path / "two.sumus"
    done = sumus("pack", file, "-o", one)
    sumus("pack", f"{file}:plan", "-o", two)
    bundle = Bundle.from_bytes(one.read_bytes())
    assert bundle.plan.id in done.stdout
    assert bundle.plan == Plan.from_json(bundle.plan.to_json())
    assert bundle.plan.description.data is not None
    assert bundle.plan.description.data.classes == 2
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1", "defines no 'experiment': add `experiment = sumus.Experiment(...)`"),
        ("experiment = 3", "is a int, not a sumus.Experiment"),
        ("import nonsense_module", "line 1: ModuleNotFoundError: No module named 'nonsense_module'"),
        ("x = 1\nx.y", "line 2: AttributeError"),
        ("def broken(:", "line 1: SyntaxError"),
        (FILE.replace("cohort=10", "cohort=50"), "a cohort of 50 is larger than the population of 20"),
        (FILE.replace("lr=0.2", "lr=0.2, steps=2, epochs=3"), "[rule epochs-or-steps]"),
        (FILE.replace("sumus.clip_by_global_norm(1.0)", "sumus.quantize(bits=8)"), "[rule quantize-range]"),
        (FILE.replace("nn.Linear(4, 2)", "nn.Linear(4, 1)"), "one score per prediction"),
        (FILE.replace('.astype("int64")', '.astype("int64") * 7'), "label 7 of example"),
        (FILE.replace("lr=0.2", "lr=1e30").replace(", sumus.clip_by_global_norm(1.0)", ""), "lower the learning rate"),
        (FILE.replace("range(20), load)", "[1] * 20, load)"), "client id 1 appears twice"),
        ("def experiment():\n    return 1 / 0", "line 2: ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit('enough')", "ended the program (enough): guard it with"),
        (
            FILE.replace("(inputs.sum(1) > 0).astype", "[][client].astype"),
            "line 9: IndexError: list index out of range",
        ),
        (FILE.replace("sumus.sgd(lr=0.2", "sumus.sgd(lr='fast'"), "sgd does not accept lr='fast'"),
    ],
    ids=[
        "none",
        "not-one",
        "import",
        "attribute",
        "syntax",
        "cohort",
        "epochs",
        "illegal",
        "classes",
        "label",
        "diverged",
        "ids",
        "call",
        "exit",
        "loader",
        "kind",
    ],
)
def test_a_mistake_ends_in_one_line(file: Path, content: str, message: str) -> None:
    file.write_text(content)
    code = 1 if "lr=1e30" in content else 2
    done = sumus("simulate", file, code=code)
    assert message in done.stderr
    assert done.stderr.startswith("sumus: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    for command in (("simulate", "none.py"), ("check", "none.py"), ("pack", "none.py", "-o", "x.sumus")):
        assert "there is no file none.py" in sumus(*command, cwd=tmp_path, code=2).stderr


def test_pack_refuses_what_may_not_be_deployed(file: Path, tmp_path: Path) -> None:
    file.write_text(FILE.replace("cohort=10", "cohort=3"))
    assert "[rule min-contributors]" in sumus("pack", file, "-o", tmp_path / "x.sumus", code=2).stderr
    assert not (tmp_path / "x.sumus").exists()


def test_help_names_every_command() -> None:
    text = sumus("--help").stdout
    for command in ("simulate", "check", "pack", "demo"):
        assert command in text


def test_what_cannot_be_written_is_one_line_too(file: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    assert "nothing can be written to" in sumus("simulate", file, "--out", tmp_path / "taken", code=2).stderr
    done = sumus("pack", file, "-o", tmp_path / "missing" / "x.sumus", code=2)
    assert "No such file or directory" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_file_that_reads_its_arguments_sees_none_of_ours(file: Path) -> None:
    file.write_text("import argparse\nargparse.ArgumentParser().parse_args()\n" + FILE)
    assert json.loads(sumus("simulate", file, "--rounds", 1, "--json").stdout.splitlines()[-1])["rounds"] == 1


def test_names_with_brackets_are_printed_as_they_are(file: Path, tmp_path: Path) -> None:
    file.write_text(FILE.replace("sumus.Evaluation(central=load(99))", "sumus.Evaluation(unseen={'[/bob]': load(99)})"))
    done = sumus("simulate", file, "--rounds", 1, "--out", tmp_path / "run[/x]")
    assert "([/bob])" in done.stdout
    assert "run[/x]" in done.stdout


def test_a_bound_that_is_not_a_number_is_null_in_json(file: Path) -> None:
    metric = "def nan(outputs, targets):\n    return outputs[:, 0] * float('nan')\n\ntask = "
    file.write_text(FILE.replace("task = ", metric).replace('"accuracy": sumus.metrics.accuracy', '"nan": nan'))
    line = sumus("simulate", file, "--rounds", 1, "--json").stdout.splitlines()[-1]
    assert json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))["metrics"]["nan"] is None


def test_the_version_is_printed() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", sumus("--version").stdout)


OPTIONS = {
    "simulate": """--checkpoint-every --client-states --device --edge-groups --edge-rounds --executor --fleet --insecure --json
--out --restart --rounds --seed --through --workers""",
    "serve": """--admin-host --admin-port --blobs --data --database --edge-file --edges --evaluate --every --host --insecure
--json --keys --log --memory --name --population --port --priority --promote --proxies --quiet --quota --rounds
--seed --spool --tls --token-file --tokens --url --uses --warm-start""",
    "edge": """--admin-host --admin-port --authority --data --edge-file --edges --host --insecure --json --linger --link-file
--log --memory --name --port --proxies --quiet --quota --tls --token-file --tokens --upstream --url --uses""",
    "join": """--always --authority --client --evaluate-only --executor --floor --folder --insecure --json --move --name --once
--rounds --token-file --train-only""",
    "node": """--access-file --always --authority --client --data --executor --floor --follow --insecure --json --keep-bytes
--keep-count --keep-days --least --listen --mqtt --mqtt-authority --mqtt-certificate --mqtt-key
--mqtt-password-file --mqtt-topic --mqtt-user --name --time --tls --tls-name --token-file --train-when --watch""",
}
"""The options of the commands whose options stand in groups: none of them may be lost."""


@pytest.mark.parametrize("name", OPTIONS)
def test_a_command_with_groups_of_options_has_all_of_them(name: str) -> None:
    command: Any = typer.main.get_command(cli.app)
    options = [each for each in command.commands[name].params if each.param_type_name == "option"]
    assert sorted(each.opts[0] for each in options if each.opts != ["--help"]) == sorted(OPTIONS[name].split())
    assert all(each.help for each in options), "each says what it is for"
