"""The suite is a specification: a file a module, deterministic, without sleeps, without network.

`--hypothesis-profile deep` looks further and elsewhere each time.
"""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.services import postgresql

settings.register_profile("sumus", derandomize=True, database=None, deadline=None, max_examples=60)
settings.register_profile("deep", derandomize=False, database=None, deadline=None, max_examples=3000)
settings.load_profile("sumus")


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A PostgreSQL server's URL."""
    with postgresql() as url:
        yield url


@pytest.fixture(autouse=True, scope="session")
def nothing_remembered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What executors were probed for another suite, or for the developer, does not count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
