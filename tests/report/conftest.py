"""The page's world is made once for all tests of the report."""

from __future__ import annotations

import pytest

from tests.helpers.report_curriculum import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Read only: tests that change something copy the folder first."""
    return make_world(tmp_path_factory.mktemp("page"))
