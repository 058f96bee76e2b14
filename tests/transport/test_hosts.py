"""Hosts in one spelling, and addresses to listen on."""

import pytest

from sumus.errors import UsageError
from sumus.transport.hosts import host_of, is_loopback, listen_address


@pytest.mark.parametrize(
    ("authority", "host"),
    [
        ("localhost", "localhost"), ("LOCALHOST:8081", "localhost"), ("localhost.", "localhost"), ("a.example.:80", "a.example"),
        ("127.0.0.1:1", "127.0.0.1"), ("[::1]:8081", "::1"), ("[::1]", "::1"), ("::1", "::1"), ("[0:0::1]", "::1"),
        ("[::ffff:127.0.0.1]:8", "127.0.0.1"), ("[fe80::1%25eth0]:8", "fe80::1"), ("fe80::1%eth0", "fe80::1"),
        ("localhost:", "localhost"),
        ("", None), (":80", None), ("a b", None), ("a/b", None), ("a@localhost", None), ("localhost:80:80", None), ("[::1", None),
        ("[localhost]", None), ("localhost:999999", None), ("127.0.0.1%a.example", None), ("a,localhost", None), ("[::1]x", None),
    ],
)  # fmt: skip
def test_a_host_has_one_spelling(authority: str, host: str | None) -> None:
    assert host_of(authority) == host


def test_what_is_this_machine_s_own() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1")))
    assert not any(map(is_loopback, ("", "localhost.example", "127.0.0.1.example", "0.0.0.0", "192.0.2.1", "127.1")))


def test_an_address_to_listen_on_has_a_port() -> None:
    assert listen_address("127.0.0.1:0") == ("127.0.0.1", 0)
    assert listen_address("[::1]:8090") == ("::1", 8090)
    for wrong in ("127.0.0.1", ":80", "a:b", "a:70000", "a:-1", "a:٣", f"a:{'1' * 5000}"):
        with pytest.raises(UsageError, match="write HOST:PORT"):
            listen_address(wrong)
