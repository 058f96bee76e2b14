"""Waiting until a server can open: when a machine starts, the database or the server above an edge may not be ready yet.

    service = once_there(lambda: open_service(bundles, where))

The function that opens the service is called repeatedly, after longer and longer waits, and the log says what is missing. An
error that a person must fix is raised at once.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy.exc import OperationalError

from sumus.logs import logger
from sumus.storage.store import StorageAway
from sumus.transport.transport import Unreachable

LOG = logger("sumus.serve")
T = TypeVar("T")
FIRST, LONGEST = 1.0, 30.0
"""The seconds before the second attempt, and the longest wait between two attempts."""
SAID = 300.0
"""The seconds after which the same reason is logged again."""


def once_there(
    opens: Callable[[], T],
    sleep: Callable[[float], Any] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """Open something as soon as its requirements are available.

    Args:
        opens: Opens it, and leaves nothing behind if it raises.
        sleep: Called with the seconds until the next attempt.
        clock: Returns seconds that never go backwards.

    Returns:
        The result of `opens`.

    Raises:
        SumusError: An error that waiting does not resolve.
    """
    wait, said, since = FIRST, "", clock()
    while True:
        try:
            found = opens()
        except (StorageAway, Unreachable, OperationalError) as error:
            why = str(error).splitlines()[0]
        else:
            if said:
                LOG.warning("what was missing is available now: the start continues")
            return found
        if why != said or clock() - since >= SAID:
            LOG.warning("%s; the start waits, and tries again", why)
            said, since = why, clock()
        sleep(wait)
        wait = min(2 * wait, LONGEST)
