"""Rounds as a server, an edge and a site run them: who decides, what is added, and what every kind of run shares."""
