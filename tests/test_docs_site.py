"""The documentation is a site: every link leads somewhere, a search finds words, and no page asks another host for anything."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ASKS = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "link": "href",
    "object": "data",
    "form": "action",
}
"""The attribute by which an element makes a browser ask for something, or send something. A link is asked for by a person."""


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Build a site as `make docs` does."""
    options = ["--quiet", "--fail-on-warning", "--keep-going", "-c", str(ROOT / "docs"), "-d", str(out / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, str(source), str(out / "site")]
    return subprocess.run(command, capture_output=True, text=True, cwd=source)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr  # a warning is a link or an anchor that leads nowhere
    return out / "site"


class Elements(HTMLParser):
    """The elements of a page.

    Attributes:
        asked: What a browser asks for when it shows the page.
        links: Where the links of the page lead.
        ids: The anchors of the page.
    """

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ASKS and ASKS[tag] in given:
            self.asked.append(given[ASKS[tag]])
        self.asked += [word.split()[0] for word in given.get("srcset", "").split(",") if word.strip()]


def test_no_page_asks_another_host_for_anything(site: Path) -> None:
    foreign = re.compile(r"(?:https?:)?//")
    for page in site.rglob("*.html"):
        asked = Elements(page).asked
        assert not [target for target in asked if foreign.match(target)], page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\(\s*['\"]?(?:https?:)?//", style.read_text(encoding="utf-8")), style.name


def test_links_within_the_site_lead_to_a_file_and_an_anchor(site: Path) -> None:
    pages = {page: Elements(page) for page in site.rglob("*.html")}
    for page, elements in pages.items():
        for link in elements.links:
            if re.match(r"[a-z]+:", link):
                assert link.startswith("https://"), f"{page.name}: {link}"
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.is_file(), f"{page.name}: {link}"
            if anchor and target.suffix == ".html":
                assert anchor in pages[target].ids, f"{page.name}: {link}"


def test_the_search_knows_every_page_and_its_words(site: Path) -> None:
    script = (site / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(script.removeprefix("Search.setIndex(").removesuffix(")"))
    pages = {path.relative_to(ROOT).with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= set(index["docnames"])
    for word, page in (
        ("sybil", "docs/glossary"),
        ("明文模式", "docs/tutorials/quickstart.zh"),
        ("sqlite", "docs/server"),
    ):
        found = [of for term, of in index["terms"].items() if term.startswith(word)]
        assert index["docnames"].index(page) in {n for of in found for n in ([of] if isinstance(of, int) else of)}, word
    assert 'src="searchindex.js"' in (site / "search.html").read_text(encoding="utf-8")  # loaded, and not fetched


def test_a_diagram_needs_no_script_of_another_host(site: Path) -> None:
    """The arrows of a Mermaid diagram are a table."""
    page = (site / "docs" / "protocol.html").read_text(encoding="utf-8")
    assert "stateDiagram" not in page
    assert re.search(r"<td[^>]*><p>planned</p></td>\s*<td[^>]*><p>open</p></td>\s*<td[^>]*><p>Tick</p></td>", page)


def test_the_first_page_leads_to_every_other(site: Path) -> None:
    entrance = (site / "index.html").read_text(encoding="utf-8")
    first = site / re.search(r"url=([^\"]+)", entrance)[1]  # type: ignore[index]
    reached = {(first.parent / link.partition("#")[0]).resolve() for link in Elements(first).links}
    for page in [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]:
        assert site / page.relative_to(ROOT).with_suffix(".html") in {*reached, first}, page.name


def test_a_link_that_leads_nowhere_stops_the_build(tmp_path: Path) -> None:
    """The control."""
    docs = tmp_path / "source" / "docs"
    docs.mkdir(parents=True)
    (docs / "other.md").write_text("# Other\n\nText.\n")
    links = "[one](nowhere.md), [another](other.md#no-such-heading)"
    (docs / "index.md").write_text(f"# Index\n\n## Pages\n\n| page |\n|---|\n| [other](other.md) |\n\n{links}\n")
    done = build(tmp_path / "source", tmp_path)
    assert done.returncode != 0
    assert "nowhere.md" in done.stderr
    assert "no-such-heading" in done.stderr


def test_make_docs_builds_it_so() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (line,) = re.findall(r"^\t\$\(BIN\)/sphinx-build (.+)$", makefile, re.MULTILINE)
    assert line == "--quiet --fail-on-warning --keep-going -c docs -d build/doctrees . build/site"
    assert shutil.which("make") is None or "build/" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()
