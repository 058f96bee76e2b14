"""What a deployment is made of: known by hash, listed, without known holes at its floors; and a wheel that is the same twice."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement
from packaging.version import Version

from sumus.errors import EXTRAS, needs

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
NO_HOLE = {
    "starlette": "1.3.1",
    "urllib3": "2.7",
    "cryptography": "46.0.7",
    "torch": "2.6",
    "ray": "2.52",
    "setuptools": "78.1.1",
}
"""Releases that mended the last hole that is known to concern sumus."""


def named(word: str) -> str:
    return re.sub(r"[-_.]+", "-", word).lower()


def pins(text: str) -> dict[str, str]:
    """Versions by name, of lines `name==version`."""
    return {named(name): version for name, version in re.findall(r"^([\w.-]+)==([\w.+-]+)", text, re.MULTILINE)}


LOCKED = pins((ROOT / "deploy" / "requirements.txt").read_text())


def all_requirements() -> Iterator[Requirement]:
    groups = [PROJECT["build-system"]["requires"], PROJECT["project"]["dependencies"]]
    for group in [*groups, *PROJECT["project"]["optional-dependencies"].values()]:
        yield from map(Requirement, group)


@pytest.mark.parametrize("name", NO_HOLE)
def test_a_floor_admits_no_release_with_a_known_hole(name: str) -> None:
    floors = [
        spec.version
        for one in all_requirements()
        if one.name == name
        for spec in one.specifier
        if spec.operator == ">="
    ]
    assert floors
    assert all(Version(floor) >= Version(NO_HOLE[name]) for floor in floors)


def behind(requirement: Requirement, seen: set[str]) -> None:
    """Add the names of a requirement, and of all that it needs here."""
    if requirement.name == "sumus" or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
        return
    for extra in ("", *requirement.extras):
        if (key := f"{named(requirement.name)}[{extra}]") not in seen:
            seen.add(key)
            for line in requires(requirement.name) or ():
                one = Requirement(line)
                if one.marker is None or one.marker.evaluate({"extra": extra}):
                    behind(Requirement(line.partition(";")[0]), seen)


DISTRIBUTIONS = {
    "PIL": "pillow", "sklearn": "scikit-learn", "paho": "paho-mqtt", "prometheus_client": "prometheus-client",
}  # fmt: skip


@pytest.mark.parametrize("module", EXTRAS)
def test_what_is_missing_is_said_with_the_extra_that_brings_it(module: str) -> None:
    brought = {named(Requirement(line).name) for line in PROJECT["project"]["optional-dependencies"][EXTRAS[module]]}
    assert DISTRIBUTIONS.get(module, module) in brought
    said = needs(ModuleNotFoundError(f"No module named {module!r}", name=f"{module}.inner"))
    assert f"pip install '.[{EXTRAS[module]}]' in a checkout" in said
    assert "pip install 'WHEEL[server,train]'" in needs(ModuleNotFoundError(name=module), "server,train")
    assert needs(ModuleNotFoundError("No module named 'mine'", name="mine")) == ""


COMMANDS = {
    "server": ("sumus.operations.serve", "sumus.operations.remote", "sumus.operations.backup", "sumus.edge.edge"),
    "device": ("sumus.device.device", "sumus.device.training", "sumus.simulator.simulate"),
    "node": ("sumus.node.node", "sumus.device.training"),
}
"""By extra, what its commands import."""


@pytest.mark.parametrize("extra", COMMANDS)
def test_an_extra_brings_all_that_its_commands_import(extra: str) -> None:
    """In a process that finds none of the packages which other extras bring."""
    seen: set[str] = set()
    try:
        for line in PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"][extra]:
            behind(Requirement(line), seen)
        if extra != "server":  # they name each other, as sumus[train] and sumus[device]
            for other in ("train", "device"):
                for line in PROJECT["project"]["optional-dependencies"][other]:
                    behind(Requirement(line), seen)
    except PackageNotFoundError as missing:
        pytest.skip(f"{missing.name} is not installed")
    brought = {name.partition("[")[0] for name in seen}
    hidden = sorted(module for module in EXTRAS if DISTRIBUTIONS.get(module, module) not in brought)
    assert hidden, "control: something is hidden"
    code = (
        f"import sys\nfor name in {hidden}: sys.modules[name] = None\nfor name in {COMMANDS[extra]}: __import__(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_all_that_a_server_needs_is_known_by_its_hash() -> None:
    text = (ROOT / "deploy" / "requirements.txt").read_text()
    parts = re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]
    assert len(parts) == len(LOCKED)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}\b", part) for part in parts)
    seen: set[str] = set()
    try:
        for line in PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["server"]:
            behind(Requirement(line), seen)
    except PackageNotFoundError as missing:
        pytest.skip(f"{missing.name} is not installed")
    assert {name.partition("[")[0] for name in seen} <= LOCKED.keys()
    assert "torch" not in LOCKED


def test_a_deployment_has_the_versions_that_are_tested() -> None:
    tested = pins((ROOT / "constraints.txt").read_text())
    assert {name: tested.get(name) for name in LOCKED} == LOCKED
    for one in all_requirements():
        version = tested.get(named(one.name))
        assert version is None or one.specifier.contains(version), one
    assert {named(one.name) for one in all_requirements()} - tested.keys() <= {"sumus", "pyright", "uvloop", "ray"}


def test_the_list_of_a_deployment_is_one_of_cyclonedx(tmp_path: Path) -> None:
    command = ["-W", "ignore::UserWarning", "-m", "cyclonedx_py", "requirements", "deploy/requirements.txt"]
    more = ["--pyproject", "pyproject.toml", "--output-reproducible", "--no-validate", "--output-file"]
    subprocess.run(
        [sys.executable, *command, *more, str(tmp_path / "list.json")], cwd=ROOT, check=True, capture_output=True
    )
    text = (tmp_path / "list.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str('{"bomFormat": "CycloneDX"}') is not None
    listed = json.loads(text)
    root = listed["metadata"]["component"]
    assert (root["name"], root["version"]) == ("sumus", PROJECT["project"]["version"])
    assert {named(one["name"]): one["version"] for one in listed["components"]} == LOCKED
    assert all(one["externalReferences"][0]["hashes"] for one in listed["components"])


def test_the_wheel_of_a_commit_is_the_same_bytes_twice(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository")
    found: list[str] = []
    for umask, zone in ((0o022, "UTC"), (0o077, "Asia/Tokyo")):
        out = tmp_path / zone.replace("/", "-")
        subprocess.run(
            [str(ROOT / "deploy" / "wheel.sh"), str(out)],
            cwd=ROOT,
            env={**os.environ, "PYTHON": sys.executable, "TZ": zone, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
            umask=umask,
            check=True,
            capture_output=True,
        )
        (wheel,) = out.glob("*.whl")
        found.append(sha256(wheel.read_bytes()).hexdigest())
    assert found[0] == found[1]
