"""The documentation is true: its code runs; its names, rules, commands and links exist; nothing public is left out."""

import inspect
import itertools
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import sumus
from sumus.plan import RULES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
API = ROOT / "docs" / "api.md"
RUNNABLE = ("python",)
SHELL = ("sh", "bash", "console", "shell")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """(line of its first line, text) of every fenced block in one of these languages."""
    text = page.read_text(encoding="utf-8")
    fences = re.finditer(r"^```([^\n`]*)\n(.*?)^```[ \t]*$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, fence.start(2)) + 1, fence[2]) for fence in fences if fence[1].strip() in languages]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```[ \t]*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def section(page: Path, heading: str) -> str:
    """What stands under a heading of the second level."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", page.read_text(encoding="utf-8"), re.M | re.S)
    assert found, f"{name_of(page)} has no section {heading!r}"
    return found[1]


def first_cells(text: str) -> list[str]:
    """The code in the first cell of every table row that begins with code."""
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


# ── code ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, *RUNNABLE)], ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One namespace a page, in order, in an empty folder; a failure names the page and the line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    module = ModuleType(f"docs_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for line, code in blocks(page, *RUNNABLE):
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), module.__dict__)


def test_pages_that_promise_code_have_some() -> None:
    docs = ROOT / "docs"
    for page in (
        ROOT / "README.md",
        ROOT / "README.zh.md",
        docs / "idea.md",
        docs / "device.md",
        docs / "node.md",
        *(docs / f"{name}.md" for name in ("data", "model-code", "update", "reproducibility", "loop", "server")),
        API,
    ):
        assert blocks(page, *RUNNABLE), f"{name_of(page)} has no Python block that a test runs"


def test_every_fence_is_known() -> None:
    """A misspelt language would take a block out of the tests."""
    for page in PAGES:
        opened = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(opened) % 2 == 0, f"{name_of(page)} leaves a fence open"
        unknown = set(opened[::2]) - {"", "mermaid", *RUNNABLE, *SHELL}
        assert not unknown, f"{name_of(page)} has blocks in {sorted(unknown)}"


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def public_names() -> set[str]:
    """Every public name, and every public function and class of the public modules: `Task`, `losses.cross_entropy`."""
    names: set[str] = set()
    for name in sumus.__all__:
        value = getattr(sumus, name)
        if not inspect.ismodule(value):
            names.add(name)
            continue
        names |= {
            f"{name}.{own}"
            for own, member in vars(value).items()
            if not own.startswith("_")
            and (inspect.isfunction(member) or inspect.isclass(member))
            and f"{member.__module__}.".startswith(f"{value.__name__}.")
        }
    return names


def resolve(dotted: str) -> Any:
    value: Any = sumus
    for word in dotted.split("."):
        value = getattr(value, word)
    return value


def documented() -> dict[str, str | None]:
    """Public name → its parameters as listed in api.md, None where none are listed."""
    rows = [
        re.fullmatch(r"sumus\.([\w.]+)(?:\((.*)\))?", cell) for cell in first_cells(API.read_text(encoding="utf-8"))
    ]
    names = [row for row in rows if row]
    twice = sorted({row[1] for row in names if [other[1] for other in names].count(row[1]) > 1})
    assert not twice, f"docs/api.md lists {twice} twice"
    return {row[1]: row[2] for row in names}


def test_api_lists_every_public_name_and_no_other() -> None:
    assert not public_names() - set(documented()), "docs/api.md lacks these names"
    assert not set(documented()) - public_names(), "docs/api.md has names that are not public"


def test_api_names_every_public_module() -> None:
    headings = re.findall(r"^### `sumus\.(\w+)`", API.read_text(encoding="utf-8"), re.MULTILINE)
    modules = {name for name in sumus.__all__ if inspect.ismodule(getattr(sumus, name))}
    assert set(headings) <= modules
    assert modules <= {name.partition(".")[0] for name in documented() if "." in name}


@pytest.mark.parametrize("name", sorted(name for name, parameters in documented().items() if parameters is not None))
def test_api_lists_parameters_in_order(name: str) -> None:
    assert documented()[name] == ", ".join(inspect.signature(resolve(name)).parameters)


def test_api_lists_the_parameters_of_every_function() -> None:
    bare = [n for n, parameters in documented().items() if parameters is None and inspect.isfunction(resolve(n))]
    assert not bare


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_in_text_exist(page: Path) -> None:
    """Every `sumus.x.y` in inline code, as far as it is a path of names."""
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        for dotted in re.findall(r"(?<![\w/.])sumus\.([A-Za-z_][\w.]*\w)(?!\.)", code):
            if dotted in ("X", "db"):  # any name, in the first line of api.md; a file
                continue
            importable = dotted.split(".")[0] in {path.stem for path in (ROOT / "sumus").iterdir()}
            assert importable or hasattr_path(dotted), f"{name_of(page)}: there is no sumus.{dotted}"


def hasattr_path(dotted: str) -> bool:
    try:
        resolve(dotted)
    except AttributeError:
        return False
    return True


# ── rules ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def rules_in_code() -> set[str]:
    """Names of `RULES`, and every literal name that PlanError is raised with."""
    raised = {
        name
        for file in (ROOT / "sumus").rglob("*.py")
        for name in re.findall(r'PlanError\(\s*"([^"]*)"', file.read_text(encoding="utf-8"))
    }
    return {rule.name for rule in RULES} | raised


def test_api_lists_every_plan_rule_and_no_other() -> None:
    listed = first_cells(section(API, "Plan rules"))
    assert len(listed) == len(set(listed))
    assert not rules_in_code() - set(listed), "docs/api.md lacks these rules"
    assert not set(listed) - rules_in_code(), "docs/api.md has rules that do not exist"


def test_deployed_rules_are_said_to_be_so() -> None:
    when = dict(re.findall(r"^\| `([\w-]+)` \| ([^|]+) \|", section(API, "Plan rules"), re.MULTILINE))
    for rule in RULES:
        assert ("deploying" in when[rule.name]) == (rule.where == "deployed"), rule.name


# ── words ────────────────────────────────────────────────────────────────────────────────────────────────────────────


WORDS = (
    *("population", "cohort", "round", "client", "device", "edge", "participant", "task", "plan", "experiment"),
    *("update", "part", "aggregate", "broadcast", "report", "assignment", "session", "weight", "clip norm"),
    *("noise multiplier", "staleness", "buffer"),
)


def test_glossary_explains_each_word_once() -> None:
    words = re.findall(r"^\| ([^|`]+?) \| ", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    words = [word for word in words if word not in ("word", "---")]
    assert sorted(words) == sorted(set(words))
    assert set(WORDS) <= set(words)


# ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def commands() -> dict[str, Any]:
    """The commands of `sumus`, by name; those of a group by both words, `admin token`."""
    from sumus.cli import app

    def within(group: Any, before: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, command in vars(group)["commands"].items():
            found |= within(command, f"{name} ") if "commands" in vars(command) else {before + name: command}
        return found

    return within(typer.main.get_command(app), "")


def command_of(words: list[str]) -> str | None:
    """The command that a line's words begin with."""
    return next((name for name in (" ".join(words[:2]), words[0]) if name in commands()), None)


def options(command: Any) -> set[str]:
    """The options of a command; `--help` and the `--no-` half of a switch left out."""
    names = {name for parameter in command.params for name in parameter.opts if name.startswith("-")}
    return names - {"--help"}


def shell_lines(page: Path) -> list[str]:
    """Commands in shell blocks, and inline code that is one."""
    lines = [line.strip().removeprefix("$ ") for _, text in blocks(page, *SHELL) for line in text.splitlines()]
    lines += re.findall(r"`((?:sumus|make) [^`\n]+)`", prose(page))
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_text_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for line in shell_lines(page):
        words = shlex.split(line, comments=True)
        program, *arguments = itertools.dropwhile(
            re.compile(r"[A-Z]+=").match, words
        )  # an environment's variables stand first
        program = program.rpartition("/")[2]
        if program == "make":
            assert set(arguments) <= targets, f"{name_of(page)}: `{line}` is no target of the Makefile"
        elif program == "sumus":
            assert arguments, f"{name_of(page)}: `{line}` names no command"
            name = command_of(arguments)
            assert name is not None, f"{name_of(page)}: `{line}` is no command"
            given = {argument.partition("=")[0] for argument in arguments[1:] if argument.startswith("-")} - {"-"}
            unknown = given - options(commands()[name])
            assert not unknown, f"{name_of(page)}: `{line}` has no {sorted(unknown)}"
        else:
            assert program in ("python", "pip", "cd", "git"), f"{name_of(page)}: `{line}` is checked by no test"


def test_api_lists_every_command_and_option() -> None:
    rows = re.findall(r"^\| `sumus ([^`]*)` \|([^|]*)\|", section(API, "Command line"), re.MULTILINE)
    listed = {command_of(words.split()): set(re.findall(r"`(-[\w-]+)`", cell)) for words, cell in rows}
    long = {
        name: {option for option in options(command) if option.startswith("--")} for name, command in commands().items()
    }
    assert listed == long


def test_api_lists_every_demo() -> None:
    from sumus.demos.commands import Demo

    (row,) = (line for line in section(API, "Command line").splitlines() if line.startswith("| `sumus demo"))
    for name in Demo:
        assert f"`{name}`" in row


def test_help_lists_the_commands() -> None:
    from sumus.cli import app

    for name in commands():
        *group, last = name.split()
        shown = CliRunner().invoke(app, [*group, "--help"])
        assert shown.exit_code == 0
        assert re.search(rf"^\W*{last}\b", shown.output, re.MULTILINE), name
        assert CliRunner().invoke(app, [*group, last, "--help"]).exit_code == 0


# ── links ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as a forge makes them."""
    headings = re.findall(r"^#+ +(.+?)\s*$", prose(page), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", h)).lower() for h in headings)
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), f"{name_of(page)}: {link}"
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)} links to {path}, which does not exist"
        assert target.is_relative_to(ROOT), f"{name_of(page)} links out of the project: {path}"
        if anchor:
            assert anchor in anchors(target), (
                f"{name_of(page)} links to #{anchor}, which {name_of(target)} does not have"
            )


