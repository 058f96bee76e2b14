"""One contract for what carries requests: what was said arrives, and an answer comes whole or not at all."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sumus.device.link import Link, fetch_authority
from sumus.errors import ExperimentError, PlanError
from sumus.http.tls import Certificates, issue
from sumus.rng import generator
from sumus.transport.faulty import Faults, FaultyTransport
from sumus.transport.http import HttpTransport, unverified
from sumus.transport.inprocess import InProcess
from sumus.transport.transport import Transport, Unreachable
from tests.transport.echoing import Echo, answer, listening

NOW = partial(datetime.now, UTC)


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture(params=["http", "in process", "faulty without faults"])
def transport(request: pytest.FixtureRequest, echo: Echo) -> Iterator[Transport]:
    if request.param == "http":
        with listening(echo) as port:
            over_http = HttpTransport(f"http://127.0.0.1:{port}")
            yield over_http
            over_http.close()
        return
    inner = InProcess(echo)
    yield inner if request.param == "in process" else FaultyTransport(inner, Faults(), generator(0))
    inner.close()
    assert echo.ended == 1


@pytest.mark.parametrize("body", [b"", b"{}", bytes(300_000)], ids=["none", "short", "long"])
@pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
def test_what_was_said_arrives(transport: Transport, echo: Echo, method: str, body: bytes) -> None:
    body = b"" if method == "GET" else body
    answer = transport.request(method, "/some/path?a=b%20c", body, {"X-Mine": "mine"})
    said = json.loads(answer.body)
    assert (answer.status, answer.headers["x-yours"]) == (207, "yes")
    assert said == {
        "method": method,
        "path": "/some/path",
        "query": "a=b%20c",
        "mine": "mine",
        "length": None if method == "GET" else str(len(body)),
        "bytes": len(body),
    }
    assert echo.bodies == [body]


def test_redirections_are_answers_like_others(transport: Transport) -> None:
    answer = transport.request("GET", "/moved")
    assert (answer.status, answer.headers["location"], answer.body) == (302, "/echo", b"elsewhere")


def test_no_more_is_read_than_was_asked_for(transport: Transport) -> None:
    assert len(transport.request("GET", "/long?100000", most=100_000).body) == 100_000
    with pytest.raises(Unreachable, match="longer than the limit of 100.0 kB|more than 100.0 kB"):
        transport.request("GET", "/long?100000", most=99_999)
    assert transport.request("GET", "/echo").status == 207


def test_who_waits_in_vain_is_told_and_so_is_the_server(transport: Transport, echo: Echo) -> None:
    with pytest.raises(Unreachable):
        transport.request("GET", "/never", patience=0.2)
    assert echo.left.wait(20)
    assert transport.request("GET", "/echo").status == 207


def test_an_answer_that_is_cut_off_is_none(transport: Transport) -> None:
    with pytest.raises(Unreachable, match="cut off"):
        transport.request("GET", "/cut")
    assert transport.request("GET", "/echo").status == 207


def test_a_defect_of_the_server_is_an_answer(transport: Transport) -> None:
    assert transport.request("POST", "/fails").status == 500


def test_several_ask_at_once(transport: Transport) -> None:
    """The server answers none of four before all of them have asked."""
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: transport.request("GET", "/meet").body, range(4)))
    assert answers == [b"met"] * 4


# ── over HTTP ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_where_nobody_listens_nobody_is_reached() -> None:
    with listening(Echo()) as port:
        pass
    with pytest.raises(Unreachable, match=f"http://127.0.0.1:{port} cannot be reached: nothing listens there"):
        HttpTransport(f"http://127.0.0.1:{port}").request("GET", "/")


def test_a_certificate_must_come_from_the_authority_that_is_named_and_from_no_other(tmp_path: Path) -> None:
    mine, other = (issue(tmp_path / name, ["127.0.0.1"], NOW()) for name in ("mine", "other"))
    with listening(Giving(mine.authority.read_bytes()), **shown(mine)) as port:
        url = f"https://127.0.0.1:{port}"
        for trusted in (mine.authority, mine.chain):  # the authority, or the server's own certificate
            transport = HttpTransport(url, authority=trusted.read_text())
            assert transport.request("GET", "/").status == 200
            transport.close()
        for authority, said in (
            (other.authority.read_text(), f"has made a new one, or this is another server. .* {url}/#pin=HEX"),
            (
                None,
                f"not from an authority that this machine trusts: .*--tls auto.*, give its link, or its pin .* {url}/#pin=HEX",
            ),
        ):
            with pytest.raises(Unreachable, match=said):
                HttpTransport(url, authority=authority).request("GET", "/")
        assert fetch_authority(Link(url, pin=mine.pin)) == mine.authority.read_text().strip()
        with pytest.raises(ExperimentError, match="not the server of this link"):
            fetch_authority(Link(url, pin=other.pin))


def test_a_certificate_must_be_for_the_name_that_is_asked(tmp_path: Path) -> None:
    elsewhere = issue(tmp_path, ["fl.example"], NOW())
    with listening(Echo(), **shown(elsewhere)) as port:
        with pytest.raises(Unreachable, match="is for other names: use the address in the link"):
            HttpTransport(f"https://127.0.0.1:{port}", authority=elsewhere.authority.read_text()).request("GET", "/")
        with pytest.raises(Unreachable, match="/v1/authority answers 207: is this a sumus server"):
            unverified(f"https://127.0.0.1:{port}", "/v1/authority")


@pytest.mark.parametrize(
    ("days", "said"),
    [
        (-500, "has expired, and the time here is .*if this machine's clock is right"),
        (500, "is not valid yet, and the time here is"),
    ],
)
def test_a_certificate_of_another_time_is_said_to_be(tmp_path: Path, days: int, said: str) -> None:
    made = issue(tmp_path, ["127.0.0.1"], NOW() + timedelta(days=days))
    with listening(Echo(), **shown(made)) as port, pytest.raises(Unreachable, match=said):
        HttpTransport(f"https://127.0.0.1:{port}", authority=made.authority.read_text()).request("GET", "/")


def test_an_authority_that_is_none_is_said_to_be() -> None:
    with pytest.raises(ExperimentError, match="not a certificate in PEM"):
        HttpTransport("https://127.0.0.1:1", authority="nonsense")


# ── in process ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_application_lives_as_long_as_its_transport(echo: Echo) -> None:
    transport = InProcess(echo)
    assert (echo.began, echo.ended) == (1, 0)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(transport.request, "GET", "/never")
        assert echo.hung.wait(20)
        transport.close()
        assert isinstance(waiting.exception(), Unreachable)
    assert (echo.began, echo.ended) == (1, 1)
    with pytest.raises(Unreachable, match="closed"):
        transport.request("GET", "/echo")


def test_what_an_application_raised_is_kept_for_whoever_looks(echo: Echo) -> None:
    with InProcess(echo) as transport:
        transport.request("GET", "/fails")
        assert [str(failure) for failure in transport.failures] == ["a defect"]


def test_an_application_that_does_not_start_is_an_error() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no database"})

    with pytest.raises(ExperimentError, match="no database"):
        InProcess(app)


def test_an_application_without_a_lifespan_needs_none() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    with InProcess(app) as transport:
        assert transport.request("GET", "/").status == 204


# ── badly ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_faults_are_as_frequent_as_they_are_asked_to_be_and_the_same_for_a_seed(echo: Echo) -> None:
    faults = Faults(lost=0.2, unanswered=0.2, twice=0.2, cut=0.2, answer_cut=0.2, delayed=0.5, delay=8.0)
    seen: list[Any] = []
    with InProcess(echo) as inner:
        for _ in range(2):
            slept: list[float] = []
            echo.bodies.clear()
            transport = FaultyTransport(inner, faults, generator(3), slept.append)
            came = [_outcome(transport, number) for number in range(300)]
            assert all(15 < transport.met[name] < 90 for name in ("lost", "unanswered", "answer_cut"))
            assert len(slept) == transport.met["delayed"]
            assert all(0 <= seconds <= 8 for seconds in slept)
            whole = [body for body in echo.bodies if len(body) == 100]
            arrived = 300 - transport.met["lost"] - transport.met["cut"] + transport.met["twice"]
            assert (len(whole), len(echo.bodies) - len(whole)) == (arrived, transport.met["cut"])
            seen.append((came, slept, transport.met))
    assert seen[0] == seen[1]


def _outcome(transport: Transport, number: int) -> bytes | None:
    try:
        return transport.request("PUT", "/echo", bytes([number % 256]) * 100).body
    except Unreachable:
        return None


def test_a_share_beyond_one_is_refused() -> None:
    with pytest.raises(PlanError, match=r"Faults\(lost=\)=1.5"):
        Faults(lost=1.5)


class Giving:
    """An application that gives one body."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await answer(send, 200, self._body)
            return
        for what in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{what}.complete"})


