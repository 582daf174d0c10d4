"""The stage graph in this process: hand-over, skipping, staleness, resuming, lineage. No cluster needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from motip.cluster import Cluster
from motip.config import load_config, record_reads
from motip.config.keys import Config
from motip.config.yaml_chain import WITHOUT_EFFECT
from motip.curriculum import Options
from motip.curriculum.base_weights import parent_of
from motip.curriculum.stage_inputs import SPEED_ONLY
from motip.errors import MotipError
from motip.lineage import Lineage
from motip.storage.atomic import sha256_file
from motip.train.batch_sources import RayFeed
from motip.train.ray_train import place
from motip.train.setup import build_model_for
from motip.train.stage_job import Parent, StageJob
from motip.weights.pretrained import load_checkpoint
from tests.helpers.small_curriculum import QuietUi, run, write_files

STAGES = ["BDD-Foundation", "BDD-Refinement", "Vis-Adaptation", "Vis-Specialist"]


def handed_over(config: Config, checkpoint: Path):
    """The model a stage of this configuration would start with, and the transfer report."""
    parent = Parent(str(checkpoint), sha256_file(checkpoint))
    return build_model_for(StageJob("stage", config.to_dict(), (), {}, (), {}, {}, "", parent, ""), config, None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """The small curriculum, run once with a real MLflow database, and the configuration keys it read."""
    folder = tmp_path_factory.mktemp("small")
    path = write_files(folder)
    lineage = Lineage(storage=folder / "storage")
    with record_reads() as reads:
        result, ui, curriculum = run(path, folder / "storage", lineage=lineage)
        # What only a cluster, or a stage that starts from a given file, asks for.
        stage = curriculum.stages[1]
        placement = place(1, stage.config, Cluster(cpus=2, gpus=0, nodes=1, joined=False))
        job = StageJob(stage.name, stage.config.to_dict(), (), {}, (), {}, {}, "", None, "")
        RayFeed(job, stage.config, 0, 1, placement.decoders, placement.decoder_cpus)
        given = stage.config.replaced(DETR_PRETRAIN=result.records[0].checkpoint)
        alone = stage.model_copy(update={"config": given, "weights": None})
        assert parent_of(curriculum, alone, [], Options(str(folder), str(folder))).sha256 == result.records[0].sha256
    return folder, path, result, ui, lineage, reads


def test_every_stage_starts_from_the_one_before_and_is_recorded(finished) -> None:
    _, _, result, ui, _, _ = finished
    assert [record.stage for record in result.records] == STAGES
    assert ui.begun == STAGES
    for before, after in zip(result.records, result.records[1:], strict=False):
        assert after.parent_sha256 == before.sha256
    for record in result.records:
        assert Path(record.checkpoint).is_file()
        assert {"HOTA", "DetRe", "IDF1", "IDSW", "HOTA/pedestrian", "HOTA/car"} <= set(record.metrics)


def test_the_hand_over_is_whole(finished) -> None:
    """As published it lost all 122 ID tensors and reset the head; here every tensor is the parent's."""
    folder, _, result, _, _, _ = finished
    parent = result.records[1]
    config = load_config(folder / "three.yaml")
    model, report = handed_over(config, Path(parent.checkpoint))
    stored = load_checkpoint(parent.checkpoint)["model"]
    state = model.state_dict()
    identity = [key for key in state if key.startswith(("trajectory_modeling.", "id_decoder."))]
    assert len(identity) > 20
    for key in identity:
        assert torch.equal(state[key], stored[key]), key
    assert report is not None
    assert {category for category, count in report.counts()["model"].items() if count} == {"copied"}


def test_the_pedestrian_row_survives_the_growth_from_one_class_to_two(finished) -> None:
    folder, _, result, _, _, _ = finished
    transfer = result.records[0].transfer
    assert transfer["file_classes"] == ["pedestrian"] and transfer["classes"] == ["pedestrian", "car"]
    base = next((folder / "storage" / "weights").glob("*.pth"))
    from motip.config import load_config

    config = load_config(folder / "one.yaml")
    model, _ = handed_over(config, base)
    stored = load_checkpoint(base)["model"]
    for key, value in stored.items():
        if "class_embed" in key:
            assert torch.equal(model.state_dict()[key][0], value[0]), key