def test_index_lists_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {
        (index.parent / link.partition("#")[0]).resolve() for link in re.findall(r"\]\(([^)\s]+)\)", prose(index))
    }
    missing = [name_of(page) for page in PAGES if page != index and page not in linked]
    assert not missing


def test_readme_fits_two_screens_and_says_what_is_hidden() -> None:
    from sumus.server.status import CLEAR_MODE

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert CLEAR_MODE in " ".join(text.split())


def test_both_readmes_have_the_same_code_and_the_same_rows() -> None:
    """What a translation may not change: commands, programs, links to files, and how many rows a table has."""
    english, chinese = ROOT / "README.md", ROOT / "README.zh.md"

    def bare(code: str) -> str:
        return re.sub(r"\s*#.*", "", code)

    for language in (*RUNNABLE, *SHELL):
        ours, theirs = ([bare(code) for _, code in blocks(page, language)] for page in (english, chinese))
        assert ours == theirs
    for pattern in (r"\]\(([^)#\s]+)", r"^\|.*\|$", r"`([^`\n]+)`"):
        found = [re.findall(pattern, prose(page), re.MULTILINE) for page in (english, chinese)]
        if pattern.startswith("^"):
            assert len(found[0]) == len(found[1])
        else:
            assert sorted(set(found[0]) - {"README.zh.md"}) == sorted(set(found[1]) - {"README.md"})


