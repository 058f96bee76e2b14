"""Populations: clients and their examples, their participation, the splits of data among them, and attackers."""
