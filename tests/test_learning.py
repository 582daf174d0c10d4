"""The demo teaches: a shortened chain beats its base weights in the domains it enters, by a wide margin."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small_curriculum import ROOT, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_each_domain_is_learned_when_a_stage_enters_it(tmp_path: Path) -> None:
    """Half an hour of one core. The seed is fixed; the margins are a fraction of what whole stages gain."""
    path = ROOT / "configs" / "demo" / "curriculum.yaml"
    result, _, _ = run(path, tmp_path, overrides=("SEED=5", "EPOCHS=5", "SCHEDULER_MILESTONES=[3,4]"))
    assert result.domains is not None
    scores = result.domains.matrix.values
    assert scores["base"]["dance"] > 45, "the shipped base weights track their own domain"
    assert scores["base"]["aerial"] < 5
    assert scores["BDD-Refinement"]["ground"] > scores["base"]["ground"] + 10
    assert scores["Vis-Specialist"]["aerial"] > scores["BDD-Refinement"]["aerial"] + 10
    assert scores["Vis-Specialist"]["dance"] < scores["base"]["dance"] - 5, "without replay the base domain suffers"
