"""From a shard to the loss: labels and configuration reach the training step and its metrics."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import motip.train.loop as loop
from motip.config import Config
from motip.data.batch import ClipBatch
from motip.data.clip_loader import ClipLoader, local_batches, plan_videos
from motip.data.clips import PlanVideo, plan_clips
from motip.data.sequence import UNTRACKED, ClassMap, Frame, Sequence
from motip.data.shards import shard_path, write_shard
from motip.model.detector import DeformableDetr
from motip.train.batch_sources import BatchSource
from motip.train.collectives import SingleProcess
from motip.train.loop import train_epoch
from motip.train.optimizer import LearningRates, build_optimizer
from motip.train.ray_train import ResourcePlan, fit
from motip.train.stage_job import EpochPlans, StageJob
from motip.train.state import Run
from motip.train.step import TrainStep
from tests.helpers.small_training import small_config, small_model
from tests.helpers.training_run import CallbackChannel, folder_store

CLASSES = {"ground": {"pedestrian": ("pedestrian",), "car": ("car",)}}
SETTINGS: dict[str, Any] = {
    "AUG_RESIZE_SCALES": [64],
    "AUG_MAX_SIZE": 96,
    "AUG_RANDOM_RESIZE": [64],
    "AUG_RANDOM_CROP_MIN": 64,
    "AUG_RANDOM_CROP_MAX": 96,
    "AUG_NUM_GROUPS": 2,
    "SAMPLE_LENGTHS": None,
    "sampler_lengths": [3],
    "sample_intervals": [1],
}


def write_video(storage: Path, name: str, frames: int = 6, region: bool = False) -> SimpleNamespace:
    """Write a video of three cars, and with ``region`` an ignore region over the full image."""
    labelled = []
    for number in range(frames):
        picture = np.random.default_rng(number).integers(0, 255, (8, 12, 3), dtype=np.uint8)
        encoded = cv2.imencode(".jpg", cv2.resize(picture, (96, 64)))[1].tobytes()
        boxes = [[10 + 20 * index, 20, 26 + 20 * index, 40] for index in range(3)] + [[0, 0, 96, 64]] * region
        count = len(boxes)
        labelled.append(
            Frame(
                number=number,
                image=encoded,
                boxes_xyxy=np.array(boxes, np.float32),
                track_ids=np.array([1, 2, 3] + [UNTRACKED] * region),
                categories=("car", "car", "car", "ignored-regions")[:count],
                ignore=np.array([False, False, False, True])[:count],
                occlusion=np.zeros(count, np.int8),
                truncation=np.zeros(count, np.int8),
            )
        )
    shard = f"ground/train/{name}.parquet"
    path = shard_path(storage, shard)
    write_shard(Sequence(name, "test", "train", 5.0, 96, 64, tuple(labelled)), path, source="ground")
    return SimpleNamespace(source="ground", video=name, shard=shard, fps=5.0)


def class_maps(config: Config) -> dict[str, ClassMap]:
    return {name: ClassMap(config.class_names, dict(raws)) for name, raws in CLASSES.items()}


def job_of(config: Config, storage: Path, entries: list[SimpleNamespace]) -> StageJob:
    videos = tuple(plan_videos(entries, class_maps(config), storage))
    return StageJob("stage", config.to_dict(), videos, {"ground": 1.0}, (), {}, CLASSES, str(storage), None, "")


def batch_of(config: Config, storage: Path, entry: SimpleNamespace) -> ClipBatch:
    videos = plan_videos([entry], class_maps(config), storage)
    plan = plan_clips(videos, config.clip_schedule(0), epoch=0, seed=1, max_clips=1)
    return next(local_batches(plan, ClipLoader(config, class_maps(config), storage)))


def test_unmatched_predictions_in_ignore_regions_are_not_penalised(tmp_path: Path) -> None:
    config = small_config(**SETTINGS)
    losses = {}
    for region in (False, True):
        batch = batch_of(config, tmp_path, write_video(tmp_path, f"v{region}", region=region))
        assert [len(regions) for regions in batch.ignore_cxcywh[0]] == [int(region)] * 3
        assert [len(boxes) for boxes in batch.boxes_cxcywh[0]] == [3] * 3
        model = small_model(config)
        step = TrainStep(model, config, SingleProcess())
        losses[region] = step.accumulate(batch, torch.arange(3)).values
    queries = 3 * config.DETR_NUM_QUERIES
    assert losses[False]["ignored_queries"] == 0
    assert queries / 2 < losses[True]["ignored_queries"] <= queries - 9, "matched predictions are never ignored"
    assert losses[True]["loss_ce"] < losses[False]["loss_ce"]
    assert losses[True]["loss_bbox"] == pytest.approx(losses[False]["loss_bbox"])


@pytest.mark.parametrize(("rule", "kept", "dropped"), [("distractor", 2.0, 0.0), ("drop", 0.0, 2.0)])
def test_objects_beyond_the_vocabulary_are_epoch_metrics(
    tmp_path: Path, rule: str, kept: float, dropped: float
) -> None:
    config = small_config(**SETTINGS, NUM_ID_VOCABULARY=1, SUBSET_OVERFLOW=rule, EPOCHS=1)
    job = job_of(config, tmp_path, [write_video(tmp_path, "v")])
    model, batch_source, comm = small_model(config), BatchSource(job, config), SingleProcess()
    optimizer = build_optimizer(model, config)
    run = Run(
        job,
        config,
        comm,
        batch_source,
        CallbackChannel(tmp_path / "out", lambda event: None),
        folder_store(tmp_path / "out"),
        torch.device("cpu"),
        model,
        optimizer,
        LearningRates(optimizer, config, batch_source.plan(0).steps),
        TrainStep(model, config, comm),
    )
    metrics = train_epoch(run, 0)
    clips = metrics["plan/clips"]
    assert clips == batch_source.plan(0).steps == 4
    assert metrics["distractors"] == kept * clips
    assert metrics["objects_without_id_slot"] == dropped * clips


def test_few_frames_lie_between_the_start_of_a_training_and_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path from the command to the network's forward pass has at most eleven functions of this package."""
    monkeypatch.setattr(loop, "validate", lambda run, epoch: {})
    real, package = DeformableDetr.forward, str(Path(loop.__file__).parents[1])
    paths: list[list[str]] = []

    def forward(self: DeformableDetr, *arguments: Any) -> Any:
        paths.append([each.name for each in traceback.extract_stack() if each.filename.startswith(package)])
        return real(self, *arguments)

    monkeypatch.setattr(DeformableDetr, "forward", forward)
    config = small_config(**SETTINGS, EPOCHS=1, CLIPS_PER_EPOCH=1)
    fit(job_of(config, tmp_path, [write_video(tmp_path, "v")]), ResourcePlan(workers=0), str(tmp_path / "stage"))
    assert paths[0] == [
        "fit",
        "train_stage_on_worker",
        "train_epoch",
        "accumulate",
        "clip_losses",
        "detect_frames",
    ]


def test_intervals_in_seconds_span_the_same_time_in_every_dataset(tmp_path: Path) -> None:
    config = small_config(**{**SETTINGS, "sample_intervals": None, "sample_interval_seconds": [0.4]})
    videos = [
        PlanVideo("ground", name, f"{name}.parquet", tuple(range(60)), (1,) * 60, fps)
        for name, fps in (("bdd", 5.0), ("dance", 20.0), ("vis", 30.0))
    ]
    job = StageJob("stage", config.to_dict(), tuple(videos), {}, (), {}, CLASSES, "", None, "")
    rates = {video.video: video.fps for video in videos}
    plan = EpochPlans(job, config, world_size=1)(0)
    assert {clip.video: clip.interval for clip in plan.clips} == {"bdd": 2, "dance": 8, "vis": 12}
    assert {(clip.frame_numbers[-1] - clip.frame_numbers[0]) / rates[clip.video] for clip in plan.clips} == {0.8}
