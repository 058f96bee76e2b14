"""An edge. For its devices it is a server. For the server above, to which it sends its sums, it is one participant that
represents all of these devices.

The edge sends the check-ins of many devices to the server above in one request (`uplink`), and holds the work that they are
given (`relay`). A device's report goes no further than the edge: it is added to a sealed sum, as on a server (`edge_run`), and
acknowledged. When the sessions of all devices with work have ended, the edge sends the sum to the server above. A site
is an edge that keeps a model of its own between two sums (`site_model`). Two tables decide the actions of an edge:
`sumus/protocol/edge.py` and `sumus/protocol/site.py`. `edge` assembles all this as a process.

The server above decides about each device (who takes part, how often, how stale a report may be), whichever edge the device came
through; so a device that moves is counted once.
"""
