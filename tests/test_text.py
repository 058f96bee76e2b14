"""Text from outside is shown without what a terminal obeys, and numbers from outside are read in one way."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sumus.text import printable, printable_lines, printable_values, whole_number


@given(st.text(st.characters()))
def test_what_is_shown_is_one_line_without_control_characters(text: str) -> None:
    shown = printable(text)
    assert not any(unicodedata.category(each) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") for each in shown)
    assert printable(shown) == shown
    assert shown == text or not text.isprintable()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", "a\\nb"), ("\x1b[2J", "\\x1b[2J"), ("\x9b", "\\x9b"), ("\u202e", "\\u202e"), ("\u2066", "\\u2066"),
        ("\u2028", "\\u2028"), ("\udc80", "\\udc80"), ("\U000e0041", "\\U000e0041"), ("\x7f\t", "\\x7f\\t"),
        ("é 厨 ☕", "é 厨 ☕"),
    ],
)  # fmt: skip
def test_an_escape_says_which_character_it_was(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_several_lines_and_nested_values() -> None:
    assert printable_lines("a\x07\nb") == "a\\x07\nb"
    assert printable_values({"a\n": ["\x1b", 1, None, {"b": "\r"}]}) == {"a\\n": ["\\x1b", 1, None, {"b": "\\r"}]}
    assert printable(KeyError("x\x1b")) == "'x\\x1b'"


@given(st.integers(0, 10**18 - 1))
def test_a_number_of_digits_is_read(number: int) -> None:
    assert whole_number(str(number)) == number


@pytest.mark.parametrize("text", ["", "-1", "+1", " 1", "1_0", "1.0", "٣", "²", "1e3", "9" * 19, "9" * 5000])
def test_any_other_text_is_no_number(text: str) -> None:
    assert whole_number(text) is None
