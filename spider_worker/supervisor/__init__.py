"""The supervisor: claims units for runners, keeps their leases, watches and kills them."""

from __future__ import annotations

__all__ = ["Supervisor"]

from spider_worker.supervisor.supervisor import Supervisor
