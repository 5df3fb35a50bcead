"""Commands of ``spider`` that need the server's packages (entry points of ``spider.commands``)."""

from __future__ import annotations

__all__: list[str] = []
