"""Draw docs/protocol.md's diagrams and tables from the protocol's own tables.

python docs/draw_protocol.py            writes them between their markers
"""

import inspect
import re
from collections import defaultdict
from pathlib import Path

from sumus.protocol import round as server
from sumus.protocol import session as device

PAGE = Path(__file__).parent / "protocol.md"


def summary(rule: object) -> str:
    """The first line of a rule's docstring."""
    return (inspect.getdoc(rule) or "").splitlines()[0]


def round_diagram() -> str:
    """States and what leads from one to the next, as Mermaid draws it."""
    arrows: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for (state, event), entry in server.TABLE.items():
        for to in entry.to:
            arrows[state, to].append(event.__name__)
    lines = [f"    {one} --> {other}: {', '.join(events)}" for (one, other), events in arrows.items()]
    return "\n".join(["```mermaid", "stateDiagram-v2", "    [*] --> planned", *lines, "```"])


def round_table() -> str:
    """What each event does, by rule."""
    rows: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for (state, event), entry in server.TABLE.items():
        rows[event.__name__, summary(entry.rule)].append(f"`{state}`")
    everywhere = len(server.ORDER)
    lines = ["| event | in | what is done |", "| --- | --- | --- |"]
    for (event, said), states in rows.items():
        lines.append(f"| `{event}` | {'every state' if len(states) == everywhere else ', '.join(states)} | {said} |")
    return "\n".join(lines)


def session_table() -> str:
    """What a device does, by phase."""
    lines = ["| phase | event | what it does |", "| --- | --- | --- |"]
    for (phase, event), rule in device.TABLE.items():
        lines.append(f"| `{phase}` | `{event.__name__}` | {summary(rule)} |")
    return "\n".join(lines)


def drawn(page: str) -> str:
    """The page with everything between its markers drawn anew."""
    for name, text in (("diagram", round_diagram()), ("round", round_table()), ("session", session_table())):
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
