"""Fuzzing of every parser that reads bytes from outside. `python -m benchmarks.fuzz --help` explains how to run it."""
