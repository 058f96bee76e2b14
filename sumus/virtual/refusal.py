"""Refusals of a worker: the response to a refused request is a code and a sentence."""

from sumus.text import printable
from sumus.virtual.messages import Code


class RequestRefused(Exception):
    """The worker refuses a request, and sends this refusal to the caller.

    Args:
        code: A key of `sumus.virtual.messages.STATUS`.
        detail: A sentence for a person.
    """

    def __init__(self, code: Code, detail: str) -> None:
        super().__init__(printable(f"{code}: {detail}"))
        self.code: Code = code
        self.detail = detail


def impossible(name: str, error: Exception) -> RequestRefused:
    """Return the refusal of an operation that torch cannot do.

    Args:
        name: The operation.
        error: The exception that torch raised.
    """
    return RequestRefused("impossible", f"{name}: {first_line(error)}")


def first_line(error: Exception) -> str:
    """Return the first line of an exception's text, or its class's name if it has no text."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
