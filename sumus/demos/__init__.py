"""Demos on data sets that are part of Python packages. Each module defines `experiment`."""
