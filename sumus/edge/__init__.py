"""An edge: a server to its devices, and towards the server above it one who speaks for them.

A device's check-in goes up, in a batch with others' (`uplink`); what it is given comes down, and its report ends here: it is
added to a sealed sum, as on a server (`adder`), and acknowledged. When all who were given work have ended, the sum goes up.
`serve` puts the two together as a process. What the server above decides (who takes part, how often, how stale) it decides of
each device, whichever edge it came through; so a device that moves is counted once.
"""
