"""Transports send requests to a server and return its responses: over HTTP, within a process, or with intentional faults."""