def test_car_gets_positives(finished) -> None:
    """As published every label had category 0, so `car` was only ever a negative."""
    _, _, result, _, _, _ = finished
    labels = {name for record in result.records for name in record.metrics if name.startswith("GT/")}
    assert {"GT/car", "GT/pedestrian"} <= labels
    first, last = (load_checkpoint(result.records[i].checkpoint)["model"] for i in (0, 1))
    key = next(key for key in first if key.endswith("class_embed.0.weight"))
    assert not torch.equal(first[key][1], last[key][1])


def test_four_finished_runs_under_one_parent(finished) -> None:
    _, _, result, _, lineage, _ = finished
    steps = lineage.walk(result.records[-1].run_id)
    assert [step.stage for step in steps][-4:] == STAGES
    assert all(step.status == "FINISHED" for step in steps if step.kind == "stage")
    assert [step.kind for step in steps][:-4] == ["initialised"]
    checks = lineage.verify(result.records[-1].run_id)
    assert {check.state for check in checks} == {"same"}
    assert [check.what for check in checks].count("data") == 8  # train and val of each stage


def test_each_stage_has_one_run_with_all_its_papers(finished) -> None:
    _, _, result, _, lineage, _ = finished
    client = lineage._store.client()
    runs = client.search_runs([lineage._store.experiment_id])
    stages = {run.info.run_id: run for run in runs if "mlflow.parentRunId" in run.data.tags}
    assert set(stages) == {record.run_id for record in result.records} and len(runs) == 5
    for record in result.records:
        run, run_id = stages[record.run_id], record.run_id
        for paper in ("config.json", "transfer.json", "dashboard.png", "evaluation/domains.json", "scores"):
            folder, _, name = paper.rpartition("/")
            assert name in [Path(each.path).name for each in client.list_artifacts(run_id, folder or None)], paper
        table = Path(client.download_artifacts(run_id, f"evaluation/epoch_{record.best_epoch:03d}.json"))
        assert json.loads(table.read_text())["columns"][:3] == ["source", "protocol", "class"]
        assert run.data.metrics["best_HOTA"] == record.metrics["HOTA"] and "HOTA" in run.data.metrics
        assert set(run.data.params) <= set(Config.model_fields)
        assert {each.tags[0].value for each in run.inputs.dataset_inputs} == {"training", "validation"}
        alias = client.get_model_version_by_alias("motip-curriculum", record.stage.lower())
        assert (alias.run_id, alias.tags["sha256"]) == (run_id, record.sha256)


def test_a_second_run_skips_all_four(finished) -> None:
    folder, path, result, _, _, _ = finished
    again, ui, _ = run(path, folder / "storage")
    assert ui.begun == []
    assert [record.sha256 for record in again.records] == [record.sha256 for record in result.records]
    assert all(record.skipped for record in again.records)


def test_touching_one_stage_reruns_it_and_those_after(finished) -> None:
    folder, path, _, _, _, _ = finished
    _, ui, _ = run(path, folder / "storage", overrides=("Vis-Adaptation:LR=1.0e-5",))
    assert ui.begun == STAGES[2:]


def test_speed_only_keys_make_nothing_stale(finished) -> None:
    folder, path, _, _, _, _ = finished
    _, ui, _ = run(path, folder / "storage", overrides=("NUM_WORKERS=3", "LOG_EVERY_STEPS=7"))
    assert ui.begun == []


def test_an_altered_checkpoint_is_noticed(finished) -> None:
    folder, path, result, _, _, _ = finished
    checkpoint = Path(result.records[3].checkpoint)
    whole = checkpoint.read_bytes()
    try:
        checkpoint.write_bytes(whole[:-1] + b"x")
        again, ui, _ = run(path, folder / "storage")
        assert ui.begun == STAGES[3:]
        assert again.records[3].sha256 == result.records[3].sha256
    finally:
        checkpoint.write_bytes(whole)


