"""The wire format: converts trees, sums, reports, messages and bundles to bytes and back. It does no IO, and does not use
pickle.
"""
