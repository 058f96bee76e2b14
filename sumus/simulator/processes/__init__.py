"""Processes: a share of a round's clients trains here, in processes beside this one, or on a cluster."""
