"""An edge: a server to its devices; to the server above, one participant that speaks for them.

Check-ins of many devices go up in one request (`uplink`). The work that is assigned to them comes down (`relay`). A device's
report goes no further than the edge: it is added to a sealed sum, as on a server (`edge_run`), and acknowledged. When the
sessions of all devices with work have ended, the sum goes up. A site keeps a model of its own between two sums (`site_model`).
Two tables decide the actions of an edge: `sumus/protocol/edge.py` and `sumus/protocol/site.py`. `edge` assembles all this as a
process.

The server above decides about each device (who takes part, how often, how stale a report may be), whichever edge the device came
through; so a device that moves is counted once.
"""
