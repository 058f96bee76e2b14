"""Find a name that appears twice in one object of a JSON text. RFC 8259 does not define the meaning of such a name; most
parsers use the last value.

    repeated(b'{"label": 1,\\n "label": 2}')          ("label", 2): the name, and the line where it appears again

If a person wrote the JSON, one of the two values was a mistake. So sumus refuses such a text.
"""

import json
import re
from typing import Any

_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\],:\n]', re.DOTALL)


def repeated(body: bytes) -> tuple[str, int] | None:
    """Find the first name that appears twice in one object of a JSON text.

    Args:
        body: The text, in UTF-8. For a body that is not JSON, the result is None.

    Returns:
        The name, and the line of its second occurrence, counted from 1; None if no name is repeated.
    """
    try:
        json.loads(body, object_pairs_hook=_once, parse_int=len, parse_float=len)
    except _RepeatedError:
        return _place(body)
    except (ValueError, RecursionError):
        pass
    return None


class _RepeatedError(Exception):
    """A name appears twice in one object."""


def _once(pairs: list[tuple[str, Any]]) -> None:
    if len(pairs) > 1 and len({name for name, _ in pairs}) < len(pairs):
        raise _RepeatedError


def _place(body: bytes) -> tuple[str, int]:
    """Return the first name that appears twice in one object, and the line of its second occurrence."""
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
    raise AssertionError("a name that appears twice must appear somewhere")
