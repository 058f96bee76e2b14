"""The device: takes part in a server's rounds with examples that stay on it.

Begin with `device.py`. What a device computes is behind a contract without torch: `compute.py`; `training.py` implements it with
torch. What a device does when is the table `sumus/protocol/session.py`.
"""
