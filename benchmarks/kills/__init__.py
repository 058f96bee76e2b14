"""Campaigns that kill servers: `python -m benchmarks.kills`. Every acknowledged update must be counted once, in one
model."""
