"""The common base of all HTTP servers in sumus: bounded connections, bodies in bounded memory, limits, proxies, TLS."""
