"""Rounds as pure tables: `round` for the server, `session` for the device, and `edge` and `site` for an edge. They use neither
a clock nor IO.
"""