def shown(certificates: Certificates) -> dict[str, str]:
    """To a server, what it is to show."""
    return {"ssl_certfile": str(certificates.chain), "ssl_keyfile": str(certificates.key)}


# ── a port that is another kind of port ──────────────────────────────────────────────────────────────────────────────


def test_a_plain_port_that_is_spoken_to_in_tls_is_not_said_to_have_a_bad_certificate() -> None:
    with listening(Echo()) as port:
        url = f"https://127.0.0.1:{port}"
        with pytest.raises(Unreachable, match="does not speak TLS: is it http://"):
            HttpTransport(url).request("GET", "/")
        with pytest.raises(Unreachable, match="does not speak TLS: is it http://"):
            unverified(url, "/v1/authority")


def test_a_tls_port_that_is_spoken_to_in_plain_is_asked_for_its_scheme(tmp_path: Path) -> None:
    made = issue(tmp_path, ["127.0.0.1"], NOW())
    with (
        listening(Echo(), **shown(made)) as port,
        pytest.raises(Unreachable, match="cannot be reached: .*does it answer to https://"),
    ):
        HttpTransport(f"http://127.0.0.1:{port}").request("GET", "/")


def test_a_transport_in_this_process_is_opened_and_closed_where_a_loop_runs() -> None:
    """As in a notebook, whose cells run inside a loop."""

    async def cell() -> int:
        with InProcess(Echo()) as transport:
            return transport.request("GET", "/").status

    assert asyncio.run(cell()) == 207
