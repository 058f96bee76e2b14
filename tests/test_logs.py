"""Logs are lines for people, or an object a line."""

import io
import json
import logging

from sumus.logs import log_to


def written(form: str) -> str:
    stream = io.StringIO()
    handler = log_to(stream, form)  # pyright: ignore[reportArgumentType]
    try:
        logging.getLogger("sumus.admin").info("pause", extra={"said": {"task": "health"}})
        logging.getLogger("uvicorn.error").info("a connection came")
        try:
            raise OSError("the disk is full")
        except OSError:
            logging.getLogger("sumus.server").exception("nothing can be decided now")
    finally:
        logging.getLogger().removeHandler(handler)
        logging.getLogger("sumus").setLevel(logging.NOTSET)
    return stream.getvalue()


def test_an_object_a_line() -> None:
    pause, failure = (json.loads(line) for line in written("json").splitlines())
    assert (pause["logger"], pause["level"], pause["message"], pause["task"]) == (
        "sumus.admin",
        "info",
        "pause",
        "health",
    )
    assert pause["time"].endswith("+00:00")
    assert "the disk is full" in failure["traceback"]


def test_a_line_for_people() -> None:
    first = written("text").splitlines()[0]
    assert first.endswith("INFO sumus.admin: pause (task=health)")
