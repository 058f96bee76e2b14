"""Windows of seconds within which a device is to come back, drawn uniformly by the device."""

from sumus.wire.messages import Window

AGAIN: Window = (1.0, 3.0)
"""After storage has failed."""
ELSEWHERE: Window = (20.0, 60.0)
"""If other work of the device goes by way of another edge, or directly."""
SOON: Window = (0.1, 0.3)
"""For something that another server may have made just now."""
