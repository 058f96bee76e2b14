"""Virtual time: a fleet's devices and a server on a simulated clock, on which waiting takes no real time."""
