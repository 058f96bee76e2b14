"""The files to deploy with start commands that exist, and units that systemd understands."""

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_docs import command_of, commands, options

DEPLOY = Path(__file__).parents[1] / "deploy"
UNITS = sorted(DEPLOY.glob("systemd/*.service"))
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
OURS = {name: service for name, service in COMPOSE["services"].items() if "build" in service}


def exists(words: list[str]) -> None:
    """Whether a command and its options do."""
    name = command_of(words)
    assert name is not None, words
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert not given - options(commands()[name])


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_starts_what_exists_and_systemd_understands_it(unit: Path, tmp_path: Path) -> None:
    (line,) = (line for line in unit.read_text().splitlines() if line.startswith("ExecStart="))
    program, *words = shlex.split(line.partition("=")[2])
    assert program == "/opt/sumus/bin/sumus"
    exists(words)
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    (tmp_path / unit.name).write_text(unit.read_text().replace(program, "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(tmp_path / unit.name)], capture_output=True, text=True)
    assert (done.returncode, [line for line in done.stderr.splitlines() if unit.name in line]) == (0, [])


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_never_gives_up(unit: Path) -> None:
    head, _, service = unit.read_text().partition("[Service]")
    assert "StartLimitIntervalSec=0" in head.splitlines()
    assert {"Restart=on-failure", "RestartSec=5"} <= set(service.splitlines())


@pytest.mark.parametrize("name", OURS)
def test_a_container_starts_what_exists_with_what_it_is_given(name: str) -> None:
    service = OURS[name]
    exists(service["command"])
    assert all(
        source.partition(":")[0] in COMPOSE["volumes"] or source.startswith("./") for source in service["volumes"]
    )
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"])


def test_the_container_has_the_servers_extra_and_is_nobodys_root() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    assert any("--require-hashes" in line and "-r /requirements.txt" in line for line in lines)
    assert all("--no-deps" in line or "--require-hashes" in line for line in lines if "pip install" in line)
    assert [line for line in lines if line.startswith("USER")] == ["USER sumus"]
