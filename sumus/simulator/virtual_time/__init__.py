"""Virtual time: a fleet's devices and a server on a clock that costs nothing to wait for."""
