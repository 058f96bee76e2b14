"""Layers: imports point down only, torch stays in training, and below the line nothing reads a clock or rolls dice."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sumus
from sumus.task import Description, Leaf

ROOT = Path(sumus.__file__).parent

LAYERS: tuple[tuple[str, ...], ...] = (
    ("types", "text", "json_names", "registry", "errors", "tree", "shapes"),
    ("rng", "spec"),
    ("figures", "metrics", "schedules", "staleness", "optimizers", "pacing", "fleet", "columns", "preparation"),
    ("update",),
    ("task", "own_loop", "work", "adapters", "aggregate", "fixed_point", "first_hop", "robust", "algorithm", "evaluation",
     "influence", "site", "plan", "experiment"),
    ("algorithms",),
    ("wire",),
    ("protocol",),
    ("training",),
    ("transfer",),
    ("userfile", "interrupt", "logs", "options", "terminal", "plotting"),
    ("transport",),
    ("storage",),
    ("http",),
    ("rounds",),
    ("executors",),
    ("device",),
    ("server",),
    ("operations",),
    ("node",),
    ("virtual",),
    ("edge",),
    ("simulator",),
    ("demos",),
    ("cli", "__main__"),
)  # fmt: skip
"""From the bottom up. A package has a row of its own, so that no two packages import each other. Files beside the packages may
share a row and import each other, but not in a circle. `sumus/__init__.py` is not here: it names everything, and supplies
`sumus.registry` with what loads the values of sumus."""

BELOW_IO = {name for names in LAYERS[: LAYERS.index(("training",)) + 1] for name in names}
IMPURE = {
    "asyncio", "concurrent", "datetime", "http", "multiprocessing", "os", "random", "secrets", "select", "shutil", "signal",
    "socket", "sqlite3", "ssl", "subprocess", "tempfile", "threading", "time", "urllib", "uuid",
}  # fmt: skip

WATCHES = ("training.hidden", "training.places", "training.walk")
"""They look where Python's and numpy's generators stand, and seed them where a client's code draws from
them; and at `os.environ`, which such code may change."""

TORCHES = ("training", "executors", "transfer", "demos", "virtual")
"""What computes with torch's modules and tensors. Demos are users' files, which bring their own model."""

LOADS_BY_NAME = {
    "algorithms.__init__": "the files of its own folder",
    "training.walk": "modules of the user's that the user's code imports as it runs",
    "virtual.__init__": "the public names of its own folder",
}
"""What may import modules whose names are not written in the call, and which modules these are."""

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
    if path != ROOT / "__init__.py"
}


def topic(module: str) -> str:
    """The folder or the file on top that a module belongs to."""
    return module.partition(".")[0]


def row(module: str) -> int:
    """How high a module stands."""
    return next(number for number, names in enumerate(LAYERS) if topic(module) in names)


def name_in_call(call: ast.Call) -> str | None:
    """The module that a call of `import_module` or `__import__` names; None for a name that is not written in the call.

    Of a formatted name, such as f"sumus.demos.{name}", the folder: "sumus.demos".
    """
    name = call.args[0] if call.args else None
    if isinstance(name, ast.Constant):
        return str(name.value)
    first = name.values[0] if isinstance(name, ast.JoinedStr) else None
    return str(first.value).rpartition(".")[0] if isinstance(first, ast.Constant) else None


def calls_by_name(tree: ast.AST) -> Iterator[ast.Call]:
    """Every call that imports a module by its name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            yield node


def imports(path: Path) -> Iterator[str]:
    """Every module imported in a file, also inside functions and by its name, but not for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield from imports_in(tree)


def imports_in(tree: ast.AST) -> Iterator[str]:
    """The same of a file's syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Import | ast.ImportFrom):
                    inner.ignored = True  # pyright: ignore[reportAttributeAccessIssue]
    for node in ast.walk(tree):
        if getattr(node, "ignored", False):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
    yield from (name for call in calls_by_name(tree) if (name := name_in_call(call)) is not None)


def own_imports(module: str) -> set[str]:
    """Which of our own files a file imports."""
    found: set[str] = set()
    for name in imports(FILES[module]):
        inner = name.removeprefix("sumus.")
        if name.startswith("sumus.") and inner in FILES:
            found.add(inner)
        elif name.startswith("sumus.") and f"{inner}.__init__" in FILES:
            found.add(f"{inner}.__init__")
    return found - {module}


@pytest.mark.parametrize("module", FILES)
def test_every_file_has_its_place_in_a_layer(module: str) -> None:
    assert any(topic(module) in names for names in LAYERS), f"say in LAYERS where {module} stands"


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module: str) -> None:
    assert [other for other in own_imports(module) if row(other) > row(module)] == []