# ── tutorials ────────────────────────────────────────────────────────────────────────────────────────────────────────

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))


@pytest.mark.parametrize("page", TUTORIALS, ids=name_of)
def test_a_tutorial_is_short_and_its_code_runs(page: Path) -> None:
    assert 80 <= len(page.read_text(encoding="utf-8").splitlines()) <= 200
    assert blocks(page, *RUNNABLE), f"{name_of(page)} has no Python block that a test runs"


def without_words(code: str) -> str:
    """Code as it is compared with its translation: without comments and docstrings."""
    return re.sub(r'""".*?"""', '""""""', re.sub(r"[ ]*#.*", "", code), flags=re.DOTALL)


def test_the_chinese_quickstart_has_the_code_of_the_english_one() -> None:
    english, chinese = ROOT / "docs" / "quickstart.md", ROOT / "docs" / "tutorials" / "quickstart.zh.md"
    for language in (*RUNNABLE, *SHELL):
        ours, theirs = ([without_words(code) for _, code in blocks(page, language)] for page in (english, chinese))
        assert ours == theirs
    sections = [len(re.findall(r"^## ", page.read_text(encoding="utf-8"), re.MULTILINE)) for page in (english, chinese)]
    assert sections[1] == sections[0] + 1  # the last one says what can be promised today


