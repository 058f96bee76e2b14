"""Text from outside, made safe to show: names of files, members of archives, topics, what another machine answers. And numbers as
people write them: `many(1, "device")` is '1 device', `amount(1_400_000)` is '1.4 MB'.

    printable("kitchen\\x1b[2J.csv")             'kitchen\\\\x1b[2J.csv', which no terminal obeys
    printable_lines(text)                       the same, where several lines are meant
    printable_values(json)                      the same for every text in nested JSON

A terminal obeys control characters, a log's reader takes a line feed for the next record, and a bidirectional override shows
letters in another order than they are in. So these characters are written as their escapes. Every place of sumus that shows
text (`sumus.terminal`, `sumus.logs`, the text of errors) calls these functions, and no other code escapes.
"""

import shlex
from pathlib import Path
from typing import Any, cast


def printable(text: object) -> str:
    """The text in one line without characters that are not shown as themselves; those become escapes such as `\\x1b`.

    Letters of all scripts stay. Escaped are control and format characters (line feeds and bidirectional overrides among them),
    separators other than a blank, halves of surrogate pairs, and what Unicode has not assigned.
    """
    said = str(text)
    if said.isprintable():
        return said
    return "".join(each if each.isprintable() else _escape(each) for each in said)


def printable_lines(text: object) -> str:
    """The same for text of several lines: line feeds stay."""
    return "\n".join(map(printable, str(text).split("\n")))


def printable_values(value: Any) -> Any:
    """The same for every text in nested lists and mappings, such as JSON gives them; keys too."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [printable_values(each) for each in cast(list[Any], value)]
    if isinstance(value, dict):
        return {printable_values(key): printable_values(each) for key, each in cast(dict[Any, Any], value).items()}
    return value


def many(number: int, noun: str, plural: str = "") -> str:
    """A number of things: '1 device', '1,204 devices'. plural: of nouns that take more than an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def amount(count: float) -> str:
    """Bytes in units of a thousand: '1 byte', '512 bytes', '1.4 MB'."""
    if count < 1000:
        return many(round(count), "byte")
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:,.1f} TB"


def over(size: int, most: int) -> str:
    """Bytes beside the most that may be: '9.0 MB, and at most 8.4 MB'; exact where the two would read alike."""
    one, other = amount(size), amount(most)
    return f"{size:,} bytes, and at most {most:,}" if one == other else f"{one}, and at most {other}"


def ago(seconds: float) -> str:
    """A duration, short."""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def whole_number(text: str, digits: int = 18) -> int | None:
    """A number of ASCII digits, at most so many; None for every other text.

    Numbers that somebody else wrote are read by this function. Python's own `int` also takes signs, blanks, underscores and
    digits of other scripts, and raises for more than 4,300 digits.
    """
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= digits else None


def shell_word(path: str | Path) -> str:
    """A path as a word of a shell's command, for a message that says what to run. What begins with a hyphen is no option."""
    said = str(path)
    return shlex.quote(f"./{said}" if said.startswith("-") else said)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