def test_a_package_has_a_row_of_its_own() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    shared = [names for names in LAYERS if len(names) > 1 and packages & {*names}]
    assert shared == []
    assert {name for names in LAYERS for name in names} == {topic(module) for module in FILES}, "no row is of the past"


@pytest.mark.parametrize("module", FILES)
def test_a_module_that_is_imported_by_its_name_is_named_in_the_call(module: str) -> None:
    """Else an import that points up could not be seen."""
    calls = calls_by_name(ast.parse(FILES[module].read_text(encoding="utf-8")))
    unseen = [ast.unparse(call) for call in calls if name_in_call(call) is None]
    assert bool(unseen) == (module in LOADS_BY_NAME), unseen


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import sumus.a, b.c", ["sumus.a", "b.c"]),
        ("def f():\n from sumus.a import b", ["sumus.a", "sumus.a.b"]),
        ("if TYPE_CHECKING:\n import sumus.a", []),
        ("importlib.import_module('sumus.a').load()", ["sumus.a"]),
        ("import_module('sumus.a')", ["sumus.a"]),
        ("__import__('sumus.a')", ["sumus.a"]),
        ("importlib.import_module(f'sumus.a.{name}')", ["sumus.a"]),
        ("importlib.import_module(name)", []),
    ],
)
def test_what_counts_as_an_import(text: str, found: list[str]) -> None:
    assert list(imports_in(ast.parse(text))) == found


def test_a_device_needs_no_simulator() -> None:
    """Nor do executors, which devices use."""
    for module in FILES:
        if topic(module) in ("device", "executors"):
            assert not [other for other in everything_behind(module) if topic(other) == "simulator"]


def everything_behind(module: str) -> set[str]:
    """All of our own files that importing a file imports."""
    found, waiting = set[str](), [module]
    while waiting:
        new = own_imports(waiting.pop()) - found
        found |= new
        waiting += new
    return found


def test_an_edge_needs_no_model_no_transform_and_no_optimizer() -> None:
    """It adds: sums, the first hop, bytes."""
    for module in ("first_hop", "fixed_point", "wire.tensors"):
        assert everything_behind(module) <= {
            "aggregate", "errors", "figures", "fixed_point", "metrics", "registry", "shapes", "spec", "staleness", "text", "tree",
            "types",
        }  # fmt: skip


def test_an_executor_is_a_contract_without_an_implementation() -> None:
    """Other executors stand beside the sequential one, and need nothing of it."""
    assert everything_behind("executors.executor") == {"types"}
    assert "executors.sequential" not in everything_behind("algorithm") | everything_behind("plan")


def test_no_imports_go_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join((*way, module))
        if module not in done:
            for other in sorted(own_imports(module)):
                visit(other, (*way, module))
            done.add(module)

    for module in FILES:
        visit(module, ())


@pytest.mark.parametrize("module", [m for m in FILES if topic(m) not in TORCHES])
def test_nothing_outside_training_imports_torch(module: str) -> None:
    assert [name for name in imports(FILES[module]) if name.partition(".")[0] == "torch"] == []


@pytest.mark.parametrize("module", [m for m in FILES if topic(m) in BELOW_IO])
def test_below_io_there_is_no_clock_no_thread_no_socket_and_no_hidden_randomness(module: str) -> None:
    allowed = {"os", "random", "get_state", "set_state", "seed", "RandomState"} if module in WATCHES else set[str]()
    assert {name.partition(".")[0] for name in imports(FILES[module])} & IMPURE <= allowed
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("np.random", "numpy.random"):
            assert node.attr in ("Generator", "Philox", *allowed), (
                f"np.random.{node.attr}: take a generator as an argument"
            )
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("open", "print", "input")


def test_a_server_reads_a_plan_without_torch() -> None:
    """In a process of its own: import sumus, build the plan from its JSON, and look at sys.modules."""
    plan = sumus.Plan(
        Description("t", (Leaf("w", (2,), "float32", "shared", True),), "loss", ()),
        sumus.fedadam(sumus.adam(1e-3), 0.1, update=sumus.chain(sumus.clip_by_global_norm(1.0), sumus.rotate())),
        sumus.Pacing(10),
    )
    code = """
import json, sys
import sumus
assert len(sys.modules.keys() & {"numpy", "torch"}) == 0, "importing sumus alone loads nothing"
plan = sumus.Plan.from_json(json.load(sys.stdin))
state = plan.algorithm.server.init({})
for name in ("Bundle", "RunningSum", "Aggregate", "FixedPoint", "fedyogi", "adamw", "averaged"):
    getattr(sumus, name, None)
print(plan.id, "torch" in sys.modules)
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], input=json.dumps(plan.to_json()), capture_output=True, text=True
    )
    assert run.stdout.split() == [plan.id, "False"], run.stderr