# ── pages that cannot lie ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_reading_order_counts_its_lines() -> None:
    order = section(ROOT / "docs" / "index.md", "Reading order").partition("Then read")[0]
    said = re.search(r"(\w+) files, about ([\d,]+) lines", order)
    assert said
    files = [ROOT / "docs" / link for link in re.findall(r"\]\(([^)]+)\)", order)]
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    assert (said[1], len(files)) == ("four", 4)
    assert abs(lines - int(said[2].replace(",", ""))) <= 50, f"the four files have {lines} lines"


def test_the_index_lists_decisions_in_order_by_their_titles() -> None:
    rows = re.findall(r"^\| (\d+) \| \[(.+)\]\((.+)\) \|$", section(ROOT / "docs" / "index.md", "Decisions"), re.M)
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [ROOT / "docs" / link for _, _, link in rows] == pages
    for (number, words, _), page in zip(rows, pages, strict=True):
        title = page.read_text(encoding="utf-8").splitlines()[0]
        assert page.name.startswith(f"{int(number):04d}-")
        assert title.lower().startswith(f"# {number}. {words}".lower()), f"{name_of(page)} is called {title!r}"


def test_where_things_are_is_answered_by_three_files_that_exist() -> None:
    rows = re.findall(r"^\| (.+\?) \| (.+) \|$", section(ROOT / "docs" / "index.md", "Where things are"), re.MULTILINE)
    assert len(rows) >= 5
    for question, answer in rows:
        files = set(re.findall(r"`(sumus/[\w/]+\.py)`", answer))
        assert 1 <= len(files) <= 3, question
        assert all((ROOT / file).is_file() for file in files), f"{question}: {sorted(files)}"
        code = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
        for kind, method in re.findall(r"`([A-Z]\w+)\.([a-z]\w+)`", answer):
            assert f"class {kind}" in code, f"{question}: {kind}"
            assert f"def {method}(" in code, f"{question}: {kind}.{method}"


def test_paths_in_text_exist() -> None:
    """Every path of a Python file in inline code. Decisions and the changelog name places as they were."""
    for page in PAGES:
        if page.parent.name == "decisions" or page.name == "CHANGELOG.md":
            continue
        for path in re.findall(r"`((?:sumus|tests|benchmarks|docs|examples|deploy)/[\w/.-]+\.py)`", prose(page)):
            assert (ROOT / path).is_file() or "NAME" in path or "TARGET" in path, f"{name_of(page)}: there is no {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_row_of_a_table_has_the_cells_of_its_header(page: Path) -> None:
    """A row that has lost its line break is one long row to a reader, and no other test sees it."""
    header: int | None = None
    fenced = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fenced ^= line.lstrip().startswith("```")
        if fenced or not line.startswith("|"):
            header = None
            continue
        cells = len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line)))
        header = header or cells
        assert cells == header, f"line {number} has {cells - 1} cells, its header {header - 1}"


