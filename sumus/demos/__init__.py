"""Demos on data that comes inside packages; each module defines `experiment`."""
