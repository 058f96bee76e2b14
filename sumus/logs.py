"""Logs on standard error: text lines for people, or one JSON object per line. Logs contain no names of devices, no
tokens, and no addresses of devices.

    LOG = logger("sumus.server")                instead of logging.getLogger
    log_to(sys.stderr, "json")

Records may quote names of files and answers of other machines, so they are escaped. A record of a logger from `logger`
is escaped before any handler sees it, even a handler of a program that uses sumus as a library. A record of another
library is escaped when it is written to the stream of `log_to`.
"""

import json
import logging
import traceback
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from sumus.text import printable, printable_values

Form = Literal["text", "json"]


def logger(name: str) -> logging.Logger:
    """Return the logger with this name. Its records are escaped."""
    found = logging.getLogger(name)
    if _ESCAPING not in found.filters:
        found.addFilter(_ESCAPING)
    return found


def log_to(stream: TextIO, form: Form = "text", level: int = logging.INFO) -> logging.Handler:
    """Write all log records of sumus, and warnings of libraries, to a stream.

    Args:
        stream: The stream.
        form: Text lines, or one JSON object per line.
        level: The lowest level of sumus's records that are written.

    Returns:
        The handler, for callers that remove it again.
    """
    handler = logging.StreamHandler(stream)
    handler.addFilter(_ESCAPING)
    handler.setFormatter(_Json() if form == "json" else _Text("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("sumus").setLevel(level)
    return handler


def said(record: logging.LogRecord) -> dict[str, Any]:
    """Return the fields that a record has in addition to its message, from `extra={"said": {...}}`."""
    return getattr(record, "said", {})


class _Escaping(logging.Filter):
    """A filter that escapes records and lets all of them pass.

    Lines of a traceback are indented, so that none of them looks like a record.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            record.msg, record.args = printable(record.getMessage()), None
        except (
            TypeError,
            ValueError,
            KeyError,
        ):  # another library's record has wrong arguments; the handler reports that
            return True
        if said(record):
            record.said = printable_values(said(record))
        if record.exc_info and record.exc_info[0] is not None and not record.exc_text:
            lines = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n").split("\n")
            record.exc_text = "\n".join(f"    {printable(line)}" for line in lines)
        return True


_ESCAPING = _Escaping()


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        more = " ".join(f"{name}={value}" for name, value in said(record).items())
        line, *trace = super().format(record).split("\n")
        return "\n".join([line + (f" ({more})" if more else ""), *trace])


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **said(record),
        }
        if record.exc_text:
            line["traceback"] = record.exc_text
        return json.dumps(line, default=str)
