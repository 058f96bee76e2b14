"""The device: a server's rounds, on examples that stay here."""
