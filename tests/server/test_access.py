"""Logging in: one link, one session, hashes alone on the disk; and sessions kept by who asks."""

import json
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from sumus.errors import ExperimentError, UsageError
from sumus.server.access import CODE_S, SESSION_S, Access, Logins, code_of, config_folder, login_link, origin
from sumus.wire.messages import Refused

NOW = 1_000_000.0
HERE, THERE = "127.0.0.1", "192.0.2.1"


@pytest.fixture
def access(tmp_path: Path) -> Access:
    return Access(tmp_path / "admin")


def refused(access: Access, authorization: str, now: float = NOW, address: str = HERE) -> str:
    with pytest.raises(Refused) as error:
        access.check(authorization, address, now)
    return error.value.problem.code


def test_a_link_logs_in_once(access: Access) -> None:
    session = access.exchange(access.new_code(NOW), HERE, NOW + CODE_S - 1)
    assert access.check(f"Bearer {session}", HERE, NOW) == session
    assert access.check(f"bearer {session}", THERE, NOW) == session


def test_not_twice(access: Access) -> None:
    code = access.new_code(NOW)
    access.exchange(code, HERE, NOW)
    with pytest.raises(Refused, match="bad_token: this login link was used"):
        access.exchange(code, HERE, NOW)


def test_not_after_fifteen_minutes(access: Access) -> None:
    code = access.new_code(NOW)
    with pytest.raises(Refused, match="has expired"):
        access.exchange(code, HERE, NOW + CODE_S)


def test_a_session_ends(access: Access) -> None:
    session = access.exchange(access.new_code(NOW), HERE, NOW)
    assert access.check(f"Bearer {session}", HERE, NOW + SESSION_S - 1) == session
    assert refused(access, f"Bearer {session}", NOW + SESSION_S) == "bad_token"


def test_of_many_at_once_one_logs_in(access: Access) -> None:
    code, start, sessions = access.new_code(NOW), threading.Barrier(8), list[str]()

    def log_in(number: int) -> None:
        start.wait()
        with suppress(Refused):
            sessions.append(access.exchange(code, f"192.0.{number}.1", NOW))

    threads = [threading.Thread(target=log_in, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sessions) == 1


def test_a_code_is_no_session_and_a_session_no_code(access: Access) -> None:
    code = access.new_code(NOW)
    assert refused(access, f"Bearer {code}") == "bad_token"
    session = access.exchange(code, HERE, NOW)
    with pytest.raises(Refused, match="bad_token"):
        access.exchange(session, HERE, NOW)


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic {}", "Bearer {}x", "Bearer  {}", "{}", "Bearer ../a", "Bearer \0", "Bearer é"]
)  # fmt: skip
def test_any_other_header_is_refused(access: Access, header: str) -> None:
    session = access.exchange(access.new_code(NOW), HERE, NOW)
    assert refused(access, header.format(session)) == "bad_token"


def test_the_folder_holds_hashes_that_the_owner_alone_reads(access: Access, tmp_path: Path) -> None:
    code = access.new_code(NOW)
    session = access.exchange(access.new_code(NOW), HERE, NOW)
    paths = [path for path in (tmp_path / "admin").rglob("*") if path.is_file()]
    assert len(paths) == 2
    for path in paths:
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        for secret in (code, session):
            assert secret not in str(path)
            assert secret.encode() not in path.read_bytes()
        assert refused(access, f"Bearer {path.name}") == "bad_token"


def test_another_process_makes_links_and_a_restart_keeps_sessions(access: Access, tmp_path: Path) -> None:
    session = access.exchange(Access(tmp_path / "admin").new_code(NOW), HERE, NOW)
    assert Access(tmp_path / "admin").check(f"Bearer {session}", HERE, NOW) == session


def test_revoking_holds_at_once_everywhere(access: Access, tmp_path: Path) -> None:
    one, two = (access.exchange(access.new_code(NOW), HERE, NOW) for _ in range(2))
    other = Access(tmp_path / "admin")
    other.revoke(one)
    other.revoke(one)
    assert refused(access, f"Bearer {one}") == "bad_token"
    assert access.check(f"Bearer {two}", HERE, NOW) == two
    code = access.new_code(NOW)
    assert other.revoke_all() == 2
    assert refused(access, f"Bearer {two}") == "bad_token"
    with pytest.raises(Refused, match="bad_token"):
        access.exchange(code, HERE, NOW)


def test_what_has_ended_is_cleared_away(access: Access, tmp_path: Path) -> None:
    access.exchange(access.new_code(NOW), HERE, NOW)
    access.new_code(NOW)
    access.new_code(NOW + SESSION_S)
    assert sum(path.is_file() for path in (tmp_path / "admin").rglob("*")) == 1


