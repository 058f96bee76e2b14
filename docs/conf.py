"""The documentation as a site: `make docs` writes the site to build/site, where it is read from the disk, without a network.

The pages stay where they are, so that a code host shows the same text. This file adapts them as they are read: the tables of
docs/index.md become the navigation, and what only a code host shows (Mermaid, a link to a folder) becomes what a browser
without a network shows.
"""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

project = "sumus"
copyright = "the contributors to sumus"
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md"]
exclude_patterns = ["build", "dist", "runs", "sumus", "tests", "benchmarks", "examples", "deploy", ".*"]
extensions = ["myst_parser"]
myst_heading_anchors = 4  # the anchors that a code host makes
highlight_language = "none"  # a block without a language is a drawing
html_theme = "furo"
html_title = "sumus"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_search_summary = False  # a summary is fetched, and a page that was opened from the disk may fetch nothing

LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")


def navigation(index: str) -> str:
    """Tables of contents, one for each section of docs/index.md whose tables link to pages. Decisions keep their titles.

    Args:
        index: The text of docs/index.md.
    """
    contents: list[str] = []
    for heading, section in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", index, re.M | re.S):
        rows = [row for row in section.splitlines() if row.startswith("|")]
        links = [(words, target) for row in rows for words, target in LINK.findall(row) if target.endswith(".md")]
        entries = [target if heading == "Decisions" else f"{words} <{target}>" for words, target in links]
        if links and heading != "Where things are":
            contents += ["", "```{toctree}", ":hidden:", f":caption: {heading}", "", *entries, "```", ""]
    return "\n".join(contents)


def arrows(diagram: re.Match[str]) -> str:
    """A Mermaid diagram of states as a table, which needs no script of another host."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for line in diagram[1].splitlines():
        if arrow := re.fullmatch(r"\s*(\S+) --> (\w+)(?:: (.+))?", line):
            found[arrow[1]].append(f"| {arrow[1]} | {arrow[2]} | {arrow[3] or ''} |")
    rows = [row for state in found.values() for row in state]
    return "\n".join(["| from | to | by |", "|---|---|---|", *rows, ""]).replace("[*]", "(begin)")


def without_folders(text: str, page: Path) -> str:
    """The text with each link to a folder replaced by the link's words: a site has no listing of a folder."""
    return LINK.sub(lambda link: link[1] if (page.parent / link[2].partition("#")[0]).is_dir() else link[0], text)


def adapt(app: Any, name: str, source: list[str]) -> None:
    """Adapt a page while Sphinx reads the page.

    Args:
        app: Sphinx.
        name: The page's path from the root of the repository, without its ending.
        source: The page's text, the only item of this list, which is replaced.
    """
    text = re.sub(r"^```mermaid\n(.*?)^```\n", arrows, source[0], flags=re.M | re.S)
    text = without_folders(text, ROOT / f"{name}.md")
    source[0] = text + navigation(text) if name == root_doc else text


def write_entrance(app: Any, error: Exception | None) -> None:
    """Write build/site/index.html, which leads to the first page."""
    if error is None:
        entrance = f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html"><title>sumus</title>\n'
        (Path(app.outdir) / "index.html").write_text(entrance, encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this when the build begins."""
    app.connect("source-read", adapt)
    app.connect("build-finished", write_entrance)
    return {"parallel_read_safe": True}
