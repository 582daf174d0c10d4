"""A stage on a real Ray cluster with its storage in S3, while requests to S3 fail: nothing is lost or half-written."""

from __future__ import annotations

from pathlib import Path

import pytest

from motip.cluster import connect, disconnect
from motip.config import load_curriculum
from motip.curriculum import Options, run_curriculum
from motip.events import EpochDone, StepLogged
from motip.storage.paths import Location, files_under, location, read_json
from tests.cluster.conftest import QUICK
from tests.helpers.mlflow_database import lineage_on
from tests.helpers.object_store import object_store
from tests.helpers.small_curriculum import QuietUi, write_files

pytestmark = pytest.mark.cluster

STAGE = "BDD-Foundation"
OVERRIDES = (
    "EPOCHS=2",
    "CLIPS_PER_EPOCH=2",
    "CHECKPOINT_EVERY_STEPS=1",
    "CHECKPOINTS_KEPT=1",
    "EPOCH_CHECKPOINTS_KEPT=1",
    "LOG_EVERY_STEPS=1",
    "CHECKPOINT_EVERY_MINUTES=null",
)
MORE_THAN_CLIENT_RETRIES = 4


def _losses(ui: QuietUi) -> dict[int, float]:
    steps = [event for event in ui.events if isinstance(event, StepLogged)]
    assert len({event.step for event in steps}) == len(steps), "a step was taken twice"
    return {event.step: event.metrics["step/loss"] for event in steps}


def _epochs(ui: QuietUi) -> list[int]:
    return [event.epoch for event in ui.events if isinstance(event, EpochDone)]


def _weights(folder: Location) -> set[str]:
    return {path.name for path in files_under(folder) if path.suffix == ".pth"}


def test_failing_s3_requests_cost_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    path = write_files(tmp_path, domains=False)
    curriculum = load_curriculum(path, OVERRIDES)
    with object_store() as store:
        options = Options(str(tmp_path), f"{store.uri}/storage", workers=1, config_path=str(path), until=STAGE)

        def train() -> tuple[QuietUi, Location]:
            ui = QuietUi()
            result = run_curriculum(curriculum, options, cluster, lineage_on(tmp_path), ui)
            return ui, location(result.records[0].checkpoint).parent

        cluster = connect(num_cpus=2)  # a separate Ray: its processes need this store in their environment
        try:
            store.fail("POST .*checkpoint_0.pth", MORE_THAN_CLIENT_RETRIES)
            store.fail("(PUT|POST) .*checkpoint_step_2.pth", MORE_THAN_CLIENT_RETRIES, drop=True)
            store.fail("(PUT|POST) .*checkpoint_manager_snapshot", MORE_THAN_CLIENT_RETRIES)
            store.fail("DELETE .*checkpoint_step", MORE_THAN_CLIENT_RETRIES, drop=True)
            ui, folder = train()
            assert [failure.left for failure in store.failures] == [0, 0, 0, 0]
            assert sorted(_losses(ui)) == [1, 2, 3, 4], "every step once, none repeated after a crash"
            assert _epochs(ui) == [0, 1]
            best = read_json(folder / "stage.json")["best_epoch"]
            newest = "checkpoint_step_4.pth"
            assert _weights(folder) == {"checkpoint_best.pth", "checkpoint_1.pth", f"checkpoint_{best}.pth", newest}
            emptied = {f"step_{step:08d}" for step in (1, 2, 3)}
            assert emptied <= {each.name for each in folder.iterdir()}, "Ray's list of checkpoints still refers to them"

            # State of a run killed while the last epoch was written: weights present, metrics.json absent.
            (folder / "epoch_001" / "metrics.json").unlink()
            (folder / "stage.json").unlink()
            again, _ = train()
            assert _losses(again) == {} and _epochs(again) == [1], "resumed after the last step"
            assert read_json(folder / "stage.json")["best_epoch"] == best
        finally:
            disconnect()
