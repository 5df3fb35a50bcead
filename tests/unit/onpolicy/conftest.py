"""Two tiny models of different tokenizers, made once."""

from __future__ import annotations

import pytest

from tests.support.distil import Models, make_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"))
