"""Stage graph in this process, without a cluster: transfer, skipping, staleness, resuming, lineage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from motip.cluster import Cluster
from motip.config import load_config
from motip.config.fields import WITHOUT_EFFECT
from motip.config.keys import Config
from motip.curriculum import Options
from motip.curriculum.base_weights import parent_of
from motip.curriculum.stage_inputs import NON_IDENTITY_KEYS
from motip.errors import MotipError
from motip.events import EpochDone, Event
from motip.storage.atomic import sha256_file
from motip.train.batch_sources import BatchSource
from motip.train.ray_train import plan_resources
from motip.train.setup import build_model_for
from motip.train.stage_job import Parent, StageJob
from motip.weights import load_checkpoint
from tests.helpers.config_reads import record_reads
from tests.helpers.mlflow_database import lineage_on
from tests.helpers.small_curriculum import QuietUi, run, write_files

STAGES = ["BDD-Foundation", "BDD-Refinement", "Vis-Adaptation", "Vis-Specialist"]


def transferred_model(config: Config, checkpoint: Path):
    """The model a stage of this configuration would start with, and the transfer report."""
    parent = Parent(str(checkpoint), sha256_file(checkpoint))
    return build_model_for(StageJob("stage", config.to_dict(), (), {}, (), {}, {}, "", parent, ""), config, None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """The small curriculum, run once with an MLflow database, and the configuration keys it read."""
    folder = tmp_path_factory.mktemp("small")
    path = write_files(folder)
    lineage = lineage_on(folder / "storage")
    with record_reads() as reads:
        result, ui, curriculum = run(path, folder / "storage", lineage=lineage)
        # Keys read only on a cluster, or by a stage that starts from a given file.
        stage = curriculum.stages[1]
        placement = plan_resources(1, stage.config, Cluster(cpus=2, gpus=0, nodes=1, joined=False))
        job = StageJob(stage.name, stage.config.to_dict(), (), {}, (), {}, {}, "", None, "")
        BatchSource(job, stage.config, 0, 1, placement.decoders, placement.decoder_cpus)
        given = stage.config.replaced(DETR_PRETRAIN=result.records[0].checkpoint)
        alone = stage.model_copy(update={"config": given, "weights": None})
        assert parent_of(curriculum, alone, [], Options(str(folder), str(folder))).sha256 == result.records[0].sha256
    return folder, path, result, ui, lineage, reads


def test_every_stage_starts_from_the_previous_one_and_is_recorded(finished) -> None:
    _, _, result, ui, _, _ = finished
    assert [record.stage for record in result.records] == STAGES
    assert ui.begun == STAGES
    for before, after in zip(result.records, result.records[1:], strict=False):
        assert after.parent_sha256 == before.sha256
    for record in result.records:
        assert Path(record.checkpoint).is_file()
        assert {"HOTA", "DetRe", "IDF1", "IDSW", "HOTA/pedestrian", "HOTA/car"} <= set(record.metrics)


def test_the_transfer_between_stages_copies_every_tensor(finished) -> None:
    """The published code lost all 122 ID tensors and reset the head; here every tensor equals the parent's."""
    folder, _, result, _, _, _ = finished
    parent = result.records[1]
    config = load_config(folder / "three.yaml")
    model, report = transferred_model(config, Path(parent.checkpoint))
    stored = load_checkpoint(parent.checkpoint)["model"]
    state = model.state_dict()
    identity = [key for key in state if key.startswith(("trajectory_modeling.", "id_decoder."))]
    assert len(identity) > 20
    for key in identity:
        assert torch.equal(state[key], stored[key]), key
    assert report is not None
    assert {category for category, count in report.counts()["model"].items() if count} == {"copied"}


def test_the_pedestrian_row_is_copied_when_one_class_grows_to_two(finished) -> None:
    folder, _, result, _, _, _ = finished
    transfer = result.records[0].transfer
    assert transfer["file_classes"] == ["pedestrian"] and transfer["classes"] == ["pedestrian", "car"]
    base = next((folder / "storage" / "weights").glob("*.pth"))
    from motip.config import load_config

    config = load_config(folder / "one.yaml")
    model, _ = transferred_model(config, base)
    stored = load_checkpoint(base)["model"]
    for key, value in stored.items():
        if "class_embed" in key:
            assert torch.equal(model.state_dict()[key][0], value[0]), key


