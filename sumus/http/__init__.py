"""What all that listens has in common: bounded connections, bodies in bounded memory, limits, proxies, TLS."""
