"""Tables of results, which are printed, and kept in docs/results.md between markers."""

from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results.md"


def write_table(name: str, caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], write: bool) -> None:
    """Print a Markdown table; with `write`, replace the part of the page between `<!-- NAME -->` and `<!-- /NAME -->`."""
    lines = [caption, "", _row(header), _row(["---"] * len(header)), *map(_row, rows)]
    text = "\n".join(lines)
    print(text)
    if not write:
        return
    page, start, stop = PAGE.read_text(), f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, _, rest = page.partition(start)
    _, found, after = rest.partition(stop)
    if not found:
        raise SystemExit(f"{PAGE} has no place for {name!r}: add {start!r} and {stop!r}")
    PAGE.write_text(before + start + text + "\n" + stop + after)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
