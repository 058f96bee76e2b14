"""Make text from outside safe to show, and write numbers as people write them.

    printable("kitchen\\x1b[2J.csv")             'kitchen\\\\x1b[2J.csv', which no terminal obeys
    printable_lines(text)                       the same for text of several lines
    printable_values(json)                      the same for every text in nested JSON
    many(1, "device")                           '1 device'
    amount(1_400_000)                           '1.4 MB'

Text from outside is, for example, the name of a file or of an archive's member, an MQTT topic, or another machine's
answer. Such text can do harm: a terminal obeys control characters; a line feed makes one log record look like two; and
a bidirectional override shows letters in another order than the text has. These functions replace such characters by
escapes. Every place of sumus that shows text (`sumus.terminal`, `sumus.logs`, the text of errors) calls these
functions, and no other code escapes.
"""

import shlex
from pathlib import Path
from typing import Any, cast


def printable(text: object) -> str:
    """Return the text as one line, with every character that is not printable replaced by an escape such as `\\x1b`.

    Letters of all scripts stay. The escaped characters are control and format characters (including line feeds and
    bidirectional overrides), separators other than a space, lone surrogates, and code points that Unicode has not
    assigned.
    """
    said = str(text)
    if said.isprintable():
        return said
    return "".join(each if each.isprintable() else _escape(each) for each in said)


def printable_lines(text: object) -> str:
    """Escape text of several lines as `printable` does, but keep line feeds."""
    return "\n".join(map(printable, str(text).split("\n")))


def printable_values(value: Any) -> Any:
    """Escape every text in nested lists and mappings, such as parsed JSON; keys too."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [printable_values(each) for each in cast(list[Any], value)]
    if isinstance(value, dict):
        return {printable_values(key): printable_values(each) for key, each in cast(dict[Any, Any], value).items()}
    return value


def many(number: int, noun: str, plural: str = "") -> str:
    """Write a number with its noun: '1 device', '1,204 devices'.

    Args:
        number: The number of things.
        noun: The noun in the singular.
        plural: The plural, if it is not the singular plus "s".
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def amount(count: float) -> str:
    """Write a number of bytes in units of a thousand: '1 byte', '512 bytes', '1.4 MB'."""
    if count < 1000:
        return many(round(count), "byte")
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:,.1f} TB"


def over(size: int, most: int) -> str:
    """Write a size in bytes next to its limit: '9.0 MB, and at most 8.4 MB'. Both are exact if their short forms are equal."""
    one, other = amount(size), amount(most)
    return f"{size:,} bytes, and at most {most:,}" if one == other else f"{one}, and at most {other}"


def ago(seconds: float) -> str:
    """Write a duration in seconds in a short form: '3 min', '5 d'."""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def whole_number(text: str, digits: int = 18) -> int | None:
    """Parse a number that consists of at most `digits` ASCII digits; return None for every other text.

    Use this function for numbers that somebody else wrote. Python's own `int` also accepts signs, blanks, underscores
    and digits of other scripts, and it raises an error for more than 4,300 digits.
    """
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= digits else None


def shell_word(path: str | Path) -> str:
    """Quote a path for a shell command that a message proposes. A path that begins with a hyphen gets `./`, so that it
    is not read as an option.
    """
    said = str(path)
    return shlex.quote(f"./{said}" if said.startswith("-") else said)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
