"""A server's upkeep: it rotates keys, records when devices were last seen, and ends a process that is stuck."""

import asyncio
import faulthandler
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from sumus.errors import SumusError
from sumus.logs import logger
from sumus.operations.service import Service
from sumus.rounds.run import Run
from sumus.server.server import Server
from sumus.storage.keyring import KeyRing
from sumus.wire.messages import Refused

LOG = logger("sumus.upkeep")
STUCK_S = 120.0
"""The seconds after which a decision counts as stuck, and the process ends: it may hold a lock that others wait for."""
EXIT_STUCK = 70
HOUR = 3600.0


def keys_turned(
    ring: KeyRing, runs: Sequence[Run], wrap_again: Callable[[], object] = lambda: None, spare: int = 0
) -> list[int]:
    """Add a key, and destroy the keys that no round needs any more. Call this on the deciding thread.

    Args:
        ring: The key ring.
        runs: The runs, whose open rounds need keys.
        wrap_again: Encrypts the secret that replicas share again, with the newest key; the keys of rounds are not affected.
        spare: The number of newest keys to keep in addition, since another replica, which may see the new key a
            little later, may still use them.

    Returns:
        The ids of the destroyed keys.
    """
    needed = [ring.rotate() - spare]
    wrap_again()
    for each in runs:
        with each.store.transaction() as rows:
            wrapped = [rows.note(row.number, "key") for row in rows.rounds()]
        needed += [ring.id_of(key) for key in wrapped if key is not None]
    return ring.destroy_before(min(needed))


def turn_keys(service: Service) -> None:
    """Rotate the keys, on one of the servers that share the ring."""
    server = service.server
    if server.leads:
        runs = [each for task in server.tasks for each in task.runs]
        keys_turned(service.ring, runs, lambda: service.shared.wrap_again(server.replica.fence), server.replica.shared)


async def keep_house(service: Service, pause: float = HOUR) -> None:
    """Do the upkeep until the task is cancelled.

    At the start and once a day, keys are rotated, and a certificate that expires soon causes a warning. The days on which devices
    were last seen are written once an hour. If a step fails, it is soon tried again.
    """
    hour = 0
    while True:
        try:
            if hour % 24 == 0:
                await service.server.command(lambda now: turn_keys(service))
            await asyncio.to_thread(service.server.roll.write_seen)
        except (SumusError, Refused, OSError, SQLAlchemyError) as error:
            LOG.warning("keys could not be rotated: %s; trying again soon", str(error).splitlines()[0])
            await asyncio.sleep(pause / 60)
        else:
            if service.certificate is not None and hour % 24 == 0:
                service.certificate.warn()
            hour += 1
            await asyncio.sleep(pause)


def watch(server: Server, over: threading.Event, limit: float = STUCK_S, end: Callable[[int], Any] = os._exit) -> None:
    """End the process if one decision takes too long: it may be in a transaction that others wait for."""
    while not over.wait(limit / 20):
        if server.stuck_s > limit:
            LOG.critical(
                "a decision has taken more than %.0f s: the process ends, so that no other process waits for it", limit
            )
            faulthandler.dump_traceback()
            end(EXIT_STUCK)
            return
