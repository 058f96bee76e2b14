"""A server: the tasks of a population, and one thread that decides about every request.

A report goes through these modules, from the socket to the disk:

    senders        the sender of the request, and the body
    device_plane   the endpoints for devices; `edge_plane` has those for edges
    rounds.intake  the body is read and checked; the result is a value that can be added to a sum
    server         the report waits for the next turn of the one thread that decides
    report_queue   the waiting reports are staged and committed, one run after the other
    rounds.*       `protocol.round` decides, in the transaction that writes the decision and the sealed sum
    storage.store  rows, in memory, SQLite or PostgreSQL

A check-in goes through `senders`, `device_plane`, `server`, `admission` and `check_ins`. A closed round becomes a model in
`training`, or metrics in `evaluation`.
"""
