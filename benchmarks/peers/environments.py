"""A Python environment for each peer, made once and kept: the pinned versions of peers conflict with each other, and
with ours."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
TORCH = "torch==2.13.0"
KEPT = Path("~/.cache/sumus-benchmarks").expanduser()

_NEEDS = """
import sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
name, extra, *loosened = sys.argv[1:]
for need in map(Requirement, requires(name)):
    if need.marker is None or need.marker.evaluate({"extra": extra}):
        extras = f"[{','.join(need.extras)}]" if need.extras else ""
        print(need.name + extras + ("" if need.name in loosened else str(need.specifier)))
"""


class EnvironmentAbsent(Exception):
    """A peer's environment could not be made; the message says why."""


@dataclass(frozen=True)
class Environment:
    """What a peer is installed from.

    Attributes:
        name: Its name.
        requirements: Pinned requirements for pip.
        torch: Whether it gets our torch, as in constraints.txt.
        shown: The distributions that a caption names.
        loosened: Packages that the first requirement wants newer than an index may have, and runs without.
    """

    name: str
    requirements: tuple[str, ...]
    torch: bool
    shown: tuple[str, ...]
    loosened: tuple[str, ...] = ()


FLOWER = Environment("flower", ("flwr[simulation]==1.42.0",), True, ("flwr", "ray"), loosened=("certifi",))
PFL = Environment("pfl", ("pfl==0.6.0",), True, ("pfl",))
FEDJAX = Environment("fedjax", ("fedjax==0.0.17", "jax==0.10.2"), False, ("fedjax", "jax"))


def prepare(environment: Environment, folder: Path, watch: Callable[[str], None]) -> Path:
    """Return the environment's Python. The environment is installed if it is missing or differs from its description."""
    place, recipe = folder / environment.name, f"{environment}\n{TORCH}\n{sys.version}"
    python, ready = place / "bin" / "python", place / "ready"
    if ready.exists() and ready.read_text() == recipe:
        return python
    watch(f"{environment.name}: installing")
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(place)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    fixed = [TORCH] if environment.torch else []
    if fixed:
        _run([*pip, "-c", str(CONSTRAINTS), *fixed, "numpy"])
    try:
        _run([*pip, *fixed, *environment.requirements])
    except EnvironmentAbsent:
        if not environment.loosened:
            raise
        first, *others = environment.requirements
        name, extra, version = re.fullmatch(r"([\w-]+)(?:\[(\w+)\])?(.*)", first).groups()
        _run([*pip, "--no-deps", f"{name}{version}"])
        needs = _run([str(python), "-c", _NEEDS, name, extra or "", *environment.loosened]).split()
        _run([*pip, *fixed, *needs, *others])
    ready.write_text(recipe)
    return python


def versions(environment: Environment, python: Path) -> list[str]:
    """Return the versions of the distributions that a caption names."""
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    found = _run([str(python), "-c", code, *environment.shown]).split()
    return [f"{name} {version}" for name, version in zip(environment.shown, found, strict=True)]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or done.stderr.splitlines()
        reason = (said or ["no reason given"])[0].removeprefix("ERROR: ").partition(" (from versions")[0]
        raise EnvironmentAbsent(reason)
    return done.stdout
