"""Enrolment links: what is secret in them is read where nobody else can."""

import io
from pathlib import Path

import pytest

from sumus.device.link import Link, given, link_of_command, read_link
from sumus.errors import ExperimentError

PIN = "ab" * 32
WHOLE = f"https://fl.example:8443/#enrol=SECRET-token_1&pin={PIN}"


@pytest.mark.parametrize(
    ("text", "link"),
    [
        (WHOLE, Link("https://fl.example:8443", "SECRET-token_1", PIN)),
        ("https://fl.example", Link("https://fl.example")),
        ("https://fl.example/", Link("https://fl.example")),
        (f"https://fl.example#pin={PIN}", Link("https://fl.example", None, PIN)),
        ("https://fl.example/#enrol=SECRET", Link("https://fl.example", "SECRET")),
        ("http://127.0.0.1:8080/#enrol=SECRET", Link("http://127.0.0.1:8080", "SECRET")),
        ("http://[::1]:8080", Link("http://[::1]:8080")),
        ("http://localhost:1", Link("http://localhost:1")),
        ("  SECRET\n", Link("", "SECRET")),
    ],
)
def test_a_link_says_where_and_by_what(text: str, link: Link) -> None:
    assert read_link(text) == link


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http://fl.example/#enrol=SECRET", "not encrypted: use https://, or --insecure"),
        ("http://10.0.0.1", "not encrypted"),
        ("ftp://fl.example/#enrol=SECRET", "neither a server's address nor a link: give https://HOST:PORT"),
        ("https:///#enrol=SECRET", "neither a server's address nor a link: give https://HOST:PORT"),
        ("https://fl.example:port/#enrol=SECRET", "neither a server's address nor a link: give https://HOST:PORT"),
        ("https://fl.example/path#enrol=SECRET", "no path, no query and no user"),
        ("https://fl.example/?enrol=SECRET", "no path, no query and no user"),
        ("https://SECRET@fl.example", "no path, no query and no user"),
        ("https://fl.example/#enrol=SECRET%20", "the token of this link is incomplete"),
        ("https://fl.example/#enrol=SECRET&pin=abcd", "the pin of this link is incomplete"),
        (f"http://127.0.0.1/#enrol=SECRET&pin={PIN}", "a pin needs an https:// address"),
        ("two words", "neither a server's address nor a link: give https://HOST:PORT"),
    ],
)
def test_what_is_no_link_is_refused_without_repeating_the_token(text: str, said: str) -> None:
    with pytest.raises(ExperimentError, match=said) as caught:
        read_link(text)
    assert "SECRET" not in str(caught.value)


def test_a_network_that_is_safe_itself_may_be_used_in_the_clear() -> None:
    assert read_link("http://fl.example", insecure=True) == Link("http://fl.example")


def test_a_token_is_never_shown() -> None:
    assert "SECRET" not in repr(read_link(WHOLE))


def test_a_command_line_takes_an_address_and_no_token() -> None:
    assert link_of_command(f"https://fl.example/#pin={PIN}").pin == PIN
    with pytest.raises(
        ExperimentError, match="must not contain a token.*--token-file FILE, or - for standard input"
    ) as caught:
        link_of_command(WHOLE)
    assert "SECRET" not in str(caught.value)
    with pytest.raises(ExperimentError, match="'SECRET' is not a server's address"):
        link_of_command("SECRET")  # it is on the command line already


def test_a_token_comes_from_a_file_from_standard_input_or_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("SECRET\n")
    (tmp_path / "link").write_text(WHOLE + "\n")
    address, whole = "https://fl.example:8443", read_link(WHOLE)
    assert given(address, str(tmp_path / "token"), {}) == Link(address, "SECRET")
    assert given(None, str(tmp_path / "link"), {}) == whole
    assert given(address, str(tmp_path / "link"), {}) == whole
    assert given(f"{address}/#pin={PIN}", None, {"SUMUS_TOKEN": "SECRET"}) == Link(address, "SECRET", PIN)
    assert given(None, None, {"SUMUS_TOKEN": WHOLE}) == whole
    assert given(address, None, {}) == Link(address)
    assert given(None, None, {}) == Link("")
    monkeypatch.setattr("sys.stdin", io.StringIO("SECRET\n"))
    assert given(address, "-", {"SUMUS_TOKEN": "another"}) == Link(address, "SECRET")


def test_of_several_links_of_one_server_a_device_may_use_any() -> None:
    links = "".join(f"https://fl.example/#enrol=SECRET-{n}&pin={PIN}\n" for n in range(3))
    assert read_link(links) == Link("https://fl.example", "SECRET-0 SECRET-1 SECRET-2", PIN)
    for other in (f"https://other.example/#enrol=SECRET-3&pin={PIN}", "https://fl.example/#enrol=SECRET-3"):
        with pytest.raises(ExperimentError, match="not all for one server") as caught:
            read_link(links + other)
        assert "SECRET" not in str(caught.value)


def test_a_link_of_another_server_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="the link is for https://fl.example:8443, but the address is"):
        given("https://other.example", None, {"SUMUS_TOKEN": WHOLE})
    with pytest.raises(ExperimentError, match="--token-file .*nothing cannot be read"):
        given(None, str(tmp_path / "nothing"), {})


@pytest.mark.parametrize("around", ['"{}"', "'{}'", "<{}>", "`{}`", "\u201c{}\u201d", "\ufeff{}\n", ' "{}" \n'])
def test_a_link_that_was_copied_with_quotes_is_the_link(around: str) -> None:
    link = f"https://fl.example:8443/#enrol=abc&pin={'0' * 64}"
    assert read_link(around.format(link)) == read_link(link)
    assert read_link(around.format("https://fl.example:8443")).server == "https://fl.example:8443"


def test_the_command_of_an_edge_names_its_own_option(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="--link-file .*nothing cannot be read"):
        given(None, str(tmp_path / "nothing"), {}, option="--link-file")
    with pytest.raises(ExperimentError, match="give --link-file FILE"):
        given(WHOLE, None, {}, option="--link-file")
