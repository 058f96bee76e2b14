"""The two ends of a round as pure tables: `round` for the server, and `session` for the device. They use neither a clock nor
IO.
"""
