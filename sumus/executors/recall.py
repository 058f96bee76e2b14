"""Remember in a file of the user which executor was the fastest on this machine, for each step and its shapes."""

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from sumus.errors import SumusError, UsageError
from sumus.executors.executor import ClientAssignment
from sumus.rng import key
from sumus.spec import canonical_json, to_json
from sumus.storage.files import user_folder, write_whole
from sumus.training.program import Program
from sumus.work import ClientWork


class Recall:
    """Earlier choices on this machine, in a file. A file that cannot be read or written is ignored."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def get(self, where: str) -> Mapping[str, Any] | None:
        """Return the choice stored under a key; None if there is none."""
        found = self._all().get(where)
        if not isinstance(found, dict):
            return None
        kept = cast(dict[str, Any], found)
        well = isinstance(kept.get("choice"), str) and isinstance(kept.get("reason"), str)
        return kept if well and isinstance(kept.get("seconds"), float) else None

    def put(self, where: str, value: Mapping[str, Any]) -> None:
        """Store a choice. If two processes write at the same time, one choice may be lost; a later run makes it again."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, json.dumps({**self._all(), where: value}, indent=1).encode())
        except (OSError, SumusError):
            pass

    def _all(self) -> dict[str, Any]:
        try:
            found: object = json.loads(self._path.read_bytes()) if self._path is not None else None
        except (OSError, ValueError):
            return {}
        return cast(dict[str, Any], found) if isinstance(found, dict) else {}


def recall_of_this_user() -> Recall:
    """Return the choices in the user's cache folder."""
    try:
        folder = user_folder("XDG_CACHE_HOME", ".cache", "nothing is remembered")
    except UsageError:
        return Recall(None)
    return Recall(folder / "sumus" / "executors.json")


def where_of(program: Program, work: ClientWork, client: ClientAssignment) -> str:
    """Return the key of a choice: a hash of the step, the shapes, the version of torch and the machine."""
    step = {
        "task": program.description.fingerprint,
        "loss": program.description.loss,
        "model": repr(program.module),
        "work": to_json(work),
        "inputs": [*client.inputs.shape[1:], work.batch_size or len(client.inputs)],
        "device": str(program.device),
        "torch": version("torch"),
        "machine": [platform.machine(), _processor(), os.cpu_count()],
    }
    return key(canonical_json(step)).hex()[:32]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
