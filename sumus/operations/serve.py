"""`sumus serve`: a server as a process, from opening its folder to its last answer.

    sumus.serve(plan, storage="DIR")                              runs until Ctrl-C
    sumus.serve(
        "PLAN.sumus",
        storage=sumus.Storage("DIR", keys="/other/volume/keys"),
        listen=sumus.Listening("0.0.0.0", tls="auto", names=["fl.example"]),
        policy=sumus.ServerPolicy(quota=10_000),
        startup=sumus.Startup(tokens=100, token_file="LINKS"),
    )

A server that is told to stop accepts no new requests, answers those that wait, and commits the reports that were sent. If it
ends in any other way, all acknowledged data are safe.
"""

import asyncio
import gc
import logging
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import uvloop

from sumus.errors import UsageError
from sumus.http.listening import Listening, Planes, expect_no_loop, opened_at, told_to_stop
from sumus.http.tls import enrolment_link
from sumus.logs import Form, log_to, logger
from sumus.operations.policy import ServerPolicy
from sumus.operations.progress import ServerOpened, ServerProgress, spoken
from sumus.operations.service import Service, open_service
from sumus.operations.stores import Storage, make_private
from sumus.operations.upkeep import keep_house, watch
from sumus.operations.waiting import once_there
from sumus.plan import Plan
from sumus.server.access import Access, login_link
from sumus.server.admin_plane import admin_app
from sumus.server.status import mode_of
from sumus.storage.files import write_whole
from sumus.terminal import echo
from sumus.transport.hosts import listen_address
from sumus.wire.bundle import Bundle
from sumus.wire.messages import Refused

LOG = logger("sumus.serve")
MOST_BEHIND_AN_EDGE = 10_000
"""The maximum number of devices behind one edge, for an edge that enrols with a link made at startup."""

What: TypeAlias = Plan | Bundle | str | Path
"""A plan with its task's code, a bundle, or a bundle's file."""


@dataclass(frozen=True)
class Startup:
    """A server's actions when it starts, and when it stops.

    Attributes:
        tokens: The number of links for devices that the server makes.
        uses: The number of devices that may enrol with each of these links.
        token_file: The file to which these links are written, one per line; None if they are shown to the operator instead.
        rounds: The number of models after which the server stops; None for never.
        edges: The number of links for edges that the server makes, each for one edge.
        edge_file: The file to which the links for edges are written, one per line.
        say: Called with each line of progress; None for silence.
        ready: Called once both planes answer.
    """

    tokens: int = 0
    uses: int = 1
    token_file: Path | None = None
    rounds: int | None = None
    edges: int = 0
    edge_file: Path | None = None
    say: Callable[[str], None] | None = None
    ready: Callable[[ServerOpened], None] | None = None

    def __post_init__(self) -> None:
        for name in ("token_file", "edge_file"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, Path(value))


HERE, USUAL, AS_IT_IS = Listening(), ServerPolicy(), Startup()


def serve(
    *what: What,
    storage: Storage | str | Path | None = None,
    listen: Listening | str = HERE,
    policy: ServerPolicy = USUAL,
    startup: Startup = AS_IT_IS,
    seed: int = 0,
    log: Form = "text",
    quiet: bool = False,
) -> None:
    """Serve tasks until the process is told to stop, or until each has `startup.rounds` models.

    Args:
        what: Plans from your own file, bundles, or bundle files. Each is a task under its own name.
        storage: The location of the server's data, or just its folder; None for memory, which is lost when the process ends.
        listen: The addresses for devices and the operator; "HOST:PORT" is short for `Listening(host, port)`.
        policy: The rules by which the server runs its tasks.
        startup: The links that it makes at startup, and when it stops. By default, progress and links are printed.
        seed: The seed for a plan's first model.
        log: The format of the log on standard error.
        quiet: Whether to print no progress.

    Raises:
        UsageError: Options do not fit together, or others could read the traffic.
        ExperimentError: The server cannot be opened.
    """
    expect_no_loop("a server", "`sumus serve`")
    handler = log_to(sys.stderr, log)
    try:
        run(
            bundles_of(what, seed),
            storage if isinstance(storage, Storage) else Storage(None if storage is None else Path(storage)),
            policy,
            Listening(*listen_address(listen)) if isinstance(listen, str) else listen,
            replace(
                startup,
                say=None if quiet else startup.say or echo,
                ready=startup.ready or _show,
            ),
        )
    finally:
        logging.getLogger().removeHandler(handler)


def _show(opened: ServerOpened) -> None:
    """Print how to connect to a server."""
    echo(*opened.shown())


def bundles_of(what: Sequence[What], seed: int = 0) -> dict[str, Bundle]:
    """Make bundles from plans, and read bundle files; return them by task."""
    if not what:
        raise UsageError("there is nothing to serve: give a plan, or the file of a bundle")
    found: dict[str, Bundle] = {}
    for each in what:
        bundle = each if isinstance(each, Bundle) else _planned(each, seed) if isinstance(each, Plan) else _read(each)
        name = bundle.plan.description.name
        if name in found:
            raise UsageError(f"two tasks are called {name!r}: give one of them another Task(name=)")
        found[name] = bundle
    return found


