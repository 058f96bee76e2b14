"""Populations: clients and their examples, which of them take part, how data is split among them, and attackers."""
