"""What tests of trajectories share."""

from __future__ import annotations

from tests.support.tiny_model import tiny_model

__all__ = ["tiny_model"]
