"""What all tests share."""

import os

import hypothesis
import pytest

from tests.support.tinker_server import tinker_server

__all__ = ["tinker_server"]


def pytest_configure(config: pytest.Config) -> None:
    """The tests are of the CPU, whose results they compare, but for those of ``make gpu``."""
    selected = str(config.option.markexpr)
    if "gpu" not in selected or "not gpu" in selected:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


# A slow machine is no failure: hypothesis times nothing.
hypothesis.settings.register_profile("spider", deadline=None)
hypothesis.settings.load_profile("spider")
