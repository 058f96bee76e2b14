"""`sumus serve`: a server as a process, from opening its folder to its last answer.

    sumus.serve(plan, data="DIR")                              until Ctrl-C
    sumus.serve("PLAN.sumus", data="DIR", host="0.0.0.0", tls="auto", names=["fl.example"], tokens=100, token_file="LINKS")

It stops as it began: nobody new is let in, who waits is answered, what was sent is committed. Whatever ends it otherwise loses
nothing that was acknowledged.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import uvloop

from sumus.errors import UsageError
from sumus.http.listening import Listening, Planes, expect_no_loop, opened_at, told_to_stop
from sumus.http.tls import enrolment_link
from sumus.logs import Form, log_to, logger
from sumus.operations.access import Access, login_link
from sumus.operations.admin_plane import admin_app
from sumus.operations.progress import ServerOpened, ServerProgress, spoken
from sumus.operations.service import ServerPolicy, Service, Storage, make_private, open_service
from sumus.operations.status import mode_of
from sumus.operations.upkeep import keep_house, watch
from sumus.operations.waiting import once_there
from sumus.plan import Plan
from sumus.server.evaluation import Evaluating
from sumus.storage.files import write_whole
from sumus.terminal import echo
from sumus.wire.bundle import Bundle
from sumus.wire.messages import Refused

LOG = logger("sumus.serve")
MOST_BEHIND_AN_EDGE = 10_000
"""Devices that an edge may speak for, that enrolled with a link made at a start."""

What: TypeAlias = Plan | Bundle | str | Path
"""A plan with its task's code, a bundle, or a bundle's file."""


@dataclass(frozen=True)
class Startup:
    """What a server says, and whom it lets in.

    Args:
        tokens: Links for devices that it makes when it begins.
        uses: Devices that each of these links lets in.
        token_file: Where these links are written, one a line; they are printed if None.
        rounds: Models after which it stops; None for never.
        edges: Links for edges that it makes when it begins, each for one edge.
        edge_file: Where these are written, one a line.
        say: Is told a line of progress; None for silence.
        ready: Is called once both planes answer.
    """

    tokens: int = 0
    uses: int = 1
    token_file: Path | None = None
    rounds: int | None = None
    edges: int = 0
    edge_file: Path | None = None
    say: Callable[[str], None] | None = None
    ready: Callable[[ServerOpened], None] = field(default=lambda opened: None)


def serve(
    *what: What,
    data: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    admin_host: str = "127.0.0.1",
    admin_port: int = 8081,
    database: str | None = None,
    keys: str | Path | None = None,
    blobs: str | None = None,
    tls: str | Path | Sequence[str | Path] = (),
    names: Sequence[str] = (),
    url: str | None = None,
    proxies: str = "",
    insecure: bool = False,
    population: str = "default",
    quota: int = 1_000_000,
    memory: int = 256,
    evaluate: int | None = None,
    every: int = 1,
    promote: Literal["auto", "manual"] = "auto",
    warm_start: bool = False,
    spool: bool = False,
    priority: Mapping[str, int] = {},
    tokens: int = 0,
    uses: int = 1,
    token_file: str | Path | None = None,
    rounds: int | None = None,
    seed: int = 0,
    log: Form = "text",
    quiet: bool = False,
) -> None:
    """Serve tasks until the process is told to stop, or each has `rounds` models.

    what: a plan of your own file, a bundle, or the file of one; each a task, by its name.
    data: the server's folder; None for memory, which is gone with the process.  database: a URL, by default SQLite in it.
    keys: a folder for the key ring, better on another volume.  blobs: a folder or a URL for models and sums.
    host, port, admin_host, admin_port: where devices and the admin find it, port 0 for any.  tls: "auto", or a certificate's
    chain and its key.  names: host names and addresses that devices and the admin use.  url: what devices call it, behind a
    proxy.  proxies: addresses and networks of proxies that are believed about who asks, on the devices' port.
    insecure: without TLS also where others reach it.
    population, quota: who may enrol, and how many.  memory: MiB for reports on their way.
    evaluate: devices that measure a model, every so many versions.
    promote: whether devices answer with a new model at once.  warm_start, spool, priority: see
    `ServerPolicy`.
    tokens, uses: make so many links for devices, each for so many of them, and print the links, or write them to token_file,
    one a line.
    seed: of a plan's first model.  log: "text" or "json", on standard error.
    """
    expect_no_loop("a server", "`sumus serve`")
    pair = [tls] if isinstance(tls, str | Path) else list(tls)
    conduct = ServerPolicy(
        population,
        quota,
        None if evaluate is None else Evaluating(evaluate, every),
        promote == "auto",
        warm_start,
        spool,
        dict(priority),
        memory * 2**20,
    )
    say = None if quiet else echo
    handler = log_to(sys.stderr, log)
    try:
        run(
            bundles_of(what, seed),
            Storage(None if data is None else Path(data), database, None if keys is None else Path(keys), blobs),
            conduct,
            Listening(host, port, admin_host, admin_port, pair, names, url, proxies, insecure),
            Startup(
                tokens,
                uses,
                None if token_file is None else Path(token_file),
                rounds,
                say=say,
                ready=lambda opened: echo(*opened.shown()),
            ),
        )
    finally:
        logging.getLogger().removeHandler(handler)


def bundles_of(what: Sequence[What], seed: int = 0) -> dict[str, Bundle]:
    """Tasks by name."""
    if not what:
        raise UsageError("there is nothing to serve: give a plan, or the file of a bundle")
    found: dict[str, Bundle] = {}
    for each in what:
        bundle = each if isinstance(each, Bundle) else _planned(each, seed) if isinstance(each, Plan) else _read(each)
        name = bundle.plan.description.name
        if name in found:
            raise UsageError(f"two tasks are called {name!r}: give one another Task(name=)")
        found[name] = bundle
    return found


def _planned(plan: Plan, seed: int) -> Bundle:
    plan = plan.for_devices()
    plan.check_deployable(spools=True)
    task: Any = plan.task
    if task is plan.description:
        raise UsageError("this plan was read from JSON and has no first model: serve the bundle that it came in")
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


def run(bundles: Mapping[str, Bundle], where: Storage, conduct: ServerPolicy, listen: Listening, tell: Startup) -> None:
    """Serve, until the process is told to stop."""
    keep(lambda authority: open_service(bundles, where, conduct, authority), where.data, listen, tell)


def keep(opens: Callable[[bytes | None], Service], data: Path | None, listen: Listening, tell: Startup) -> None:
    """Open a service, and keep it running until the process is told to stop. opens: given the certificate that devices pin, where
    it is made here.  data: its folder; None for one that goes with the process."""
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
            """New links, one a line."""
            server = service.server
            tokens = server.roll.new_tokens(count, server.population, server.clock(), uses=uses, speaks_for=speaks_for)
            return "\n".join(map(invite, tokens))

        def opened() -> ServerOpened:
            enrolment = links(tell.tokens, tell.uses) if tell.tokens else None
            if enrolment is not None and tell.token_file is not None:
                write_whole(tell.token_file, f"{enrolment}\n".encode(), private=True)
                enrolment = None
            if tell.edges and tell.edge_file is not None:
                made = links(tell.edges, speaks_for=MOST_BEHIND_AN_EDGE)
                write_whole(tell.edge_file, f"{made}\n".encode(), private=True)
            tasks = {task.name: task.runs[0].plan_body.sha256 for task in service.server.tasks}
            login = login_link(at.admin_url, access.new_code(time.time()))
            mode, notes = mode_of(service.server), (*at.notes, *service.notes)
            return ServerOpened(at.url, mode, at.admin_url, login, enrolment, at.pin, tasks, notes)

        planes = at.planes(service.device_app, admin_app(service, access, invite, at.names))
        say = stack.enter_context(spoken(tell.say))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_answer(service, planes, tell, say, opened))


@contextmanager
def _spared_collections() -> Generator[None, None, None]:
    """Take what the start of a server has made out of the garbage collector's sight, for the length of a block.

    It lives as long as the server. A full collection would else visit all of it: 90 ms in which nobody is answered, again and
    again under a flood of requests.
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
    tell: Startup,
    say: Callable[[str], None],
    opened: Callable[[], ServerOpened],
) -> None:
    """Both planes, from the first answer to the last. Until the server has recovered, that is "not ready"."""
    server, over = service.server, asyncio.Event()
    loop = asyncio.get_running_loop()

    def end() -> None:
        if over.is_set():
            planes.hurry()
        over.set()

    def enough() -> None:
        with suppress(RuntimeError):  # it is over already
            loop.call_soon_threadsafe(over.set)

    with told_to_stop(loop, end):
        async with planes:
            try:
                await asyncio.to_thread(service.start)
            except Refused as refused:
                LOG.error("not ready yet: %s; trying again", refused.problem.detail)
            progress = ServerProgress(server, say, tell.rounds, enough)
            server.listeners.append(progress.look)
            house = asyncio.create_task(keep_house(service))
            try:
                tell.ready(await asyncio.to_thread(opened))
                with _spared_collections():
                    await over.wait()
                say("stopping: who waits is answered, and what was sent is committed")
            finally:
                house.cancel()
                server.drain()
