"""A node: a machine that collects sensor data. It stores readings, trains on them as a device, and predicts with its model.

Readings arrive through a folder (`folder`), over HTTP (`plane`) or by MQTT (`mqtt`). They are read (`formats`), prepared by the
user's functions (`intake`) and stored (`readings`); a device trains on those with a target (`participant`). `Node` combines these
parts, and `sumus node` runs a node as a process. Only the device's reports leave the machine.
"""
