"""Settings of the test suite. The suite is a specification: one file for each module, deterministic, without sleeps or
network.

`--hypothesis-profile deep` tries more examples, and other ones each time.
"""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.services import postgresql

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell without job control ignores SIGINT in background jobs, and children inherit this. The tests of Ctrl-C send
    # SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("sumus", derandomize=True, database=None, deadline=None, max_examples=60)
settings.register_profile("deep", derandomize=False, database=None, deadline=None, max_examples=3000)
settings.load_profile("sumus")


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Yield the URL of a PostgreSQL server."""
    with postgresql() as url:
        yield url


@pytest.fixture(autouse=True, scope="session")
def nothing_remembered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use an empty cache folder, so that an executor chosen for another suite or for the developer is not used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let trackers write into a folder, and send nothing."""
    for name, value in {
        "MLFLOW_TRACKING_URI": f"file:{tmp_path}/mlruns",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
        "DO_NOT_TRACK": "1",
    }.items():
        monkeypatch.setenv(name, value)
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # ends the process that writes
