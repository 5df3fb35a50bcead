"""Trainers: what turns advantages into new weights. ``base`` is the contract."""
