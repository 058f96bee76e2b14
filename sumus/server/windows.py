"""Retry windows, in seconds: a device draws the moment of its next request uniformly from such a window."""

from sumus.wire.messages import Window

AGAIN: Window = (1.0, 3.0)
"""The window after storage has failed."""
ELSEWHERE: Window = (20.0, 60.0)
"""The window if the device has other work, which it got through another edge or directly from the server."""
SOON: Window = (0.1, 0.3)
"""The window for an object that another server may have just made."""
