"""The common base of all HTTP servers here: bounded connections, bodies in bounded memory, limits, proxies, TLS."""
