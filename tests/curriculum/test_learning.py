"""Learning in the demo: a shortened curriculum beats its base weights in new domains by a wide margin."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.small_curriculum import ROOT, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_each_domain_is_learned_by_its_first_stage(tmp_path: Path) -> None:
    """Ten minutes of one core. The seed is fixed; the margins are about half the gain of full-length stages."""
    path = ROOT / "configs" / "demo" / "curriculum.yaml"
    overrides = ("SEED=5", "EPOCHS=4", "EVALUATE_EVERY_EPOCHS=4", "SCHEDULER_MILESTONES=[3]")
    result, _, _ = run(path, tmp_path, overrides=overrides)
    assert result.domains is not None
    scores = result.domains.matrix.values
    base, last = scores["base"], scores["Vis-Specialist"]
    assert base["dance"] > 55, "the shipped base weights track their own domain"
    assert base["aerial"] < 10 and base["ground"] < 15
    assert scores["BDD-Refinement"]["ground"] > base["ground"] + 20
    assert last["aerial"] > base["aerial"] + 25
    assert last["dance"] < base["dance"] - 15, "without replay the base domain suffers"
