"""`--tls auto` against Python's own TLS: who trusts the authority talks to this server, under its names, and to no other."""

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from sumus.errors import ExperimentError, UsageError
from sumus.http import tls
from sumus.http.certificates import Certificate
from sumus.http.listening import expect_no_loop
from sumus.http.tls import LASTS, RENEWED, Certificates, enrolment_link, fingerprint, issue

NOW = datetime.now(UTC)
"""OpenSSL looks at the system's clock."""
NAMES = ["fl.example", "localhost", "127.0.0.1", "::1"]


@contextmanager
def served(chain: Path, key: Path) -> Iterator[int]:
    """A server that greets once."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            peer, _ = listener.accept()
            with peer:
                try:
                    with context.wrap_socket(peer, server_side=True) as stream:
                        stream.sendall(b"welcome")
                except (ssl.SSLError, OSError):  # the client turned away
                    pass

        thread = threading.Thread(target=greet)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            thread.join()


def greeting(chain: Path, key: Path, trusted: Path, name: str) -> bytes:
    """What a client reads that trusts this authority and no other."""
    context = ssl.create_default_context(cafile=str(trusted))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    with served(chain, key) as port, socket.create_connection(("127.0.0.1", port)) as plain:
        with context.wrap_socket(plain, server_hostname=name) as stream:
            return stream.recv(100)


def loaded(certificates: Certificates) -> tuple[x509.Certificate, x509.Certificate]:
    leaf, authority = x509.load_pem_x509_certificates(certificates.chain.read_bytes())
    return leaf, authority


@pytest.mark.parametrize("name", NAMES)
def test_who_trusts_the_authority_alone_talks_to_the_server(tmp_path: Path, name: str) -> None:
    made = issue(tmp_path / "tls", NAMES, NOW)
    assert greeting(made.chain, made.key, made.authority, name) == b"welcome"


@pytest.mark.parametrize("name", ["other.example", "127.0.0.2", "example"])
def test_the_leaf_is_for_no_other_name(tmp_path: Path, name: str) -> None:
    made = issue(tmp_path / "tls", NAMES, NOW)
    with pytest.raises(ssl.SSLCertVerificationError, match="match"):
        greeting(made.chain, made.key, made.authority, name)


def test_a_leaf_of_another_authority_is_refused(tmp_path: Path) -> None:
    one, other = issue(tmp_path / "one", NAMES, NOW), issue(tmp_path / "other", NAMES, NOW)
    with pytest.raises(ssl.SSLCertVerificationError, match="self-signed|unable to get"):
        greeting(one.chain, one.key, other.authority, "fl.example")


@pytest.mark.parametrize(
    ("given", "forged"),
    [
        (["fl.example"], "bank.example"),
        (["fl.example"], "192.0.2.1"),
        (["fl.example"], "2001:db8::1"),
        (["192.0.2.1"], "bank.example"),
        (["192.0.2.1"], "192.0.2.2"),
        (["192.0.2.1"], "2001:db8::1"),
        (["2001:db8::1"], "192.0.2.1"),
    ],
)
def test_even_with_its_key_the_authority_can_make_no_other_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], forged: str
) -> None:
    """The key is caught while it exists, which an attacker could not, and used for another leaf."""
    keys = list[EllipticCurvePrivateKey]()

    def caught(curve: SECP256R1) -> EllipticCurvePrivateKey:
        keys.append(generate_private_key(curve))
        return keys[-1]

    monkeypatch.setattr(tls, "generate_private_key", caught)
    made = issue(tmp_path / "tls", given, NOW)
    leaf, authority = loaded(made)
    secret = next(key for key in keys if key.public_key() == authority.public_key())

    def leaf_for(name: str) -> tuple[Path, Path]:
        key = generate_private_key(SECP256R1())
        built = x509.CertificateBuilder(
            authority.subject,
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "forged server")]),
            key.public_key(),
            7,
            leaf.not_valid_before_utc,
            leaf.not_valid_after_utc,
        ).add_extension(x509.SubjectAlternativeName([tls._general(name)]), critical=False)
        for extension in leaf.extensions:
            if not isinstance(extension.value, x509.SubjectAlternativeName | x509.SubjectKeyIdentifier):
                built = built.add_extension(extension.value, extension.critical)
        built = built.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        chain, secret_file = tmp_path / "forged.pem", tmp_path / "forged.key"
        chain.write_bytes(built.sign(secret, SHA256()).public_bytes(Encoding.PEM))
        secret_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return chain, secret_file

    assert greeting(*leaf_for(given[0]), made.authority, given[0]) == b"welcome"
    with pytest.raises(ssl.SSLCertVerificationError, match="subtree violation"):
        greeting(*leaf_for(forged), made.authority, forged)


def test_it_lasts_398_days_and_the_authority_no_longer(tmp_path: Path) -> None:
    leaf, authority = loaded(issue(tmp_path / "tls", NAMES, NOW))
    for certificate in (leaf, authority):
        assert certificate.not_valid_before_utc < NOW
        assert LASTS - timedelta(days=1) < certificate.not_valid_after_utc - certificate.not_valid_before_utc < LASTS


def test_no_file_holds_the_authoritys_key(tmp_path: Path) -> None:
    made = issue(tmp_path / "tls", NAMES, NOW)
    _, authority = loaded(made)
    assert {path.name for path in (tmp_path / "tls").iterdir()} == {"authority.pem", "leaf.pem", "leaf.key"}
    key = load_pem_private_key(made.key.read_bytes(), None)
    assert key.public_key() != authority.public_key()
    assert b"".join(path.read_bytes() for path in (tmp_path / "tls").iterdir()).count(b"PRIVATE KEY") == 2
    assert made.key.stat().st_mode & 0o777 == 0o600
    assert made.key.parent.stat().st_mode & 0o777 == 0o700


def test_the_next_start_finds_the_same(tmp_path: Path) -> None:
    first = issue(tmp_path / "tls", NAMES, NOW)
    again = issue(
        tmp_path / "tls", ["::1", "FL.example.", "localhost", "127.0.0.1", "127.0.0.1"], NOW + timedelta(days=300)
    )
    assert first.new == "there was no certificate"
    assert (again.pin, again.until, again.new) == (first.pin, first.until, "")
    assert again.pin == fingerprint(x509.load_pem_x509_certificate(first.authority.read_bytes()))


def test_other_names_or_a_near_end_make_a_new_authority_and_say_why(tmp_path: Path) -> None:
    first = issue(tmp_path / "tls", ["fl.example"], NOW)
    second = issue(tmp_path / "tls", ["fl.example", "192.0.2.7"], NOW)
    assert second.pin != first.pin
    assert second.new == "the old certificate was for fl.example, but a certificate for 192.0.2.7, fl.example is needed"
    assert issue(tmp_path / "tls", second.names, second.until - timedelta(seconds=1)).pin == second.pin
    third = issue(tmp_path / "tls", second.names, second.until)
    assert third.pin != second.pin
    assert third.new.startswith("the old certificate expires on ")
    assert second.until + RENEWED > NOW + timedelta(days=396)


def test_files_that_do_not_belong_together_are_replaced(tmp_path: Path) -> None:
    """As a crash between two of them leaves them."""
    first, other = issue(tmp_path / "one", NAMES, NOW), issue(tmp_path / "other", NAMES, NOW)
    first.key.write_bytes(other.key.read_bytes())
    second = issue(tmp_path / "one", NAMES, NOW)
    assert second.new == "the files of the old certificate did not match each other"
    assert greeting(second.chain, second.key, second.authority, "fl.example") == b"welcome"
    second.chain.write_bytes(second.chain.read_bytes()[:500])
    assert issue(tmp_path / "one", NAMES, NOW).new == "the files of the old certificate were damaged"
    first.key.unlink()
    assert issue(tmp_path / "one", NAMES, NOW).new == "the files of the old certificate were damaged"


def test_the_authoritys_own_file_follows_the_chain(tmp_path: Path) -> None:
    first = issue(tmp_path / "tls", NAMES, NOW)
    first.authority.unlink()
    again = issue(tmp_path / "tls", NAMES, NOW)
    assert (again.pin, again.new) == (first.pin, "")
    assert greeting(again.chain, again.key, again.authority, "localhost") == b"welcome"


def test_a_key_that_others_may_have_read_is_not_used(tmp_path: Path) -> None:
    issue(tmp_path / "tls", NAMES, NOW).key.chmod(0o640)
    with pytest.raises(ExperimentError, match="open to other users"):
        issue(tmp_path / "tls", NAMES, NOW)


@pytest.mark.parametrize(
    "name", ["", "*.example", "a b", "fl.example:8443", "https://fl.example", "-a.example", "300.1.1.1", "bücher.example",
             "a" * 64, "a." * 130 + "a", "fe80::1%eth0", "0.0.0.0", "::", "a..b", "under_score.example"],
)  # fmt: skip
def test_what_is_no_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        issue(tmp_path / "tls", ["fl.example", name], NOW)


def test_names_are_kept_in_one_spelling(tmp_path: Path) -> None:
    names = [" FL.Example. ", "[2001:DB8:0::1]", "192.0.2.7\n", "fl.example"]
    assert issue(tmp_path / "tls", names, NOW).names == ("192.0.2.7", "2001:db8::1", "fl.example")


def test_no_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a name"):
        issue(tmp_path / "tls", [], NOW)


def test_a_folder_that_cannot_be_is_the_operators(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExperimentError, match="cannot write certificates into"):
        issue(tmp_path / "file" / "tls", NAMES, NOW)


def test_an_enrolment_link_keeps_its_secrets_in_the_fragment() -> None:
    assert enrolment_link("https://fl.example:8443/", "TOKEN", "ab" * 32) == (
        f"https://fl.example:8443/#enrol=TOKEN&pin={'ab' * 32}"
    )
    assert enrolment_link("http://127.0.0.1:8000", "TOKEN") == "http://127.0.0.1:8000/#enrol=TOKEN"


# ── files that are no certificate and key ────────────────────────────────────────────────────────────────────────────


def test_files_that_no_server_can_use_are_each_named(tmp_path: Path) -> None:
    made, other = (issue(tmp_path / name, ["localhost"], NOW) for name in ("mine", "other"))
    secret = load_pem_private_key(made.key.read_bytes(), None)
    locked, empty, missing = tmp_path / "locked.pem", tmp_path / "empty.pem", tmp_path / "missing.pem"
    locked.write_bytes(secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"open")))
    empty.write_bytes(b"")
    older = tmp_path / "older.pem"
    older.write_bytes(
        secret.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, BestAvailableEncryption(b"open"))
    )
    for chain, key, words in (
        (made.chain, locked, "the key .*locked.pem is encrypted.*openssl pkey"),
        (made.chain, older, "the key .*older.pem is encrypted"),
        (made.chain, missing, "missing.pem cannot be read: No such file"),
        (tmp_path, made.key, "cannot be read: Is a directory"),
        (made.key, made.chain, "holds no certificate in PEM: give the chain first"),
        (made.chain, empty, "empty.pem holds no private key in PEM"),
        (made.chain, other.key, "the key .*other.* does not match .*mine"),
    ):
        with pytest.raises(UsageError, match=words):
            Certificate(chain, key)
    assert Certificate(made.chain, made.key).ends > NOW


def test_where_a_loop_runs_already_a_server_says_so() -> None:
    async def cell() -> None:
        expect_no_loop("a server", "`sumus serve`")

    with pytest.raises(UsageError, match="an event loop already runs in this thread .*`sumus serve`"):
        asyncio.run(cell())
    expect_no_loop("a server", "`sumus serve`")
