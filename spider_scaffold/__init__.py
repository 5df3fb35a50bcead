"""``spider-scaffold``: trajectories of coding agents, from a config to a judged data set."""

from __future__ import annotations