def test_every_shipped_key_is_read_or_said_to_have_no_effect(finished, repo_root: Path) -> None:
    """Recorded while the stages above were really converted, trained, tracked and scored."""
    from motip.config.yaml_chain import read_yaml

    *_, reads = finished
    used: set[str] = set()
    for path in sorted((repo_root / "configs").rglob("*.yaml")):
        used |= set(read_yaml(path).values) & set(Config.model_fields)
    elsewhere = {
        # read where a stage is run by itself (tests/config/test_single_stage.py)
        "DATA_ROOT", "DATASETS", "DATASET_SPLITS",
        # read where a data root is chosen
        "root_path",
    }  # fmt: skip
    unread = used - reads - set(WITHOUT_EFFECT) - elsewhere
    assert not unread, f"keys nobody reads: {sorted(unread)}"
    assert not (reads & set(WITHOUT_EFFECT) - {"DETR_FRAMEWORK"}), "a key said to have no effect is read"


def test_a_missing_checkpoint_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    path.write_text(path.read_text().replace("initialise: base.yaml", "weights: nowhere.pth"))
    with pytest.raises(MotipError, match="not there") as caught:
        run(path, tmp_path / "storage")
    assert "nowhere.pth" in str(caught.value)
    assert not (tmp_path / "storage" / "curricula").exists()


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    (tmp_path / "weights.pth").write_text("these are no weights")
    path.write_text(path.read_text().replace("initialise: base.yaml", "weights: weights.pth"))
    with pytest.raises(MotipError) as caught:
        run(path, tmp_path / "storage")
    assert "weights.pth" in str(caught.value)
    assert not (tmp_path / "storage" / "curricula").exists()


def test_zero_trainable_clips_are_refused(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    with pytest.raises(MotipError, match="not a single clip"):
        run(path, tmp_path / "storage", overrides=("BDD-Foundation:sampler_lengths=[9]",))
    assert not list((tmp_path / "storage").rglob("*.json.tmp*"))


def test_fewer_videos_than_asked_for_are_refused(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    path.write_text(path.read_text().replace("source: ground, videos: 2", "source: ground, videos: 56"))
    with pytest.raises(MotipError, match="fewer") as caught:
        run(path, tmp_path / "storage")
    assert "56" in str(caught.value)


def test_a_stage_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second epoch dies; the next run trains only that one and ends with the weights of an undisturbed run."""
    import motip.train.loop as loop

    path = write_files(tmp_path)
    overrides = ("EPOCHS=2",)
    undisturbed, _, _ = run(path, tmp_path / "whole", overrides=overrides)
    real = loop.train_epoch

    def dies_in_the_second(live, epoch):
        if epoch == 1 and live.job.stage == "BDD-Refinement":
            raise RuntimeError("power cut")
        return real(live, epoch)

    monkeypatch.setattr(loop, "train_epoch", dies_in_the_second)
    with pytest.raises(RuntimeError, match="power cut"):
        run(path, tmp_path / "cut", overrides=overrides)
    monkeypatch.setattr(loop, "train_epoch", real)
    resumed, ui, _ = run(path, tmp_path / "cut", overrides=overrides)
    assert ui.begun == STAGES[1:]
    epochs = [values["epoch"] for kind, values in ui.records if kind == "epoch"]
    assert epochs[0] == 1
    for one, other in zip(undisturbed.records, resumed.records, strict=True):
        a, b = (load_checkpoint(record.checkpoint)["model"] for record in (one, other))
        assert all(torch.equal(a[key], b[key]) for key in a), one.stage
    folder = Path(resumed.records[1].checkpoint).parent
    assert json.loads((folder / "stage.json").read_text())["status"] == "finished"


def test_how_a_run_survives_does_not_make_its_stages_stale() -> None:
    """Keys that only say when to save, wait, restart or look belong to no stage's identity."""
    paced = {name for name in Config.model_fields if name.startswith(("CHECKPOINT", "EPOCH_CHECKPOINTS", "COLLECTIVE"))}
    assert paced | {"WORKER_RESTARTS", "RESIZE_EVERY_S", "NONFINITE_LIMIT", "LOG_EVERY_STEPS"} <= SPEED_ONLY


def test_a_curriculum_that_is_interrupted_is_marked_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: QuietUi, kind: str, values: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(QuietUi, "record", interrupt)
    lineage = Lineage(storage=tmp_path / "storage")
    with pytest.raises(KeyboardInterrupt):
        run(write_files(tmp_path), tmp_path / "storage", lineage=lineage)
    client = lineage._store.client()
    runs = client.search_runs([lineage._store.experiment_id])
    assert {each.info.status for each in runs} == {"KILLED"} and len(runs) == 2, "the curriculum's and the stage's"
