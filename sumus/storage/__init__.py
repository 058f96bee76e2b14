"""Where things are kept: every seam with an in-memory twin."""
