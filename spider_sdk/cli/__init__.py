"""The ``spider`` command. ``main`` is its root; every other module here is one group of commands,
imported when one of them runs."""

from __future__ import annotations

__all__: list[str] = []
