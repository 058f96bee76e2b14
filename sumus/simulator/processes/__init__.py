"""Processes: the clients of a round are divided among this process, other processes, or a cluster."""