def test_car_is_trained_with_positive_labels(finished) -> None:
    """The published code gave every label category 0, so `car` was only a negative."""
    _, _, result, _, _, _ = finished
    labels = {name for record in result.records for name in record.metrics if name.startswith("GT/")}
    assert {"GT/car", "GT/pedestrian"} <= labels
    first, last = (load_checkpoint(result.records[i].checkpoint)["model"] for i in (0, 1))
    key = next(key for key in first if key.endswith("class_embed.0.weight"))
    assert not torch.equal(first[key][1], last[key][1])


def test_lineage_of_four_finished_stages_verifies(finished) -> None:
    _, _, result, _, lineage, _ = finished
    steps = lineage.chain(result.records[-1].run_id)
    assert [step.stage for step in steps][-4:] == STAGES
    assert all(step.status == "FINISHED" for step in steps if step.kind == "stage")
    assert [step.kind for step in steps][:-4] == ["initialised"]
    checks = lineage.verify(result.records[-1].run_id)
    assert {check.state for check in checks} == {"same"}
    assert [check.what for check in checks].count("data") == 8  # train and val of each stage


def test_each_stage_has_one_run_with_all_artifacts(finished) -> None:
    _, _, result, _, lineage, _ = finished
    client = lineage._store.client()
    runs = client.search_runs([lineage._store.experiment_id])
    stages = {run.info.run_id: run for run in runs if "mlflow.parentRunId" in run.data.tags}
    assert set(stages) == {record.run_id for record in result.records} and len(runs) == 5
    for record in result.records:
        run, run_id = stages[record.run_id], record.run_id
        for artifact in ("config.json", "transfer.json", "dashboard.png", "evaluation/domains.json", "scores"):
            folder, _, name = artifact.rpartition("/")
            assert name in [Path(each.path).name for each in client.list_artifacts(run_id, folder or None)], artifact
        table = Path(client.download_artifacts(run_id, f"evaluation/epoch_{record.best_epoch:03d}.json"))
        assert json.loads(table.read_text())["columns"][:3] == ["source", "protocol", "class"]
        assert run.data.metrics["best_HOTA"] == record.metrics["HOTA"] and "HOTA" in run.data.metrics
        assert set(run.data.params) <= set(Config.model_fields)
        assert {each.tags[0].value for each in run.inputs.dataset_inputs} == {"training", "validation"}
        alias = client.get_model_version_by_alias("motip-curriculum", record.stage.lower())
        assert (alias.run_id, alias.tags["sha256"]) == (run_id, record.sha256)


def test_a_second_run_skips_all_stages(finished) -> None:
    folder, path, result, _, _, _ = finished
    again, ui, _ = run(path, folder / "storage")
    assert ui.begun == []
    assert [record.sha256 for record in again.records] == [record.sha256 for record in result.records]
    assert all(record.skipped for record in again.records)


def test_a_changed_stage_reruns_it_and_later_stages(finished) -> None:
    folder, path, _, _, _, _ = finished
    _, ui, _ = run(path, folder / "storage", overrides=("Vis-Adaptation:LR=1.0e-5",))
    assert ui.begun == STAGES[2:]


def test_non_identity_keys_make_no_stage_stale(finished) -> None:
    folder, path, _, _, _, _ = finished
    _, ui, _ = run(path, folder / "storage", overrides=("NUM_WORKERS=3", "LOG_EVERY_STEPS=7"))
    assert ui.begun == []


def test_an_altered_checkpoint_is_trained_again(finished) -> None:
    folder, path, result, _, _, _ = finished
    checkpoint = Path(result.records[3].checkpoint)
    original = checkpoint.read_bytes()
    try:
        checkpoint.write_bytes(original[:-1] + b"x")
        again, ui, _ = run(path, folder / "storage")
        assert ui.begun == STAGES[3:]
        assert again.records[3].sha256 == result.records[3].sha256
    finally:
        checkpoint.write_bytes(original)


