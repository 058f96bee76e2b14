"""Waits until a server can open: when a machine starts, the database or the server above an edge may not be there yet.

    service = once_there(lambda: open_service(bundles, where))

The function that opens the service is called again and again, each time a little later, and the log says what is missing. An
error that a person must mend is raised at once.
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
"""Seconds until the second attempt, and between two attempts at most."""
SAID = 300.0
"""Seconds after which the same reason is said again."""


def once_there(
    opens: Callable[[], T],
    sleep: Callable[[float], Any] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """Open something as soon as what it needs is there.

    Args:
        opens: Opens it, and leaves nothing behind if it raises.
        sleep: Is given the seconds until the next attempt.
        clock: Seconds that do not go back.

    Returns:
        What was opened.

    Raises:
        SumusError: Something that waiting does not mend.
    """
    wait, said, since = FIRST, "", clock()
    while True:
        try:
            found = opens()
        except (StorageAway, Unreachable, OperationalError) as error:
            why = str(error).splitlines()[0]
        else:
            if said:
                LOG.warning("it is there now: the start goes on")
            return found
        if why != said or clock() - since >= SAID:
            LOG.warning("%s; the start waits for that, and tries again and again", why)
            said, since = why, clock()
        sleep(wait)
        wait = min(2 * wait, LONGEST)
