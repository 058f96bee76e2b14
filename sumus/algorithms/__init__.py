"""One algorithm, one file, one paper, one page.

A new one is a file here, a line in `sumus/__init__.py`, and a line in the documentation.
"""

import importlib
import pkgutil


def load_all() -> None:
    """Import every file here, so that the names they register can be found in a plan that came from elsewhere."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