def test_a_damaged_file_opens_nothing(access: Access, tmp_path: Path) -> None:
    session = access.exchange(access.new_code(NOW), HERE, NOW)
    (path,) = (tmp_path / "admin" / "sessions").iterdir()
    for body in (b"", b"forever", b"nan", b"\xff"):
        path.write_bytes(body)
        assert refused(access, f"Bearer {session}", address="2001:db8::1") == "bad_token"


def test_guessing_is_slow_and_disturbs_nobody_else(access: Access) -> None:
    code, session = access.new_code(NOW), access.exchange(access.new_code(NOW), HERE, NOW)
    codes = [refused(access, f"Bearer {'A' * 43}", address=f"192.0.2.{number}") for number in range(12)]
    assert codes == ["bad_token"] * 10 + ["rate"] * 2
    with pytest.raises(Refused) as error:
        access.exchange("B" * 43, THERE, NOW)
    assert error.value.problem.code == "rate"
    window = error.value.problem.retry_after_s
    assert window is not None
    assert 0 < window[0] <= window[1]
    assert access.check(f"Bearer {session}", THERE, NOW) == session
    assert access.exchange(code, THERE, NOW), "a right code is taken from where the guesses come from too"


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    Access(tmp_path / "admin")
    (tmp_path / "admin").chmod(0o755)
    with pytest.raises(ExperimentError, match="chmod 700"):
        Access(tmp_path / "admin")
    (tmp_path / "file").write_text("")
    with pytest.raises(ExperimentError, match="cannot be used"):
        Access(tmp_path / "file" / "admin")


def test_a_link_is_read_back(access: Access) -> None:
    code = access.new_code(NOW)
    link = login_link("http://127.0.0.1:8001/", code)
    assert link == f"http://127.0.0.1:8001/#login={code}"
    assert code_of(f"{link}\n") == ("http://127.0.0.1:8001", code)
    for other in ("", "http://127.0.0.1:8001/", link[:-1], "#login=" + code, link + "&x=1"):
        with pytest.raises(UsageError):
            code_of(other)


# ── beside who asks ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_session_is_shown_to_its_own_server_alone(tmp_path: Path) -> None:
    logins = Logins(tmp_path / "sumus")
    assert logins.session("http://127.0.0.1:8001") is None
    logins.keep("http://127.0.0.1:8001/#login=x", "one")
    logins.keep("https://fl.example/status", "two")
    again = Logins(tmp_path / "sumus")
    assert again.session("127.0.0.1:8001") == "one"
    assert again.session("HTTPS://FL.example:443") == "two"
    for other in ("http://127.0.0.1:8002", "https://127.0.0.1:8001", "http://fl.example", "https://fl.example.org"):
        assert again.session(other) is None
    again.forget("http://127.0.0.1:8001/")
    assert logins.session("http://127.0.0.1:8001") is None
    assert logins.session("https://fl.example") == "two"


def test_the_file_is_the_users_alone(tmp_path: Path) -> None:
    logins = Logins(tmp_path / "sumus")
    logins.keep("http://localhost:1", "one")
    path = tmp_path / "sumus" / "logins.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_bytes()) == {"http://localhost:1": "one"}
    path.chmod(0o644)
    with pytest.raises(ExperimentError, match="chmod 600"):
        logins.session("http://localhost:1")


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"3"])
def test_a_damaged_file_says_what_to_do(tmp_path: Path, body: bytes) -> None:
    logins = Logins(tmp_path)
    logins.keep("http://localhost:1", "one")
    (tmp_path / "logins.json").write_bytes(body)
    with pytest.raises(ExperimentError, match="delete it, and log in again"):
        logins.session("http://localhost:1")


def test_the_users_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/people/someone")
    assert config_folder({"XDG_CONFIG_HOME": "/elsewhere"}) == Path("/elsewhere/sumus")
    for environ in ({}, {"XDG_CONFIG_HOME": ""}, {"XDG_CONFIG_HOME": "relative"}):
        assert config_folder(environ) == Path("/people/someone/.config/sumus")


@pytest.mark.parametrize(
    ("url", "plain"),
    [
        ("http://a", "http://a:80"),
        ("https://A.b/c?d#e", "https://a.b:443"),
        ("a:81", "http://a:81"),
        ("http://[::1]:8/", "http://[::1]:8"),
    ],
)
def test_the_origin_of_a_url(url: str, plain: str) -> None:
    assert origin(url) == plain


@pytest.mark.parametrize(
    "url", ["", "ftp://a", "http://", "http://a:x", "http://a:99999", "http://user@a", "http://[::1"]
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(UsageError):
        origin(url)
