"""Finds which branches of a parser a corpus reaches, as coverage.py counts them, and a small corpus that reaches the
same ones.

A branch is a step from a line with several successors to one of these successors.
"""

import ast
import importlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import coverage

from benchmarks.fuzz.target import Target

Branch = tuple[str, int, int]
"""A module, the line that branches, and the line that follows; a negative one for the end of the function."""


@dataclass(frozen=True)
class Reached:
    """The branches of a target's parser, and those that a corpus reaches."""

    every: frozenset[Branch]
    reached: frozenset[Branch]

    @property
    def share(self) -> float:
        """The share of the branches that are reached, from 0 to 1."""
        return len(self.reached) / len(self.every)

    @property
    def missing(self) -> list[Branch]:
        """The branches that are not reached, in order."""
        return sorted(self.every - self.reached)


def reached_by(target: Target, inputs: Iterable[bytes]) -> Reached:
    """Run a target's check on all inputs, and count the branches of its parser."""
    files = {str(importlib.import_module(name).__file__): name for name in target.branches}
    measured = coverage.Coverage(data_file=None, branch=True, include=list(files), config_file=False)
    with measured.collect():
        for data in inputs:
            target.check(data)
    with tempfile.TemporaryDirectory() as folder:
        measured.json_report(list(files), outfile=f"{folder}/report")
        report = json.loads(Path(f"{folder}/report").read_text())["files"]
    every, reached = set[Branch](), set[Branch]()
    for file, said in report.items():
        name = files[str(Path(file).resolve())]
        lines = _lines(Path(file).read_text(encoding="utf-8"), target.branches[name])
        taken, missing = (
            {(name, line, then) for line, then in said[which] if line in lines}
            for which in ("executed_branches", "missing_branches")
        )
        every |= taken | missing
        reached |= taken
    return Reached(frozenset(every), frozenset(reached))


def smallest(target: Target, inputs: Mapping[str, bytes], given: Iterable[bytes]) -> list[str]:
    """Choose inputs, the shortest first, each of which reaches a branch that neither the given ones nor those chosen
    before reach."""
    found, chosen = set(reached_by(target, given).reached), list[str]()
    for name in sorted(inputs, key=lambda name: (len(inputs[name]), name)):
        more = reached_by(target, [inputs[name]]).reached - found
        if more:
            found |= more
            chosen.append(name)
    return chosen


def _lines(source: str, names: tuple[str, ...]) -> set[int]:
    """Return the lines of the named functions and classes; of all functions if none is named."""
    found = set[int]()

    def walk(node: ast.AST, path: str, wanted: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = f"{path}.{child.name}".lstrip(".")
                counts = wanted or inner in names
                if counts and not isinstance(child, ast.ClassDef):
                    found.update(range(child.body[0].lineno, (child.end_lineno or 0) + 1))
                walk(child, inner, counts)

    walk(ast.parse(source), "", not names)
    return found
