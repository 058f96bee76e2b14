"""Campaigns that kill servers: `python -m benchmarks.kills`. What was acknowledged must be counted, once, in one model."""