def test_no_cell_of_a_drawn_table_is_cut_off() -> None:
    """A cell that is drawn from a docstring is a sentence, to its end."""
    page = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    drawn = re.findall(r"<!-- [\w ]+ -->\n(\| event .*?|\| phase .*?)<!-- /", page, re.DOTALL)
    assert len(drawn) >= 4
    for table in drawn:
        for row in table.splitlines()[2:]:
            assert re.search(r"[^|]\. \|$", row), row


def test_what_comes_later_is_not_there() -> None:
    """No command and no public name is listed among what does not exist."""
    later = section(ROOT / "docs" / "idea.md", "What comes later")
    named = {word for cell in re.findall(r"^\| ([^|]+) \| ", later, re.MULTILINE) for word in re.findall(r"\w+", cell)}
    there = {word for name in commands() for word in name.split()} | {name.lower() for name in public_names()}
    assert not {word for word in named if word.lower() in there or word.lower().removesuffix("s") in there}


def test_the_idea_lists_every_transform_and_every_server_optimizer() -> None:
    rows = dict(
        re.findall(r"^\| ([^|]+\?) \| [^|]+ \| ([^|]+) \|$", section(ROOT / "docs" / "idea.md", "The values"), re.M)
    )
    listed = [
        set(re.findall(r"`(\w+)`", said))
        for question, said in rows.items()
        if "way" in question or "server" in question
    ]
    made = {"Transform": set[str](), "ServerOptimizer": set[str]()}
    for dotted in public_names():
        value = resolve(dotted)
        kind = getattr(value, "__annotations__", {}).get("return") if inspect.isfunction(value) else None
        name = getattr(kind, "__name__", str(kind)).rpartition(".")[2]
        if name in made and dotted.rpartition(".")[0] in ("", "optimizers"):
            made[name].add(dotted.rpartition(".")[2])
    assert made["Transform"] - {"chain"} == listed[0]
    assert made["ServerOptimizer"] == listed[1] - {"mean"}


def test_the_default_floor_is_in_the_page_of_devices() -> None:
    from dataclasses import fields

    from sumus.protocol.session import Floor

    rows = re.findall(
        r"^\| `(\w+)` \| [^|]* \| ([\d,^]+) \|$", section(ROOT / "docs" / "device.md", "What it consents to"), re.M
    )
    said = {name: eval(number.replace(",", "").replace("^", "**")) for name, number in rows}
    assert said == {field.name: field.default for field in fields(Floor)}


def test_the_words_of_an_abort_are_counted() -> None:
    from typing import get_args

    from sumus.wire.messages import AbortReason

    assert len(get_args(AbortReason)) == 15
    assert "one of fifteen words" in " ".join((ROOT / "docs" / "device.md").read_text(encoding="utf-8").split())


def test_limits_in_the_pages_are_those_of_the_code() -> None:
    from sumus.http.connections import MOST_CONNECTIONS
    from sumus.http.limits import Limits
    from sumus.http.tls import LASTS, RENEWED

    rates = {name: parameter.default for name, parameter in inspect.signature(Limits.__init__).parameters.items()}
    words = {2: "two", 30: "30"}
    server, edge = (
        " ".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").split()) for name in ("server", "edge")
    )
    device, source, population, above = (rates[name] for name in ("device", "source", "population", "edge"))
    for page, sentence in (
        (server, f"Each device may send {words[device.per_s]} requests a second (burst {device.burst})"),
        (server, f"each /24 network {words[source.per_s]} enrolments a second (burst {source.burst}; /48 with IPv6)"),
        (server, f"all devices together {population.per_s:,.0f} check-ins a second"),
        (server, f"at most {MOST_CONNECTIONS:,} to the devices' port"),
        (server, f"A certificate lasts {LASTS.days} days, and a start in its last {RENEWED.days} days makes another"),
        (edge, f"may send the server above {words[above.per_s]} requests a second, and a burst of {above.burst}."),
    ):
        assert sentence in page, sentence


