"""An edge: a server to its devices; to the server above, one participant that speaks for them.

A device's check-in goes up together with others' (`uplink`). The work that is given for it comes down (`relay`). The device's
report ends here: it is added to a sealed sum, as on a server (`edge_run`), and acknowledged. When all devices that were given
work have ended, the sum goes up. A site keeps a model of its own between two sums (`site_model`). Two tables decide what an edge
does when: `sumus/protocol/edge.py` and `sumus/protocol/site.py`. `edge` puts everything together as a process.

The server above decides about each device (who takes part, how often, how stale a report may be), whichever edge the device came
through; so a device that moves is counted once.
"""
