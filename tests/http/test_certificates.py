"""A certificate that was renewed is shown without a restart, and its end is counted."""

import asyncio
import shutil
import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from sumus.http.certificates import Certificate
from sumus.http.listening import Listening, opened_at, opened_plane
from sumus.http.tls import issue
from sumus.operations.service import open_service
from sumus.server.access import Access
from sumus.server.admin_plane import admin_app
from sumus.transport.inprocess import InProcess
from tests.server.devices import tiny

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)


def written(folder: Path, begins: datetime, ends: datetime, kind: str = "ec") -> tuple[Path, Path]:
    """A certificate of an authority that is not ours."""
    secret = ec.generate_private_key(ec.SECP256R1()) if kind == "ec" else rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    made = x509.CertificateBuilder(name, name, secret.public_key(), x509.random_serial_number(), begins, ends).sign(
        secret, SHA256()
    )
    folder.mkdir(exist_ok=True)
    chain, key = folder / "chain.pem", folder / "key.pem"
    chain.write_bytes(made.public_bytes(Encoding.PEM))
    key.write_bytes(secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return chain, key


def shown(port: int) -> datetime:
    """The end of the certificate that a port shows."""
    anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port), timeout=20) as plain:
        with anyone.wrap_socket(plain) as talk:
            der = talk.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der).not_valid_after_utc


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError


def in_place(new: Path, old: Path) -> None:
    old.write_bytes(new.read_bytes())


def renamed(new: Path, old: Path) -> None:
    shutil.copy(new, old.with_suffix(".new"))
    old.with_suffix(".new").replace(old)


def linked(new: Path, old: Path) -> None:
    """As certbot renews."""
    old.with_suffix(".link").symlink_to(new)
    old.with_suffix(".link").replace(old)


@pytest.mark.parametrize("renew", [in_place, renamed, linked])
@pytest.mark.parametrize("kinds", [("ec", "ec"), ("rsa", "ec")])
def test_what_lies_in_the_files_is_shown_without_a_restart(
    renew: Callable[[Path, Path], None], kinds: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sumus.http.listening.LOOKED", 1)
    old = written(tmp_path / "old", NOW, NOW + 90 * DAY, kinds[0])
    new = written(tmp_path / "new", NOW + 60 * DAY, NOW + 150 * DAY, kinds[1])

    async def served() -> None:
        listen = Listening(port=0, admin_port=0, tls=old)
        with opened_at(listen, tmp_path / "tls") as at:
            port = at.sockets[0].getsockname()[1]
            async with at.planes(nothing, nothing):
                assert await asyncio.to_thread(shown, port) == NOW + 90 * DAY
                for one, other in zip(new, old, strict=True):
                    renew(one, other)
                while await asyncio.to_thread(shown, port) != NOW + 150 * DAY:
                    await asyncio.sleep(0.02)

    asyncio.run(asyncio.wait_for(served(), 60))


def test_a_node_s_plane_shows_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sumus.http.listening.LOOKED", 1)
    old = written(tmp_path / "old", NOW, NOW + 90 * DAY)
    new = written(tmp_path / "new", NOW, NOW + 91 * DAY)

    async def served() -> None:
        with opened_plane(Listening(port=0, tls=old), tmp_path / "tls") as at:
            async with at.plane(nothing):
                for one, other in zip(new, old, strict=True):
                    renamed(one, other)
                while await asyncio.to_thread(shown, at.socket.getsockname()[1]) != NOW + 91 * DAY:
                    await asyncio.sleep(0.02)

    asyncio.run(asyncio.wait_for(served(), 60))


@pytest.mark.parametrize("first", [0, 1], ids=["chain first", "key first"])
def test_the_old_one_is_shown_until_the_new_one_is_whole(
    first: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = written(tmp_path / "old", NOW, NOW + 90 * DAY)
    new = written(tmp_path / "new", NOW, NOW + 150 * DAY)
    certificate = Certificate(*old)
    before = certificate.context
    assert not certificate.look()
    for content in (new[first].read_bytes()[:100], b"", new[first].read_bytes()):
        old[first].write_bytes(content)
        assert not certificate.look()
    old[1 - first].unlink()
    assert not certificate.look()
    assert (certificate.context, certificate.ends) == (before, NOW + 90 * DAY)
    renamed(new[1 - first], old[1 - first])
    assert certificate.look()
    assert not certificate.look()
    assert certificate.context is not before
    assert certificate.ends == NOW + 150 * DAY
    assert "the old certificate is still used" in caplog.text
    assert "a new certificate is used from now on; it expires on 2026-10-29" in caplog.text


@pytest.mark.parametrize(
    ("lasts", "left", "said"),
    [
        (365, 31, ""),
        (365, 29.5, "ends in 29 days, on 2026-07-01"),
        (90, 24, ""),
        (90, 22, "ends in 22 days, on 2026-06-23"),
        (6, 2, ""),
        (6, 1.2, "ends in 1 day, on 2026-06-02"),
        (6, 0.2, "ends today, on 2026-06-01"),
        (90, -0.5, "ended on 2026-06-01"),
        (90, -40, "ended on 2026-04-22"),
    ],
)
def test_the_days_before_its_end_are_counted(lasts: float, left: float, said: str, tmp_path: Path) -> None:
    ends = NOW + left * DAY
    certificate = Certificate(*written(tmp_path / "mine", ends - lasts * DAY, ends))
    found = certificate.said(NOW)
    assert found == "" if not said else said in found
    assert not said or "put the new certificate and its key in place" in found
    assert certificate.left_s(NOW) == pytest.approx(left * 86400)


def test_of_its_own_one_the_server_says_that_a_restart_renews_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = issue(tmp_path, ["localhost"], NOW)
    certificate = Certificate(made.chain, made.key, own=True)
    certificate.warn(lambda: made.until - timedelta(seconds=1))
    assert not caplog.records
    certificate.warn(lambda: made.until)
    assert "ends in 30 days" in caplog.text
    assert "restart the server to renew it; then give all devices the new pin" in caplog.text


def test_status_and_metrics_say_when_it_ends(tmp_path: Path) -> None:
    ends = datetime.now(UTC) + 3 * DAY
    chain, key = written(tmp_path / "mine", ends - 90 * DAY, ends)
    with opened_at(Listening(port=0, admin_port=0, tls=[chain, key]), tmp_path / "tls") as at:
        (note,) = at.notes
    assert "ends in 2 days" in note
    service = open_service({"tiny": tiny()})
    service.server.start()

    def said() -> list[str]:
        with InProcess(admin_app(service, Access(tmp_path / "admin"), str)) as admin:
            answer = admin.request("GET", "/metrics", headers={"Host": "localhost"})
        assert answer.status == 200
        return [line for line in answer.body.decode().splitlines() if line.startswith("sumus_certificate_left_seconds")]

    assert said() == []
    service.certificate = at.certificate
    (line,) = said()
    assert 2.9 * 86400 < float(line.split()[1]) < 3 * 86400
    service.close()
