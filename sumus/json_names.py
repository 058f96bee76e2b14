"""Names in a text of JSON. RFC 8259 leaves open what a name means that stands twice in one object, and readers take the last one.

    repeated(b'{"label": 1,\\n "label": 2}')          ("label", 2): the name, and the line of the second

Where a person writes JSON, such a text is refused: one of the two values was a mistake.
"""

import json
import re
from typing import Any

_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\],:\n]', re.DOTALL)


def repeated(body: bytes) -> tuple[str, int] | None:
    """Look for a name that stands twice in one object.

    Args:
        body: A text of JSON in UTF-8. Another text has no names.

    Returns:
        The first such name, and the line of its second place, from 1; None if there is none.
    """
    try:
        json.loads(body, object_pairs_hook=_once, parse_int=len, parse_float=len)
    except _RepeatedError:
        return _place(body)
    except (ValueError, RecursionError):
        pass
    return None


class _RepeatedError(Exception):
    """A name stands twice."""


def _once(pairs: list[tuple[str, Any]]) -> None:
    if len(pairs) > 1 and len({name for name, _ in pairs}) < len(pairs):
        raise _RepeatedError


def _place(body: bytes) -> tuple[str, int]:
    """The first name that stands twice, and its line."""
    line, last = 1, b""
    names: list[set[str] | None] = []
    for found in _TOKENS.finditer(body):
        token = found[0]
        if token == b"\n":
            line += 1
        elif token in (b"{", b"["):
            names.append(set() if token == b"{" else None)
        elif token in (b"}", b"]"):
            names.pop()
        elif token == b":" and names and (known := names[-1]) is not None:
            name = str(json.loads(last))
            if name in known:
                return name, line
            known.add(name)
        elif token[:1] == b'"':
            last = token
    raise AssertionError("a name that stands twice stands somewhere")
