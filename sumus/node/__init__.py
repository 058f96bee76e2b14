"""A node: a machine that gets sensor data. It keeps the readings, trains on them as a device, and answers with the last model.

Readings come through a folder (`folder`), over HTTP (`plane`) or by MQTT (`mqtt`). They are read (`formats`), prepared by the
user's functions (`intake`) and kept (`readings`); a device trains on those with a target (`participant`). `Node` puts these parts
together, and `sumus node` runs one as a process. Only what a device reports leaves the machine.
"""
