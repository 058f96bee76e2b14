"""Programs in processes of their own that do not import torch again.

A server process imports what most programs need, and forks for each program (`multiprocessing`'s forkserver). So a
program starts in milliseconds. In all else it is like a program that a person starts: it has its own memory, arguments,
folder, streams and exit status. Tests that send signals, or check what an import loads, start a new interpreter
instead.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import TemporaryDirectory

PRELOADED = ["torch", "matplotlib.figure", "sumus.cli", "sumus.simulator.simulate", "sumus.simulator.wire"]


def run(
    program: str | Path, words: Sequence[object] = (), cwd: Path | None = None, timeout: float = 300
) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end.

    Args:
        program: A module's name, which runs as with `python -m`; or the path of a file.
        words: Its arguments.
        cwd: The folder that it runs in; None means the present one.
        timeout: Seconds after which it is killed.

    Raises:
        subprocess.TimeoutExpired: It was killed.
    """
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        command = [str(program), *map(str, words)]
        where = str(cwd or Path.cwd())
        process = _forks().Process(target=_program, args=(command, where, dict(os.environ), str(out), str(err)))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout, out.read_text(), err.read_text())
        return subprocess.CompletedProcess(command, process.exitcode, out.read_text(), err.read_text())


@cache
def _forks() -> ForkServerContext:
    """Return a context whose processes are forked from one that has imported `PRELOADED`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _program(command: list[str], cwd: str, environment: Mapping[str, str], out: str, err: str) -> None:
    """Run the program in the new process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(opened, stream.fileno())
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    program, *_ = sys.argv = command
    if program.endswith(".py"):
        sys.path[0] = str(Path(program).parent)
        runpy.run_path(program, run_name="__main__")
    else:
        sys.path[0] = cwd
        runpy.run_module(program, run_name="__main__", alter_sys=True)
