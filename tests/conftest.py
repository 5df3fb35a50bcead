"""What all tests share."""

import hypothesis

from tests.support.tinker_server import tinker_server

__all__ = ["tinker_server"]

# A slow machine is no failure: hypothesis times nothing.
hypothesis.settings.register_profile("spider", deadline=None)
hypothesis.settings.load_profile("spider")
