"""Every `except` clause that takes any exception is known, with the reason why it may.

A clause that catches everything can hide a defect of ours. So this is the whole list. A clause that ends in a bare `raise` is
not in it: it undoes what was begun, and hides nothing.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import sumus

ROOT = Path(sumus.__file__).parent
BROAD = {"Exception", "BaseException"}

USERS = "it calls code or opens an object that a user wrote, which may raise anything; the user is told"
END = "the end of a thread, a process or a request: the error is logged with its traceback, or handed to whoever waits"
LIBRARY = "a library raises whatever it meets in damaged data or in a call that it cannot do; whoever asked is told"

KNOWN: dict[str, dict[str, str]] = {
    "device/compute.py": {"loaded": USERS},
    "device/work.py": {"LocalWork.look_at": USERS, "LocalWork.do": USERS},  # and a defect is logged
    "errors.py": {"own_code": USERS},
    "executors/choice.py": {"_Probe.refused": USERS},
    "executors/own_loop.py": {"OwnLoopExecutor._as_leaf": USERS, "_called": USERS},
    "executors/witness.py": {"_other_examples": USERS},
    "http/answers.py": {"ExplainedEndpoint.__call__": END},
    "node/intake.py": {"labelled": USERS, "answered": USERS, "Intake._prepared": USERS},
    "node/node.py": {"Node._part": END},
    "node/pictures.py": {"read_picture": LIBRARY},
    "rounds/closing.py": {"usable": USERS},
    "server/server.py": {"Server._turn": END},
    "simulator/processes/cluster.py": {"Cluster._start": USERS, "Cluster._start 2": USERS, "_answering.answer": END},
    "simulator/populations/population.py": {"Population.__getitem__": USERS},
    "simulator/processes/worker.py": {"main": END, "_as_bytes": USERS},
    "simulator/processes/workers.py": {"_Child.check_ready": END, "_packed": USERS, "_is_packable": USERS},
    "task.py": {"Task.make_model": USERS},
    "training/examples.py": {"ExampleReader.convert": USERS, "ExampleReader._tensor": USERS, "as_pair": USERS},
    "training/graph.py": {"_record": USERS},
    "training/observed.py": {"gradients_of": USERS},
    "training/places.py": {"Depths._now": USERS, "Opaque._now": USERS, "_standing": USERS, "inside_of": USERS},
    "training/program.py": {
        "Program.losses": USERS,
        "_classes": USERS,
        "_measured": USERS,
        "_own": USERS,
    },
    "training/walk.py": {"_imported": USERS},
    "userfile.py": {"blaming": USERS},
    "virtual/calls.py": {
        "OperationCalls._drawn": LIBRARY,
        "OperationCalls._tried": LIBRARY,
        "OperationCalls._plainly": LIBRARY,
        "OperationCalls._computed": LIBRARY,
    },
    "virtual/gradients.py": {"backward": LIBRARY},
    "virtual/pointer.py": {"_TensorHandle.__del__": END},
    "virtual/workbench.py": {"Workbench.answer": END},
}
"""By file and enclosing function; a second clause in one function has a number."""


def is_broad(kind: ast.expr | None) -> bool:
    """Whether a clause takes any exception: it names none, or the base of all."""
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(each is None or ast.unparse(each) in BROAD for each in kinds)


def hides(clause: ast.ExceptHandler) -> bool:
    """Whether a clause does not end by raising the same error again."""
    last = clause.body[-1]
    return not (isinstance(last, ast.Raise) and last.exc is None)


def broad_clauses(tree: ast.AST, where: tuple[str, ...] = ()) -> Iterator[str]:
    """The enclosing function of each clause that takes any exception and hides it; of `suppress(Exception)`, too."""
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if isinstance(node, ast.ExceptHandler) and is_broad(node.type) and hides(node):
            yield ".".join(where)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress") and any(map(is_broad, node.args)):
            yield ".".join(where)
        yield from broad_clauses(node, (*where, node.name) if named else where)


def found_in(text: str) -> list[str]:
    """The same of a file's text, with a number for each further clause in one function."""
    met, found = Counter[str](), list[str]()
    for function in broad_clauses(ast.parse(text)):
        met[function] += 1
        found.append(function if met[function] == 1 else f"{function} {met[function]}")
    return found


FILES = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.rglob("*.py"))}


@pytest.mark.parametrize("file", FILES)
def test_every_broad_clause_is_known_with_its_reason(file: str) -> None:
    found = found_in(FILES[file].read_text(encoding="utf-8"))
    assert sorted(found) == sorted(KNOWN.get(file, {})), (
        "catch what the code can raise, by name; if it must be any exception, add the clause to KNOWN with its reason"
    )


def test_no_file_is_listed_that_is_gone() -> None:
    assert KNOWN.keys() <= FILES.keys()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def f():\n try: pass\n except: pass", ["f"]),
        ("class A:\n def f(self):\n  try: pass\n  except (ValueError, Exception): pass", ["A.f"]),
        ("def f():\n try: pass\n except BaseException:\n  undo()\n  raise", []),
        ("def f():\n try: pass\n except Exception as error: raise ValueError from error", ["f"]),
        ("def f():\n with suppress(Exception): pass\n with contextlib.suppress(Exception): pass", ["f", "f 2"]),
        ("def f():\n try: pass\n except ValueError: pass\n with suppress(OSError): pass", []),
    ],
)
def test_what_counts_as_a_broad_clause(text: str, found: list[str]) -> None:
    assert found_in(text) == found
