"""The device: takes part in a server's rounds with examples that stay on it.

Begin with `device.py`. `compute.py` is the contract for a device's computations and needs no torch; `training.py` implements
it with torch. The table in `sumus/protocol/session.py` decides what a device does next.
"""
