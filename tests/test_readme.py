"""Every command that the README shows runs in a test: here is in which one. Its Python runs in `test_docs.py`."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"

RUN_BY: dict[str, tuple[str, str]] = {
    "pip install": ("tests/operations/test_without_torch.py", "test_a_bundle_is_served_without_torch"),
    "sumus pack": ("tests/test_cli.py", "test_pack_writes_a_bundle_that_names_its_plan"),
    "sumus serve": ("tests/operations/test_serve.py", "subprocess.Popen("),
    "sumus join": ("tests/device/test_real_server.py", '"join"'),
    "sumus status": ("tests/operations/test_commands.py", 'types("status"'),
    "sumus admin export": ("tests/operations/test_commands.py", '"export"'),
    "make demo": ("tests/demos/test_demos.py", "test_the_watch_demo_is_a_server_an_edge_and_a_process_for_each_person"),
    "make faults-short": (".ci/run", "make faults-short"),
    "make faults": (".ci/run", "make faults-short"),  # the same program with other numbers
    "make test": (".ci/run", "make test"),
    ".venv/bin/python -m pytest tests/server/test_same_model.py": (".ci/run", "make test"),
    ".venv/bin/python -m pytest tests/attacks": (".ci/run", "make test"),
    ".venv/bin/python -m benchmarks.week": ("tests/benchmarks/test_week.py", "week.main()"),
    ".venv/bin/python -m benchmarks.peers": ("tests/benchmarks/test_peers.py", "peers.main()"),
}
"""The words that a command begins with → a file that runs the command, and a word of that file."""


def shown() -> list[str]:
    """The commands in the README's shell blocks, and inline code that is one."""
    text = README.read_text(encoding="utf-8")
    lines = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)).splitlines()
    lines += re.findall(r"`((?:sumus|make|pip|\.venv/bin/python) [^`\n]+)`", text)
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("command", shown())
def test_a_test_runs_what_the_readme_shows(command: str) -> None:
    found = [words for words in RUN_BY if command == words or command.startswith(f"{words} ")]
    assert found, "say in RUN_BY which test runs it"
    path, word = RUN_BY[max(found, key=len)]
    assert word in (ROOT / path).read_text(encoding="utf-8")


def test_the_figures_beside_flower_are_those_of_the_results() -> None:
    """Seconds a round and the version, in both languages, as `benchmarks.peers` has written them into the results."""
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    seconds = [
        re.search(rf"^\| w1 \| {name} \| [^|]+ \| ([\d.]+) \|", results, re.MULTILINE) for name in ("sumus", "Flower")
    ]
    ours, theirs = (found[1] for found in seconds if found)
    (version,) = re.findall(r"flwr (\d+\.\d+)\.\d+", results)
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert f"{ours} s in sumus and {theirs} s in Flower {version}" in text
    chinese = (ROOT / "README.zh.md").read_text(encoding="utf-8")
    assert f"sumus 用 {ours} 秒，Flower（{version} 版）用 {theirs} 秒" in chinese
