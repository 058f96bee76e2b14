"""Draw docs/protocol.md's diagrams and tables from the protocol's own tables.

python docs/draw_protocol.py            writes them between their markers
"""

import inspect
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from sumus.protocol import edge, site
from sumus.protocol import round as server
from sumus.protocol import session as device

PAGE = Path(__file__).parent / "protocol.md"


Table: TypeAlias = Mapping[Any, Any]


def summary(rule: object) -> str:
    """Return the first sentence of a rule's docstring."""
    paragraph = " ".join((inspect.getdoc(rule) or "").partition("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z`])", paragraph)[0]


def diagram(table: Table, first: str) -> str:
    """Return the states of a table, and the events that lead from one to the next, as Mermaid draws them."""
    arrows: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for (state, event), entry in table.items():
        for to in entry.to:
            arrows[state, to].append(event.__name__)
    lines = [f"    {one} --> {other}: {', '.join(events)}" for (one, other), events in arrows.items()]
    return "\n".join(["```mermaid", "stateDiagram-v2", f"    [*] --> {first}", *lines, "```"])


def event_table(table: Table, states: int) -> str:
    """Return what each event does in which states, by rule. states: how many states there are."""
    rows: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for (state, event), entry in table.items():
        rows[event.__name__, summary(entry.rule)].append(f"`{state}`")
    lines = ["| event | in | what is done |", "| --- | --- | --- |"]
    for (event, said), where in rows.items():
        lines.append(f"| `{event}` | {'every state' if len(where) == states else ', '.join(where)} | {said} |")
    return "\n".join(lines)


def session_table() -> str:
    """Return what a device does, by phase."""
    lines = ["| phase | event | what it does |", "| --- | --- | --- |"]
    for (phase, event), rule in device.TABLE.items():
        lines.append(f"| `{phase}` | `{event.__name__}` | {summary(rule)} |")
    return "\n".join(lines)


def site_table() -> Table:
    """Return a site's table without the entries that are the edge's table's."""
    first = site.SiteState.FIRST_ROUND
    same = {(first, event) for _, event in edge.TABLE if event is not edge.RoundClosed}
    return {at: entry for at, entry in site.TABLE.items() if at not in same}


def drawn(page: str) -> str:
    """Return the page with everything between its markers drawn anew."""
    drawings = {
        "diagram": diagram(server.TABLE, "planned"),
        "round": event_table(server.TABLE, len(server.ORDER)),
        "session": session_table(),
        "edge diagram": diagram(edge.TABLE, "waiting"),
        "edge": event_table(edge.TABLE, len(edge.EdgeState)),
        "site diagram": diagram(site.TABLE, "first_round"),
        "site": event_table(site_table(), len(site.SiteState)),
    }
    for name, text in drawings.items():
        page, found = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda match, text=text: match[1] + text + "\n" + match[2],
            page,
            flags=re.S,
        )
        if not found:
            raise SystemExit(f"{PAGE} has no marker <!-- {name} -->")
    return page


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
