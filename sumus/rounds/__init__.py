"""Rounds on a store: the common part of a server, an edge and a site.

run            a task's rounds: the common base of all kinds of run
circumstances  the inputs of decisions that are not stored as rows: pacing, pause, the devices of the server
coordinator    decides each event by the table in `protocol.round`, in one transaction
recording      writes a decision and its consequences for the run and for devices into rows
stages         the stages of a report on its way into a sum, as types
intake         the steps between the stages: reports are checked, staged and committed
sealed_sums    the sealed sums: a killed process loses no report that it has acknowledged
closing        the end of closed rounds: a model is made of the sum, or the sum is destroyed
seeds          the seed that all reports of a sum share
departures     devices that leave while their reports are in an open sum
"""
