"""Output to a terminal.

    echo("kitchen.csv: 40 kept")                a line on standard output
    console().print(table)                      tables and colors, by rich

These functions escape text that comes from outside, so their callers do not have to escape it.
"""

import sys
import traceback
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from sumus.text import printable, printable_lines


def echo(*lines: object, error: bool = False) -> None:
    """Print lines. Each line is escaped on its own, so that a line feed inside a line does not start a new line.

    Args:
        lines: The lines.
        error: Print to standard error.
    """
    stream = sys.stderr if error else sys.stdout
    print(*map(printable, lines), sep="\n", file=stream, flush=True)


def show_defect(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an unexpected exception as `sys.excepthook` does, with each line escaped."""
    echo(*"".join(traceback.format_exception(kind, error, trace)).rstrip("\n").split("\n"), error=True)


def console(error: bool = False) -> Console:
    """Return a console of the library rich. Standard output that is not a terminal is 120 characters wide.

    Args:
        error: Write to standard error.
    """
    width = None if error or sys.stdout.isatty() else 120
    return _PlainConsole(stderr=error, markup=False, emoji=False, highlight=False, width=width)


class _PlainConsole(Console):
    """A console that escapes the text that it shows. Its own colors and cursor movements are control segments, and are
    not escaped.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable_lines(segment.text))

    def render_str(self, text: str, **options: Any) -> Any:
        """Escape text that is measured before it is shown, such as the cell of a table."""
        return super().render_str(printable_lines(text), **options)
