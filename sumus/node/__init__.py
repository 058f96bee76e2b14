"""A node: a machine where sensor data lands. It keeps them, trains on them as a device, and answers with the last model.

What comes in, through a folder (`folder`), over HTTP (`plane`) or by MQTT (`mqtt`), is read (`formats`), prepared by the user's
file (`intake`) and kept (`readings`); a device trains on what has a label. `Node` puts them together, and `sumus node` is that
as a process. Nothing of a reading leaves the machine but what a device reports.
"""
