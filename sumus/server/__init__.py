"""The server: rounds with real devices."""
