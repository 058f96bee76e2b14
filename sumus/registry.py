"""How sumus finds the values that it registers itself, without importing them from below.

    supply(load)                         the package says once how all of its own values are registered
    load_own()                           `sumus.spec` asks for that when it meets a name that is not registered yet

A plan that came from elsewhere names values such as "aggregator/median", whose file may not be imported yet. `sumus.spec` reads
plans and lies below those files, so it must not import them. `sumus/__init__.py` knows all files, and is imported before any of
them: it supplies the loader.
"""

from collections.abc import Callable


def _nothing() -> None:
    """The loader before one is supplied."""


_loader: Callable[[], None] = _nothing


def supply(loader: Callable[[], None]) -> None:
    """Set what registers all of sumus's own values.

    Args:
        loader: Imports every module that registers a value. It may be called many times.
    """
    global _loader
    _loader = loader


def load_own() -> None:
    """Register all of sumus's own values."""
    _loader()
