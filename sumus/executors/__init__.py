"""The executors, which train clients one after another or many at once: the contract, its implementations, and the choice among
them.

Importing this package, and `sumus.executors.executor` with the contract, needs no torch. The implementations do.
"""
