"""Populations: clients and their examples, who of them takes part, how data is split among them, and attackers."""
