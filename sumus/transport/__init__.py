"""Carrying requests to a server and answers back: over HTTP, within a process, or badly on purpose."""
