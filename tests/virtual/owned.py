"""Workers in other processes, started as their owners start them."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

TOKEN = "a-token-of-some-length"

FILE = """
import torch
from sumus.virtual import Policy

tensors = {"inputs": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
policy = Policy(fetch="parameters", largest=100_000)
"""


@contextlib.contextmanager
def owners(*files: str) -> Iterator[list[tuple[str, "subprocess.Popen[str]"]]]:
    """Start `sumus worker` for each FILE.py[:NAME], side by side; yield the URLs and the processes."""
    environment = {**os.environ, "SUMUS_WORKER_TOKEN": TOKEN}
    command = [sys.executable, "-m", "sumus", "worker"]
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(
                subprocess.Popen(
                    [*command, file],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            )
            for file in files
        ]
        for each in running:
            stack.callback(each.kill)
        found: list[tuple[str, subprocess.Popen[str]]] = []
        for each in running:
            assert each.stdout is not None
            assert each.stderr is not None
            url = each.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:"), each.stderr.read()
            found.append((url, each))
        yield found