def test_more_figures_in_the_pages_are_those_of_the_code() -> None:
    from sumus.edge.edge_run import LINGER
    from sumus.evaluation import BINS
    from sumus.plan import Plan
    from sumus.rounds.run import PATIENCE
    from sumus.server.access import SESSION_S
    from sumus.server.replica import LASTS, RENEWED
    from sumus.server.training import KEPT_MODELS

    least = inspect.signature(Plan).parameters["min_contributors"].default
    said = {
        "server": [
            f"the session that it opens lasts {({12: 'twelve'})[SESSION_S / 3600]} hours",
            f"It holds a lease of {({10: 'ten'})[LASTS]} seconds",
            f"renews the lease every {({3: 'three'})[LASTS * RENEWED]} seconds",
            f"keeps the newest {({100: 'hundred'})[KEPT_MODELS]} versions",
            f"if the plan names none, the deadline is {({1: 'one'})[PATIENCE / 3600]} hour",
            f"fewer than `min_contributors` ({least} unless the plan says otherwise)",
            f"in which of {({20: 'twenty'})[BINS]} bins",
        ],
        "edge": [f"work has come down for {LINGER:.0f} seconds (`--linger`)"],
    }
    for name, sentences in said.items():
        page = " ".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").split())
        assert not [sentence for sentence in sentences if sentence not in page]


