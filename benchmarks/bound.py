"""The FLOP bound of a core: the fastest matrix product in single precision that torch has on this machine.

    python -m benchmarks.bound      each kind, in GFLOP/s

There are three kinds, since none is the fastest on all machines: `mm` (MKL or OpenBLAS), a linear layer of oneDNN, and
the second convolution of W1 (oneDNN). One thread is used. The figure is wall time, the best of many repetitions.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SECONDS = 0.7  # for each kind


def measured() -> dict[str, float]:
    """Return GFLOP/s of one core by kind. A kind that this torch does not have is left out."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(1)
    square, image = torch.randn(1024, 1024), torch.randn(20, 32, 14, 14)
    kernel = torch.randn(64, 32, 5, 5)
    kinds: dict[str, tuple[Callable[[], object], int]] = {
        "torch mm 1024": (lambda: torch.mm(square, square), 2 * 1024**3),
        "oneDNN linear 1024": (
            lambda: torch.ops.mkldnn._linear_pointwise(square, square, None, "none", [], ""),
            2 * 1024**3,
        ),
        "oneDNN convolution": (lambda: functional.conv2d(image, kernel, padding=2), 2 * 20 * 64 * 14 * 14 * 32 * 25),
    }
    rates: dict[str, float] = {}
    for name, (product, flops) in kinds.items():
        try:
            best, until = float("inf"), time.perf_counter() + SECONDS
            while time.perf_counter() < until:
                began = time.perf_counter()
                product()
                best = min(best, time.perf_counter() - began)
        except (
            AttributeError,
            RuntimeError,
        ):  # the linear layer's operator is private to torch, and not in every build
            continue
        rates[name] = flops / best / 1e9
    return rates


def in_a_process() -> dict[str, float]:
    """Return `measured()` of a new process."""
    command = [sys.executable, "-m", "benchmarks.bound", "--json"]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure and print."""
    rates = measured()
    if sys.argv[1:] == ["--json"]:
        print(json.dumps(rates))
        return
    for name, rate in rates.items():
        print(f"{name:20} {rate:6.0f} GFLOP/s")


if __name__ == "__main__":
    main()
