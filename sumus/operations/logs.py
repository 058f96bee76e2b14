"""Logs on standard error: lines for people, or a JSON object a line. No device, no token and no address of one is in them."""

import json
import logging
import traceback
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

Form = Literal["text", "json"]


def log_to(stream: TextIO, form: Form = "text", level: int = logging.INFO) -> logging.Handler:
    """Let everything that is logged go to a stream, of libraries only warnings; the handler, for whoever takes it away again."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Json() if form == "json" else _Text("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("sumus").setLevel(level)
    return handler


def said(record: logging.LogRecord) -> dict[str, Any]:
    """What a record says besides its message: `extra={"said": {...}}`."""
    return getattr(record, "said", {})


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        more = " ".join(f"{name}={value}" for name, value in said(record).items())
        return super().format(record) + (f" ({more})" if more else "")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **said(record),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, default=str)
