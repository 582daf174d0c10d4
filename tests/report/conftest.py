"""Session fixture of the report tests: a curriculum with a report page."""

from __future__ import annotations

import pytest

from tests.helpers.report_curriculum import ReportedCurriculum, make_reported_curriculum


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> ReportedCurriculum:
    """Read-only: tests that change files copy the folder first."""
    return make_reported_curriculum(tmp_path_factory.mktemp("page"))
