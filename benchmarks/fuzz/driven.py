"""Drives one target with atheris, in a process of its own. `campaign.run` starts this module.

python -W error -m benchmarks.fuzz.driven TARGET FOLDER SECONDS SEED
"""

import resource
import sys
from pathlib import Path

import atheris

from benchmarks.fuzz.targets import load

INSTRUMENTED = ["sumus", "benchmarks", "zipfile", "urllib.parse", "urllib3.util.url", "json", "base64", "ipaddress"]
"""Modules whose branches guide atheris: the parsers, and the modules that they use for reading."""
LONGEST_INPUT = 8192
"""Bytes of the longest input that is tried."""
LONGEST_S = 10
"""The most seconds for one input."""
MEMORY = 2**30
"""Bytes of address space in addition to those at the process's start. A larger allocation is a MemoryError, and a
finding."""


def main(name: str, folder: Path, seconds: int, seed: int) -> None:
    """Fuzz a target until its time is over, or until the first finding."""
    with atheris.instrument_imports(include=INSTRUMENTED):
        target = load(name)
    seeds, found = folder / "seeds", folder / "found"
    for each in (seeds, found):
        each.mkdir(parents=True, exist_ok=True)
    for label, data in target.corpus().items():
        if len(data) <= LONGEST_INPUT:
            (seeds / label).write_bytes(data)
    words = folder / "words"
    escaped = ("".join(f"\\x{byte:02x}" for byte in word) for word in target.words)
    words.write_text("".join(f'"{word}"\n' for word in escaped))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={LONGEST_INPUT}",
        f"-timeout={LONGEST_S}",
        f"-seed={seed}",
        "-keep_seed=1",  # a parser written in C shows no branches, and only the first seed would be mutated otherwise
        f"-dict={words}",
        f"-artifact_prefix={folder}/",
        "-print_final_stats=1",
        "-verbosity=1",
    ]
    atheris.Setup([name, *options, str(found), str(seeds)], target.check)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
