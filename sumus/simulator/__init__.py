"""The simulator: populations, rounds in one process, evaluation, history, checkpoints."""
