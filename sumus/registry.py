"""Load the values that sumus registers itself, without imports from a lower layer to a higher one.

    supply(load)                         the package sets the function that registers all of its own values
    load_own()                           `sumus.spec` calls this when it meets a name that is not registered yet

A plan from another machine names values such as "aggregator/median", whose file may not be imported yet. `sumus.spec` reads
plans and is in a lower layer than those files, so it must not import them. `sumus/__init__.py` knows all files, and is
imported before any of them, so it supplies the loader.
"""

from collections.abc import Callable


def _nothing() -> None:
    """Do nothing. This is the loader until one is supplied."""


_loader: Callable[[], None] = _nothing


def supply(loader: Callable[[], None]) -> None:
    """Set the function that registers all of sumus's own values.

    Args:
        loader: A function that imports every module that registers a value. It may be called many times.
    """
    global _loader
    _loader = loader


def load_own() -> None:
    """Register all of sumus's own values, by calling the loader that was given to `supply`."""
    _loader()
