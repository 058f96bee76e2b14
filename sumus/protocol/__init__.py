"""The two ends of a round as pure tables: `round`, the server's, and `session`, the device's. No clock, no IO."""
