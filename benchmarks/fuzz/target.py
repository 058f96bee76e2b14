"""A fuzz target: a parser, a check that must hold for all bytes, and the first inputs.

    TARGET = Target("links", read, seeds, {"sumus.device.link": ("read_link",)}, (b"#enrol=", b"&pin="))

To add a target, write a module in `benchmarks/fuzz/targets/` that defines `TARGET`, and name the module in
`benchmarks/fuzz/targets/__init__.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

CORPORA = Path(__file__).parents[2] / "tests" / "fuzz" / "corpora"
"""The folder with the inputs that fuzzing found, in a folder for each target."""


@dataclass(frozen=True)
class Target:
    """A parser that reads bytes from outside.

    Attributes:
        name: The target's name on the command line, and of its folder of kept inputs.
        check: Reads some bytes with the parser. It catches the errors that the parser documents, and asserts what must
            hold for a value that was read. Any exception that it raises is a finding.
        seeds: Makes the first inputs, by name. They are made by code, so that they follow changes of the wire format.
        branches: The functions and classes whose branches count as the parser's, by module; an empty tuple for a whole
            module.
        words: Byte strings that mutations insert.
        memory: Bytes that the check may allocate for each byte of its input, in addition to `FREE_MEMORY`.
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
"""Bytes that a check may allocate for an input of any length."""
