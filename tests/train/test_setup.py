"""Initial weights of a stage: tensors that may be missing, unknown or of another shape (PRETRAIN_ALLOW)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from motip.config import Config
from motip.errors import MotipError
from motip.storage.atomic import sha256_file
from motip.train.setup import build_model_for, fresh_model
from motip.train.stage_job import Parent, StageJob
from motip.weights import TransferReport
from motip.weights.transfer_report import DROPPED, INITIALISED
from tests.helpers.small_training import small_config

MISSING, UNKNOWN = "detr.transformer.level_embed", "detr.transformer.enc_output.weight"


def start(config: Config, path: Path) -> TransferReport:
    parent = Parent(str(path), sha256_file(path))
    job = StageJob("stage", config.to_dict(), (), {}, (), {}, {}, "", parent, "")
    _, report = build_model_for(job, config, None)
    assert report is not None
    return report


def write_damaged(path: Path) -> Path:
    state = dict(fresh_model(small_config()).state_dict())
    del state[MISSING]
    state[UNKNOWN] = torch.zeros(3)
    torch.save({"model": state}, path)
    return path


def test_pretrain_allow_accepts_differences_of_named_tensors(tmp_path: Path) -> None:
    path = write_damaged(tmp_path / "a.pth")
    names = small_config().class_names
    with pytest.raises(MotipError, match="PRETRAIN_ALLOW") as caught:
        start(small_config(PRETRAIN_CLASSES=names), path)
    assert MISSING in str(caught.value.where)
    with pytest.raises(MotipError, match="enc_output"):
        start(small_config(PRETRAIN_CLASSES=names, PRETRAIN_ALLOW=[MISSING]), path)
    report = start(small_config(PRETRAIN_CLASSES=names, PRETRAIN_ALLOW=[MISSING, "detr.*.enc_output.*"]), path)
    assert report.model_status[MISSING].category == INITIALISED
    assert report.file_status[UNKNOWN].category == DROPPED


def test_weights_changed_since_planning_are_an_error(tmp_path: Path) -> None:
    path = write_damaged(tmp_path / "a.pth")
    job = StageJob("stage", {}, (), {}, (), {}, {}, "", Parent(str(path), "0" * 64), "")
    with pytest.raises(MotipError, match="has changed since") as caught:
        build_model_for(job, small_config(PRETRAIN_CLASSES=small_config().class_names), None)
    assert str(path) in str(caught.value.where)
