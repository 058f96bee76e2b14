"""What is shown in a terminal. Text from outside is escaped here, so that whoever shows something need not think of it.

echo("kitchen.csv: 40 kept")                 a line on standard output
console().print(table)                      tables and colours, by rich
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
    """Print lines, each escaped by itself: a line feed within one begins no other. error: to standard error."""
    stream = sys.stderr if error else sys.stdout
    print(*map(printable, lines), sep="\n", file=stream, flush=True)


def show_defect(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an exception that nobody expected, as `sys.excepthook` does, each of its lines escaped."""
    echo(*"".join(traceback.format_exception(kind, error, trace)).rstrip("\n").split("\n"), error=True)


def console(error: bool = False) -> Console:
    """A console of rich; of standard output without a terminal it is 120 letters wide. error: of standard error."""
    width = None if error or sys.stdout.isatty() else 120
    return _PlainConsole(stderr=error, markup=False, emoji=False, highlight=False, width=width)


class _PlainConsole(Console):
    """A console that escapes what it shows. Its own colours and movements are segments of control, and pass."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable_lines(segment.text))

    def render_str(self, text: str, **options: Any) -> Any:
        """Text that is measured before it is shown, such as a table's cell, is escaped before."""
        return super().render_str(printable_lines(text), **options)
