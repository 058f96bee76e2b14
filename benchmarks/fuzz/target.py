"""A fuzz target: a parser, a check that must hold for all bytes, and the first inputs.

    TARGET = Target("links", read, seeds, {"sumus.device.link": ("read_link",)}, (b"#enrol=", b"&pin="))

To add a target, write a module in `benchmarks/fuzz/targets/` that defines `TARGET`, and name the module in
`benchmarks/fuzz/targets/__init__.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

CORPORA = Path(__file__).parents[2] / "tests" / "fuzz" / "corpora"
"""The folder that keeps, in a folder a target, the inputs that fuzzing found."""


@dataclass(frozen=True)
class Target:
    """A parser that reads bytes from outside.

    Args:
        name: the target's name on the command line, and of its folder of kept inputs.
        check: reads some bytes with the parser. It catches the errors that the parser documents, and asserts what must hold for a
            value that was read. Any exception that it raises is a finding.
        seeds: makes the inputs to begin from, by name. Code makes them, so that they follow when a form of the wire changes.
        branches: the functions and classes whose branches count as the parser's, by module; an empty tuple for a whole module.
        words: byte strings that mutations insert.
        memory: bytes that the check may allocate for each byte of its input, besides `FREE_MEMORY`.
    """

    name: str
    check: Callable[[bytes], None]
    seeds: Callable[[], Mapping[str, bytes]]
    branches: Mapping[str, tuple[str, ...]]
    words: tuple[bytes, ...] = ()
    memory: int = 4

    def corpus(self) -> dict[str, bytes]:
        """Return the seeds and the kept inputs, by name."""
        folder = CORPORA / self.name
        kept = {path.name: path.read_bytes() for path in sorted(folder.iterdir())} if folder.is_dir() else {}
        return {**self.seeds(), **kept}


FREE_MEMORY = 2**20
"""Bytes that a check may allocate whatever the length of its input is."""
