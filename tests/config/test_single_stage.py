"""A curriculum of a single stage: sources, classes and validation from the configuration's published keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from motip.config import Config, load_config
from motip.config.single_stage import single_stage
from motip.data.formats.motchallenge import CATEGORIES
from motip.errors import MotipError
from tests.helpers.small_dataset import write_dance_dataset, write_sequence


def config(**values: Any) -> Config:
    plain = {"NUM_CLASSES": 2, "DATASETS": ["DanceTrack"], "val_config": {}, **values}
    return Config.from_dict(plain)


def test_the_shipped_stages_find_their_data(tmp_path: Path, repo_root: Path) -> None:
    (tmp_path / "bdd100k").mkdir()
    (tmp_path / "datasets" / "visdrone").mkdir(parents=True)
    config = load_config(repo_root / "configs/bdd_stage2.yaml")
    curriculum = single_stage(config, str(tmp_path), CATEGORIES, videos=150)
    assert curriculum.name == "bdd_stage2" and curriculum.stages[0].val is None
    source = curriculum.sources["bdd100k"]
    assert (source.format, source.root, source.fps) == ("bdd100k", str(tmp_path / "bdd100k"), 5.0)
    assert source.splits == {"train": "train", "val": "val"}
    assert source.classes == {"pedestrian": ("pedestrian",), "car": ("car",)}
    assert curriculum.stages[0].data[0].videos == 150
    assert curriculum.parent_of(curriculum.stages[0]) is None and curriculum.stages[0].weights is None
    # DATA_ROOT below the data root is searched first.
    aerial = single_stage(load_config(repo_root / "configs/visdrone_stage1.yaml"), str(tmp_path), CATEGORIES)
    assert aerial.sources["visdrone"].root == str(tmp_path / "datasets" / "visdrone")
    assert aerial.sources["visdrone"].classes["car"] == ("car", "van")
    assert aerial.stages[0].data[0].videos is None


def test_several_datasets_with_splits_and_weights(tmp_path: Path) -> None:
    for name in ("BDD100K", "visdrone"):
        (tmp_path / name).mkdir()
    both = config(DATASETS=["bdd100k", "VisDrone"], DATASET_SPLITS=["train", "val"], DATASET_WEIGHTS=[1.0, 3.0])
    made = single_stage(both, str(tmp_path), CATEGORIES, videos=3)
    assert [source.splits["train"] for source in made.sources.values()] == ["train", "val"]
    assert [(mix.source, mix.weight, mix.videos) for mix in made.stages[0].data] == [
        ("bdd100k", 1.0, 3),
        ("visdrone", 3.0, 3),
    ]
    with pytest.raises(MotipError, match="DATASET_WEIGHTS must have an entry"):
        single_stage(both.replaced(DATASET_WEIGHTS=[1.0]), str(tmp_path), CATEGORIES)


def test_class_numbers_are_named_by_labels_txt_or_by_mot17(tmp_path: Path) -> None:
    named = {"val_config": {"CLASS_NAME_TO_ID": {"car": 2, "pedestrian": 1}}}
    write_dance_dataset(tmp_path / "with")
    made = single_stage(config(**named), str(tmp_path / "with"), CATEGORIES)
    assert made.sources["dancetrack"].classes == {"pedestrian": ("pedestrian",), "car": ("car",)}
    write_dance_dataset(tmp_path / "without", labels=None)
    made = single_stage(config(**named), str(tmp_path / "without"), CATEGORIES)
    # Without labels.txt the reader names class 2 `person on vehicle`, while it is a car in the training plan's files.
    assert made.sources["dancetrack"].classes == {"pedestrian": ("pedestrian",), "car": ("person on vehicle",)}
    swapped = {"val_config": {"CLASS_NAME_TO_ID": {"car": 1, "pedestrian": 2}}}
    with pytest.raises(MotipError, match="class car has another number"):
        single_stage(config(**swapped), str(tmp_path / "with"), CATEGORIES)
    write_sequence(tmp_path / "with" / "DanceTrack" / "train" / "t2", 5, labels=None)
    with pytest.raises(MotipError, match="only some sequences have"):
        single_stage(config(**named), str(tmp_path / "with"), CATEGORIES)


def test_gt_folder_is_the_only_validation_source_limited_to_the_seqmap(tmp_path: Path) -> None:
    base = write_dance_dataset(tmp_path / "datasets")
    (tmp_path / "bdd100k").mkdir()
    val = {"GT_FOLDER": "./datasets/DanceTrack/val", "SEQMAP_FILE": "./datasets/DanceTrack/val_seqmap.txt"}
    for datasets in (["BDD100K"], ["DanceTrack"]):
        made = single_stage(config(DATASETS=datasets, val_config=val), str(tmp_path), CATEGORIES)
        assert made.stages[0].val == ("validation",)
        source = made.sources["validation"]
        assert (source.format, source.root, source.splits) == ("motchallenge", str(base), {"val": "val"})
        assert source.sequences == {"val": ("v0", "v1")} and source.classes["car"] == ("car",)
        assert made.sources[datasets[0].lower()].splits == {"train": "train"}
    (base / "val_seqmap.txt").write_text("name\nv1\n")
    assert single_stage(config(val_config=val), str(tmp_path), CATEGORIES).sources["validation"].sequences == {
        "val": ("v1",)
    }
    (base / "val_seqmap.txt").unlink()
    assert single_stage(config(val_config=val), str(tmp_path), CATEGORIES).sources["validation"].sequences == {}


def test_training_and_validation_sources_differ_with_a_gt_folder(tmp_path: Path, repo_root: Path) -> None:
    from motip.curriculum.options import Options
    from motip.curriculum.stage_inputs import stage_job
    from motip.data.convert import convert
    from motip.data.manifest import Manifest

    base = write_dance_dataset(tmp_path / "datasets")
    (base / "val_seqmap.txt").write_text("name\nv1\n")
    overrides = ["NUM_CLASSES=2", "sampler_lengths=[2]", "sample_intervals=[1]"]
    overrides += ["val_config.GT_FOLDER=datasets/DanceTrack/val"]
    overrides += ["val_config.SEQMAP_FILE=datasets/DanceTrack/val_seqmap.txt"]
    settings = load_config(repo_root / "configs/demo/motip_tiny.yaml", overrides)
    made = single_stage(settings, str(tmp_path), CATEGORIES)
    convert(made, tmp_path, tmp_path / "s")
    manifest = Manifest.load(tmp_path / "s")
    job, train = stage_job(made, made.stages[0], None, manifest, Options(str(tmp_path), str(tmp_path / "s")))
    assert [video.identity for video in job.val] == [("validation", "val", "v1")]
    assert [video.identity for video in train] == [("dancetrack", "train", "t0"), ("dancetrack", "train", "t1")]
    assert set(job.protocols) == set(job.classes) == {"dancetrack", "validation"}
    (base / "val_seqmap.txt").write_text("name\nv1\nv9\n")
    with pytest.raises(MotipError, match="are missing, such as v9"):
        convert(single_stage(settings, str(tmp_path), CATEGORIES), tmp_path, tmp_path / "s2")


def test_invalid_datasets_are_errors(tmp_path: Path) -> None:
    with pytest.raises(MotipError, match="unknown dataset MOT17") as caught:
        single_stage(config(DATASETS=["MOT17"]), str(tmp_path), CATEGORIES)
    assert "BDD100K, VisDrone, DanceTrack" in str(caught.value)
    with pytest.raises(MotipError, match="dataset DanceTrack was not found"):
        single_stage(config(), str(tmp_path), CATEGORIES)
    with pytest.raises(MotipError, match="listed twice"):
        single_stage(config(DATASETS=["VisDrone", "visdrone"]), str(tmp_path), CATEGORIES)
    with pytest.raises(MotipError, match="local data root"):
        single_stage(config(), "s3://bucket/raw", CATEGORIES)
