"""Coding agents on software tasks: an instance is a unit, and a record its result.

``build`` finds the tasks and what can be known before any money is spent, ``attempts`` runs one
instance until it has an outcome, ``journal`` keeps what was done and spent through a kill,
``gathering`` makes the output tree of the records, ``pipeline`` is the contract.
"""
