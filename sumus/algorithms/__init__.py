"""The federated algorithms of sumus. Each file holds one algorithm, and cites the paper that it follows.

To add an algorithm, write a file here, add a line to `sumus/__init__.py`, and add a line to the documentation.
"""

import importlib
import pkgutil


def load_all() -> None:
    """Import every module of this package, so that a plan from another machine can find the names that they register."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