def test_the_policy_of_a_virtual_worker_is_on_its_page() -> None:
    from dataclasses import fields

    from sumus.virtual import Policy

    table = section(ROOT / "docs" / "virtual.md", "The policy")
    names = {
        name for cell in re.findall(r"^\| (`[^|]+`) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)
    }
    assert names == {field.name for field in fields(Policy)}
    for name in ("largest", "tensors", "held", "seconds"):
        said = re.search(rf"^\| `{name}` \| .* \| ([\d,^]+) \|$", table, re.MULTILINE)
        assert said
        assert eval(said[1].replace(",", "").replace("^", "**")) == getattr(Policy(), name)


def test_every_extra_is_on_the_page_of_installing() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = first_cells((ROOT / "docs" / "install.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(project["optional-dependencies"])


def test_the_sharp_edges_are_an_index_of_one_line_for_each_trap() -> None:
    """`test_relative_links_resolve` checks that the page and the heading of each link exist."""
    lines = (ROOT / "docs" / "sharp-edges.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    traps = [line for line in lines if line.startswith("- ")]
    assert len(traps) >= 60
    for trap in traps:
        assert re.search(r"\]\([\w-]+\.md#[\w-]+\)", trap), f"no link to the heading where it is explained: {trap}"
    rest = [line for line in lines if line and not line.startswith(("- ", "#"))]
    assert len(rest) <= 3, "a trap is explained on its own page"


def test_each_trap_that_the_index_calls_a_note_is_said_so_on_its_page() -> None:
    index = ROOT / "docs" / "sharp-edges.md"
    noted = re.findall(r"^- .*\]\(([\w-]+\.md)#.*\*\*\(note\)\*\*", index.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(noted) >= 12
    for page in set(noted):
        assert "note" in prose(index.parent / page), page


def test_the_planted_bugs_are_counted() -> None:
    from benchmarks.faults import BUGS

    page = " ".join((ROOT / "docs" / "protocol.md").read_text(encoding="utf-8").split())
    said = re.search(r"(\w+) planted bugs \((.*?)\) must each be found", page)
    assert said
    assert (said[1], len(said[2].split(", "))) == ("Nine", len(BUGS))


def test_metrics_in_the_pages_exist() -> None:
    code = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "sumus").rglob("*.py"))
    for page in PAGES:
        for name in set(re.findall(r"`(sumus_[a-z_]+)`", prose(page))):
            assert name.removeprefix("sumus_node_").removesuffix("_total") in code, (
                f"{name_of(page)}: there is no metric {name}"
            )


# ── what belongs to one machine ──────────────────────────────────────────────────────────────────────────────────────

# In pieces, so that this file does not hold what it looks for.
FOLDERS = ("ho" + "me", "ro" + "ot", "wo" + "rk", "Us" + "ers", "mnt", "work" + "space")
HOSTS = (
    ("py" + "pi", "org"),
    ("python" + "hosted", "org"),
    ("registry.np" + "mjs", "org"),
    ("registry.yarn" + "pkg", "com"),
    ("ana" + "conda", "org"),
    ("ana" + "conda", "com"),
    ("download.py" + "torch", "org"),
    ("crates", "i" + "o"),
    ("ruby" + "gems", "org"),
    ("docker", "i" + "o"),
    ("ghcr", "i" + "o"),
    ("quay", "i" + "o"),
    ("repo1.ma" + "ven", "org"),
    ("proxy.go" + "lang", "org"),
)
PATH = re.compile(r"(?<![\w.)\]}>*/-])/(?:" + "|".join(FOLDERS) + r")/")
HOST = re.compile("|".join(re.escape(".".join(host)) for host in HOSTS) + "|(?:extra-)?index-" + "url", re.IGNORECASE)


def text_files() -> list[Path]:
    """Every text file that is tracked, or would be."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
        files = [ROOT / os.fsdecode(name) for name in listed.split(b"\0") if name]
    else:  # an unpacked archive
        ignored = {".venv", "build", "runs", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}
        files = [file for file in ROOT.rglob("*") if not ignored & set(file.relative_to(ROOT).parts)]
    files = [file for file in files if file.is_file()]
    return [file for file in files if b"\0" not in file.read_bytes()[:4096]]


def found_in(text: str) -> list[str]:
    return [match[0] for pattern in (PATH, HOST) for match in pattern.finditer(text)]


def test_no_file_names_a_machine_or_a_package_index() -> None:
    files = text_files()
    assert {ROOT / "pyproject.toml", Path(__file__).resolve(), *PAGES} <= set(files)
    found = {name_of(file): words for file in files if (words := found_in(file.read_text("utf-8", errors="replace")))}
    assert not found


def test_the_search_finds_what_it_must() -> None:
    slash = "/"
    for text in (
        f"see {slash}{FOLDERS[2]}/main/x.py",
        f'path = "{slash}{FOLDERS[0]}/someone"',
        f"PATH={slash}{FOLDERS[1]}/.local",
        "https://" + ".".join(HOSTS[0]) + "/simple",
        "https://files." + ".".join(HOSTS[1]) + "/packages/x",
        "pip install --index-" + "url x",
    ):
        assert found_in(text), text
    for text in (f"sumus/{FOLDERS[2]}/sgd.py", f"../{FOLDERS[2]}/", "docs/home/", "a/root/b", "work.py"):
        assert not found_in(text), text


# ── the tests above look where they should ───────────────────────────────────────────────────────────────────────────


def test_blocks_are_found_with_their_lines(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        textwrap.dedent("""\
        # Title
        ```python
        first
        ```
        text `code`
        ```sh
        sumus x
        ```
        ```
        drawing
        ```
        """)
    )
    assert blocks(page, "python") == [(3, "first\n")]
    assert blocks(page, "sh") == [(7, "sumus x\n")]
    assert prose(page).split() == ["#", "Title", "text", "`code`"]