def test_every_shipped_key_is_read_or_declared_without_effect(finished, repo_root: Path) -> None:
    """Reads are recorded while the stages are converted, trained, tracked and scored."""
    from motip.config.yaml_chain import read_yaml

    *_, reads = finished
    used: set[str] = set()
    for path in sorted((repo_root / "configs").rglob("*.yaml")):
        used |= set(read_yaml(path).values) & set(Config.model_fields)
    elsewhere = {
        # read for a stage alone (tests/config/test_single_stage.py)
        "DATA_ROOT",
        "DATASETS",
        "DATASET_SPLITS",
        # read by the option --data-root
        "root_path",
    }
    unread = used - reads - set(WITHOUT_EFFECT) - elsewhere
    assert not unread, f"unread keys: {sorted(unread)}"
    assert not (reads & set(WITHOUT_EFFECT) - {"DETR_FRAMEWORK"}), "a key declared without effect is read"


def test_a_missing_checkpoint_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    path.write_text(path.read_text().replace("initialise: base.yaml", "weights: nowhere.pth"))
    with pytest.raises(MotipError, match="do not exist") as caught:
        run(path, tmp_path / "storage")
    assert "nowhere.pth" in str(caught.value)
    assert not (tmp_path / "storage" / "curricula").exists()


def test_an_invalid_checkpoint_file_is_an_error(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    (tmp_path / "weights.pth").write_text("these are no weights")
    path.write_text(path.read_text().replace("initialise: base.yaml", "weights: weights.pth"))
    with pytest.raises(MotipError) as caught:
        run(path, tmp_path / "storage")
    assert "weights.pth" in str(caught.value)
    assert not (tmp_path / "storage" / "curricula").exists()


def test_no_trainable_clip_is_an_error(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    with pytest.raises(MotipError, match="no clip to train on"):
        run(path, tmp_path / "storage", overrides=("BDD-Foundation:sampler_lengths=[9]",))
    assert not list((tmp_path / "storage").rglob("*.json.tmp*"))


def test_fewer_videos_than_configured_is_an_error(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    path.write_text(path.read_text().replace("source: ground, videos: 2", "source: ground, videos: 56"))
    with pytest.raises(MotipError, match="fewer") as caught:
        run(path, tmp_path / "storage")
    assert "56" in str(caught.value)


def test_an_interrupted_stage_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second epoch fails; the next run trains only that one and ends with the weights of an undisturbed run."""
    import motip.train.loop as loop

    path = write_files(tmp_path)
    overrides = ("EPOCHS=2",)
    undisturbed, _, _ = run(path, tmp_path / "undisturbed", overrides=overrides)
    real = loop.train_epoch

    def fails_in_the_second(live, epoch):
        if epoch == 1 and live.job.stage == "BDD-Refinement":
            raise RuntimeError("power cut")
        return real(live, epoch)

    monkeypatch.setattr(loop, "train_epoch", fails_in_the_second)
    with pytest.raises(RuntimeError, match="power cut"):
        run(path, tmp_path / "cut", overrides=overrides)
    monkeypatch.setattr(loop, "train_epoch", real)
    resumed, ui, _ = run(path, tmp_path / "cut", overrides=overrides)
    assert ui.begun == STAGES[1:]
    epochs = [event.epoch for event in ui.events if isinstance(event, EpochDone)]
    assert epochs[0] == 1
    for one, other in zip(undisturbed.records, resumed.records, strict=True):
        a, b = (load_checkpoint(record.checkpoint)["model"] for record in (one, other))
        assert all(torch.equal(a[key], b[key]) for key in a), one.stage
    folder = Path(resumed.records[1].checkpoint).parent
    assert json.loads((folder / "stage.json").read_text())["status"] == "finished"


def test_checkpoint_and_recovery_keys_make_no_stage_stale() -> None:
    """Keys about saving, waiting, restarting or polling are not part of a stage's identity."""
    paced = {name for name in Config.model_fields if name.startswith(("CHECKPOINT", "EPOCH_CHECKPOINTS", "COLLECTIVE"))}
    assert paced | {"WORKER_RESTARTS", "RESIZE_EVERY_S", "NONFINITE_LIMIT", "LOG_EVERY_STEPS"} <= NON_IDENTITY_KEYS


def test_an_interrupted_curriculum_is_marked_as_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: QuietUi, event: Event) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(QuietUi, "event", interrupt)
    lineage = lineage_on(tmp_path / "storage")
    with pytest.raises(KeyboardInterrupt):
        run(write_files(tmp_path), tmp_path / "storage", lineage=lineage)
    client = lineage._store.client()
    runs = client.search_runs([lineage._store.experiment_id])
    assert {each.info.status for each in runs} == {"KILLED"} and len(runs) == 2, "the curriculum's and the stage's"
