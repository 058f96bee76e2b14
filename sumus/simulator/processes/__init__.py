"""Processes: shares of a round's clients train in this process, in other processes, or on a cluster."""