def _planned(plan: Plan, seed: int) -> Bundle:
    plan = plan.for_devices()
    plan.check_deployable(spools=True)
    task: Any = plan.task
    if task is plan.description:
        raise UsageError("this plan was read from JSON and has no first model: serve the bundle that contained it")
    from sumus.training.program import Program

    return Bundle(plan, Program(task, seed=seed).initial)


def _read(path: str | Path) -> Bundle:
    try:
        return Bundle.from_bytes(Path(path).read_bytes())
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror or error}; make a bundle with `sumus pack`"
        ) from error
    except UsageError as error:
        if type(error) is not UsageError:
            raise
        raise UsageError(f"{path}: {error}") from error


def run(
    bundles: Mapping[str, Bundle], storage: Storage, policy: ServerPolicy, listen: Listening, startup: Startup
) -> None:
    """Run a server until the process is told to stop."""
    keep(lambda authority: open_service(bundles, storage, policy, authority), storage.data, listen, startup)


def keep(opens: Callable[[bytes | None], Service], data: Path | None, listen: Listening, startup: Startup) -> None:
    """Open a service, and keep it running until the process is told to stop.

    Args:
        opens: Opens the service. Its argument is the certificate (PEM) that devices pin, if it was made here; else None.
        data: The service's folder; None for a folder that is deleted when the process ends.
        listen: The addresses at which the service answers.
        startup: The service's actions when it starts, and when it stops.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # each device that waits holds a file open
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with ExitStack() as stack:
        folder = data or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sumus-")))
        make_private(folder)
        at = stack.enter_context(opened_at(listen, folder / "tls"))
        over = threading.Event()
        stack.callback(over.set)
        service = once_there(lambda: opens(at.authority))
        stack.callback(service.close)
        service.certificate = at.certificate
        access = Access(folder / "admin")
        write_whole(folder / "admin" / "url", at.admin_url.encode(), private=True)
        threading.Thread(target=watch, args=(service.server, over), name="watchdog", daemon=True).start()

        def invite(token: str) -> str:
            return enrolment_link(at.url, token, at.pin)

        def links(count: int, uses: int = 1, speaks_for: int = 0) -> str:
            """Make new links, one a line."""
            server = service.server
            tokens = server.roll.new_tokens(count, server.population, server.clock(), uses=uses, speaks_for=speaks_for)
            return "\n".join(map(invite, tokens))

        def opened() -> ServerOpened:
            enrolment = links(startup.tokens, startup.uses) if startup.tokens else None
            if enrolment is not None and startup.token_file is not None:
                write_whole(startup.token_file, f"{enrolment}\n".encode(), private=True)
                enrolment = None
            if startup.edges and startup.edge_file is not None:
                made = links(startup.edges, speaks_for=MOST_BEHIND_AN_EDGE)
                write_whole(startup.edge_file, f"{made}\n".encode(), private=True)
            tasks = {task.name: task.runs[0].plan_body.sha256 for task in service.server.tasks}
            login = login_link(at.admin_url, access.new_code(time.time()))
            mode, notes = mode_of(service.server), (*at.notes, *service.notes)
            return ServerOpened(at.url, mode, at.admin_url, login, enrolment, at.pin, tasks, notes)

        planes = at.planes(service.device_app, admin_app(service, access, invite, at.names))
        say = stack.enter_context(spoken(startup.say))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_answer(service, planes, startup, say, opened))


@contextmanager
def _spared_collections() -> Generator[None, None, None]:
    """While the `with` block runs, exclude the objects that a server's startup has made from garbage collection.

    They live as long as the server. A full collection would otherwise visit all of them: the server would pause for 90 ms, again
    and again under a flood of requests.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


async def _answer(
    service: Service,
    planes: Planes,
    startup: Startup,
    say: Callable[[str], None],
    opened: Callable[[], ServerOpened],
) -> None:
    """Run both planes until the server is told to stop. Until it has recovered, they answer "not ready"."""
    server, over = service.server, asyncio.Event()
    loop = asyncio.get_running_loop()

    def end() -> None:
        if over.is_set():
            planes.hurry()
        over.set()

    def enough() -> None:
        with suppress(RuntimeError):  # the loop has ended already
            loop.call_soon_threadsafe(over.set)

    with told_to_stop(loop, end):
        async with planes:
            try:
                await asyncio.to_thread(service.start)
            except Refused as refused:
                LOG.error("not ready yet: %s; trying again", refused.problem.detail)
            progress = ServerProgress(server, say, startup.rounds, enough)
            server.listeners.append(progress.look)
            house = asyncio.create_task(keep_house(service))
            try:
                found = await asyncio.to_thread(opened)
                if startup.ready is not None:
                    startup.ready(found)
                with _spared_collections():
                    await over.wait()
                say("stopping: waiting requests are answered, and the reports that were sent are committed")
            finally:
                house.cancel()
                server.drain()
