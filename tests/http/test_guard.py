"""What an operator's plane is called, and an answer that is made once in a while."""

import asyncio
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from sumus.errors import UsageError
from sumus.http.guard import guard
from sumus.http.listening import Listening, opened_at, opened_plane
from sumus.http.proxies import Proxies
from sumus.http.snapshot import Snapshot
from sumus.transport.inprocess import InProcess


@pytest.mark.parametrize("host", ["fl.example", "FL.EXAMPLE.:8081", "192.0.2.7:1", "[2001:db8::7]:8081"])
def test_names_that_an_operator_gives_are_answered(host: str) -> None:
    names = ("fl.example:8443", "192.0.2.7", "2001:DB8:0::7")
    app = Starlette(
        routes=[Route("/", lambda request: PlainTextResponse("here"))],
        middleware=[guard(names, lambda status, code, detail: PlainTextResponse(detail, status), "--name")],
    )
    with InProcess(app) as network:
        assert network.request("GET", "/", b"", {"host": host}).status == 200
        answer = network.request("GET", "/", b"", {"host": "other.example"})
        assert answer.status == 421
        assert b"this server does not accept the host name other.example" in answer.body
        assert b"--name HOST" in answer.body


def test_a_plane_is_called_what_it_prints_and_what_it_was_told(tmp_path: Path) -> None:
    listen = Listening(port=0, admin_port=0, names=["fl.example"], url="https://out.example/")
    with opened_at(listen, tmp_path) as at:
        assert {"fl.example", "out.example"} < {name.partition(":")[0] for name in at.names}
        assert at.admin_url.removeprefix("http://") in at.names
    with opened_plane(Listening(port=0, names=["pi.lan"]), tmp_path) as one:
        assert {name.partition(":")[0] for name in one.names} == {"pi.lan"}


def test_a_proxy_that_is_no_address_is_refused() -> None:
    for wrong in ("10.0.0", "proxy.lan", "10.0.0.0/99", "127.0.0.1;10.0.0.1", "*,127.0.0.1"):
        with pytest.raises(UsageError, match="give addresses and networks, separated by commas"):
            Proxies(wrong)
    assert not Proxies(" , ").holds("127.0.0.1")


def test_an_answer_is_made_once_however_many_ask_and_a_failure_is_not_kept() -> None:
    made, now = list[float](), [0.0]

    async def make() -> float:
        await asyncio.sleep(0)
        made.append(now[0])
        if now[0] == 2.0:
            raise OSError("the disk")
        return now[0]

    async def ask() -> None:
        snapshot = Snapshot(make, 1.0, lambda: now[0])
        assert set(await asyncio.gather(*(snapshot.look() for _ in range(20)))) == {0.0}
        now[0] = 2.0
        with pytest.raises(OSError, match="the disk"):
            await snapshot.look()
        now[0] = 2.5
        assert await snapshot.look() == 2.5

    asyncio.run(ask())
    assert made == [0.0, 2.0, 2.5]
