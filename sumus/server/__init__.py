"""A server: the tasks of a population, and one thread that decides what becomes of every request.

A report's way:

    device_plane   its length, its sender, its signature and its form are checked
    server         it waits with others for the next turn of the one thread that decides
    committer      … which takes everything that waits at once
    runs           a task's rounds: training, or evaluation; a sum becomes a model
    sums           what is added, sealed
    coordinator    `protocol.round` decides, in the transaction that writes what it decided
    storage.store  rows, in memory, SQLite or PostgreSQL
"""
