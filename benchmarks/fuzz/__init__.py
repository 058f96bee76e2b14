"""Fuzzing of every parser that reads bytes from outside; `python -m benchmarks.fuzz --help` says how to run it."""
