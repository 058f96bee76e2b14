"""Transports carry requests to a server and answers back: over HTTP, within a process, or with intentional faults."""
