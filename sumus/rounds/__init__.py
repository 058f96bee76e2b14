"""Rounds on a store: what a server, an edge and a site do alike.

run            a task's rounds: what every kind of run shares
circumstances  what decisions depend on besides rows: pacing, pause, the devices of the server
coordinator    asks the table `protocol.round` about each event, in one transaction
recording      writes a decision into rows, with what follows from it for the run and for devices
stages         the stages of a report on its way into a sum, as types
intake         the way itself: reports are checked, staged and committed
sealed_sums    the sums, sealed, so that a killed process loses nothing that it has acknowledged
closing        what becomes of rounds that have closed: a model, or nothing
seeds          the seed that everybody shares who reports into a sum
departures     devices that leave while their reports are in an open sum
"""
