"""Torch on one thread, as the simulator runs it."""

from tests.single_threaded import single_threaded

__all__ = ["single_threaded"]
