"""MLflow's own UI in headless Chromium: the four stages of a curriculum side by side."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.helpers.browser import browser
from tests.helpers.mlflow_database import lineage_on
from tests.helpers.mlflow_server import compared, comparison, only_differences, row, serving
from tests.lineage.test_recorder import CONFIG, record_stage

STAGES = {
    "BDD-Foundation": (0.0007, 16, 41.25),
    "BDD-Refinement": (0.0005, 16, 44.5),
    "Vis-Adaptation": (0.0003, 64, 21.75),
    "Vis-Specialist": (0.0002, 64, 27.125),
}
"""Learning rate, ID vocabulary, best HOTA; the last epoch's HOTA is two points lower."""


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_the_comparison_of_four_stages_shows_differences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    storage = tmp_path / "storage"
    lineage = lineage_on(storage)
    parent = lineage.start_curriculum("demo", {"stages": list(STAGES)})
    start: dict | None = None
    for stage, (rate, words, hota) in STAGES.items():
        config = {**CONFIG, "LR": rate, "NUM_ID_VOCABULARY": words, "SEED": 29}
        start = record_stage(lineage, storage, parent, stage, config, start, {"HOTA": hota})
        lineage.log_metrics(start["run_id"], {"HOTA": hota - 2}, 9)  # the last epoch, not the best
    steps = [step for step in lineage.chain(parent) if step.kind == "stage"]
    runs = [step.run_id for step in steps]
    _, link = lineage.compare_url_hint(runs)

    (tmp_path / "server").mkdir()
    with browser(tmp_path) as window, serving(tmp_path / "server", storage / "mlflow" / "mlflow.db") as server:
        page = comparison(server.address, runs, "1")
        assert link.partition("/#/")[2] == page.partition("/#/")[2]  # the link printed by the main job
        window.set_screen(1500, 1400, "light")
        rows = compared(window, page, ["LR", "NUM_ID_VOCABULARY", "SEED", "best_HOTA", "HOTA"], len(runs))
        assert rows["LR"] == ["0.0007", "0.0005", "0.0003", "0.0002"]
        assert rows["NUM_ID_VOCABULARY"] == ["16", "16", "64", "64"]
        assert rows["SEED"] == ["29"] * 4
        assert rows["best_HOTA"] == ["41.25", "44.5", "21.75", "27.13"]  # the page rounds
        assert rows["HOTA"] == ["39.25", "42.5", "19.75", "25.13"]
        only_differences(window)
        assert {name: row(window, name, len(runs)) for name in ("LR", "best_HOTA")} == {
            name: rows[name] for name in ("LR", "best_HOTA")
        }
        text = window.run("return document.body.innerText")
        assert all(stage in text for stage in STAGES) and "SEED" not in text
        window.screenshot(tmp_path / "compare.png", 1400)
    pixels = cv2.imread(str(tmp_path / "compare.png"))
    assert pixels is not None and pixels.shape[:2] == (1400, 1500)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100  # a page with content, not a blank one
